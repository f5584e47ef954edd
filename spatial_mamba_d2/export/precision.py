"""Files with smaller numbers than float32, and what of it there is for which format.

``fp16``: weights are stored as float16, in half the space, and everything is computed in float32.
``int8``: matrix products with weights are computed in integers, by scales that onnxruntime finds
for each input; convolutions and the scan stay in float32.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from spatial_mamba_d2.export.exportable import Tolerance

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_OFFERED = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16"),
    "pt2": ("fp32",),
    "aoti": ("fp32",),
}
_WHY_NOT = {
    "bf16": "such a file would be as large as in fp16, and less accurate; OpenVINO computes any "
    "file in bfloat16 on processors that can, if its INFERENCE_PRECISION_HINT is bf16",
    "fp16": "PyTorch would compute in float16, and the scan needs float32",
    "int8": "only onnxruntime quantises without calibration",
}
# What is accepted in place of the differences of float32
LOWER = {
    "fp16": Tolerance(relative=1e-2, margin=1e-2, box_px=0.5, score=1e-2, mask_iou=0.95),
    "int8": Tolerance(relative=0.1, margin=0.1, box_px=4, score=0.1, mask_iou=0.8),
}


def check_precision(format: str, precision: str) -> None:
    """Raises ValueError, with the reason, unless ``format`` is offered in ``precision``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision not in (offered := _OFFERED[format]):
        raise ValueError(
            f"precision must be {' or '.join(offered)} for {format}, got {precision!r}: "
            f"{_WHY_NOT[precision]}"
        )


def store_as_float16(path: Path) -> None:
    """Store the weights of an ONNX file as float16, in place; vectors stay float32.

    Runtimes convert them when they load the file.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    largest = np.finfo(np.float16).max
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT or len(weight.dims) < 2:
            continue
        values, name = numpy_helper.to_array(weight), weight.name
        if np.abs(values).max(initial=0) > largest:
            continue
        stored = f"{name}.float16"
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def quantise_products(path: Path) -> None:
    """Compute matrix products with weights of an ONNX file in int8, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name(f"{path.stem}-int8.onnx")
    logging.disable(logging.WARNING)  # it asks for a preparation that does not change products
    try:
        # 7 bits of weights, because sums of two products of 8 bits overflow on AVX2.
        quantize_dynamic(
            path, target, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    target.replace(path)
