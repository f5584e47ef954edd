"""Files in their runtimes, of a graph that needs no export: the mean colour as probabilities."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.export.formats import convert_to_openvino
from spatial_mamba_d2.prediction import load_predictor

METADATA = {
    "task": "classification",
    "classes": ["red", "green", "blue"],
    "channels": "RGB",
    "resize": {"filter": "bicubic", "short_px": 8, "crop_px": 6},
    "pixel_range": [],
    "inputs": {"image": {"dtype": "uint8", "shape": ["B", "H", "W", 3]}},
    "outputs": ["probabilities"],
}


@pytest.fixture
def file(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx (extra export) is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Softmax", ["mean"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes, "mean", [helper.make_tensor_value_info("image", kinds.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("probabilities", kinds.FLOAT, ["B", 3])],
        [helper.make_tensor("axes", kinds.INT64, [2], [1, 2])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "plain.onnx")
    helper.set_model_props(model, {"spatial_mamba_d2": json.dumps(METADATA)})
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


SCRIPT = """
import sys
sys.modules.update(dict.fromkeys(("detectron2", "lightning", "onnx", "onnxscript")))
from spatial_mamba_d2.prediction import load_predictor
for path in sys.argv[2:]:
    print(load_predictor(path)(sys.argv[1]).top(1)[0][0])
"""


def test_in_a_process_without_the_frameworks(file, tmp_path):
    write_image(tmp_path / "green.png", np.full((9, 20, 3), (20, 200, 30), np.uint8))
    files = [file]
    try:
        files.append(convert_to_openvino(file, file.with_suffix(".xml"), json.dumps(METADATA))[0])
    except ImportError:
        pass  # openvino is another extra
    command = [sys.executable, "-c", SCRIPT, tmp_path / "green.png", *files]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["green"] * len(files)


def test_other_files(file):
    with pytest.raises(
        ValueError, match=r"plain.onnx must be a file of tools/export_model.py, got"
    ):
        load_predictor(file.with_name("plain.onnx"))
    file.write_bytes(file.read_bytes()[:80])
    with pytest.raises(ValueError, match=r"model.onnx cannot be read by onnxruntime: "):
        load_predictor(file)
