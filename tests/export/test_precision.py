"""Files with smaller numbers, made from a graph of one product."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_mamba_d2.export.precision import (
    check_precision,
    quantise_products,
    store_as_float16,
)


@pytest.mark.parametrize(
    ("format", "precision", "message"),
    [
        ("onnx", "fp8", "precision must be one of fp32, fp16, bf16, int8, got 'fp8'"),
        ("onnx", "bf16", "must be fp32 or fp16 or int8 for onnx, got 'bf16': such a file would be"),
        ("openvino", "int8", "must be fp32 or fp16 for openvino, got 'int8': only onnxruntime"),
        ("pt2", "fp16", "must be fp32 for pt2, got 'fp16': PyTorch would compute in float16"),
        ("aoti", "int8", "must be fp32 for aoti, got 'int8': only onnxruntime quantises"),
    ],
)
def test_what_is_not_offered_is_refused_with_the_reason(format, precision, message):
    with pytest.raises(ValueError, match=message):
        check_precision(format, precision)


@pytest.fixture
def product(tmp_path):
    """A file that multiplies by a matrix and adds a vector, and a function that runs it."""
    onnx = pytest.importorskip("onnx", reason="onnx (extra export) is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    helper, kinds = onnx.helper, onnx.TensorProto
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(64, 32)).astype(np.float32), np.float32(rng.normal(size=32))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"]),
         helper.make_node("Add", ["y", "bias"], ["z"])], "product",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("z", kinds.FLOAT, ["N", 32])],
        [onnx.numpy_helper.from_array(x, name) for name, x in (("weight", weight), ("bias", bias))],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {"key": "text"})
    path = tmp_path / "product.onnx"
    onnx.save(model, path)

    def run(x):
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert session.get_modelmeta().custom_metadata_map["key"] == "text"
        return session.run(None, {"x": x})[0]

    return path, run


@pytest.mark.parametrize(
    ("change", "size", "error"), [(store_as_float16, 0.55, 1e-3), (quantise_products, 0.45, 3e-2)]
)
def test_smaller_numbers(product, change, size, error):
    path, run = product
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    before, bytes_before = run(x), path.stat().st_size
    change(path)
    after = run(x)
    assert 0 < np.abs(after - before).max() / np.abs(before).max() < error
    assert path.stat().st_size < size * bytes_before + 1000
