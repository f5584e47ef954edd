"""Files of exported networks in three formats: how they are written, run, and what they say.

``onnx``: one file of the standard operators of opset 20. ``openvino``: the same, converted, as
``NAME.xml`` and ``NAME.bin``. ``pt2``: the graph of ``torch.export``, which needs PyTorch only (and
torchvision for detectors). Metadata are JSON under one key in each of them.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from spatial_mamba_d2.export.exportable import Exportable, Outputs, Tolerance

FORMATS = ("onnx", "openvino", "pt2")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
METADATA = "spatial_mamba_d2"
OPSET = 20
INPUT = "image"
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
_PACKAGES["openvino"] = (*_PACKAGES["onnx"][:2], "openvino")
# Of OpenVINO's results in float32, which are less accurate than those of the others
TOLERANCES = {"onnx": Tolerance(), "pt2": Tolerance(), "openvino": Tolerance(score=1e-3)}
Runner = Callable[[np.ndarray], Outputs]


def require_packages(format: str) -> dict[str, str]:
    """Versions of the packages that writing and checking ``format`` needs.

    Raises:
        ValueError: no such format.
        ImportError: a package is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    versions = {}
    for name in _PACKAGES[format]:
        try:
            versions[name] = importlib.import_module(name).__version__
        except ImportError:
            raise ImportError(
                f"format {format} needs the package {name}: pip install 'spatial-mamba-d2[export]'"
            ) from None
    return versions


def trace(exportable: Exportable, size: tuple[int, int] | None) -> ExportedProgram:
    """The graph of ``exportable``: for all sizes and batches, or for one image of ``size``.

    Raises:
        ValueError: an operator of ours is in the graph, from a layer that has no portable form.
    """
    height, width = size or exportable.trace_px
    shape: tuple[int, ...] = (height, width, exportable.num_channels)
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    if exportable.takes_batches:
        shape = (2 if size is None else 1, *shape)
        axes[2] = Dim.DYNAMIC
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        program = torch.export.export(
            exportable.module, (example,), dynamic_shapes=None if size else (axes,)
        )
    for node in program.graph.nodes:
        if (name := str(node.target)).startswith("spatial_mamba"):
            raise ValueError(
                f"model must consist of its own layers for export, got one with {name}"
            )
    return program


def write(
    exportable: Exportable, program: ExportedProgram, format: str, path: Path, metadata: str
) -> list[Path]:
    """Write ``path`` in ``format``, with ``metadata``, a JSON text; returns the files.

    PyTorch's exporter for ONNX uses ``program`` up: it fails on the same one a second time.
    """
    if format == "pt2":
        torch.export.save(program, path, extra_files={METADATA: metadata})
        return [path]
    if format == "onnx":
        _write_onnx(exportable, program, path, metadata)
        return [path]
    intermediate = path.with_suffix(".onnx")
    _write_onnx(exportable, program, intermediate, metadata)
    files = convert_to_openvino(intermediate, path, metadata)
    intermediate.unlink()
    return files


def convert_to_openvino(source: Path, path: Path, metadata: str) -> list[Path]:
    """Write an ONNX file for OpenVINO, in float32; returns the files."""
    import openvino

    model = openvino.convert_model(source)
    model.set_rt_info(metadata, [METADATA])
    openvino.save_model(model, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def _write_onnx(
    exportable: Exportable, program: ExportedProgram, path: Path, metadata: str
) -> None:
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # about torchvision's operators
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(exportable.outputs),
            verbose=False,
        )
    assert exported is not None  # because no file is given
    exported.model.metadata_props[METADATA] = metadata
    exported.save(path, external_data=False)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    domains = {entry.domain for entry in model.opset_import} - {""}
    if domains or model.functions:
        raise RuntimeError(f"{path} must have standard operators only, got domains {domains}")


def open_file(path: Path, format: str, threads: int | None = None) -> Runner:
    """A function that runs the file: ``uint8[(B,) H, W, C] -> {name: array}``."""
    return {"onnx": _open_onnx, "openvino": _open_openvino, "pt2": _open_pt2}[format](path, threads)


def _open_onnx(path: Path, threads: int | None) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(None, {INPUT: image}), strict=True))


def _open_openvino(path: Path, threads: int | None) -> Runner:
    import openvino

    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", config)
    names = [output.get_any_name() for output in compiled.outputs]

    def run(image: np.ndarray) -> Outputs:
        values = compiled([image]).to_tuple()
        return {name: value.copy() for name, value in zip(names, values, strict=True)}

    return run


def _open_pt2(path: Path, threads: int | None) -> Runner:
    module = torch.export.load(path).module()
    names = read_metadata(path, "pt2")["outputs"]

    def run(image: np.ndarray) -> Outputs:
        with torch.no_grad():
            values = module(torch.from_numpy(image))
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    return run


def read_metadata(path: Path, format: str) -> dict[str, Any]:
    """What :func:`write` has put into the file."""
    return json.loads(_metadata_text(path, format))


def _metadata_text(path: Path, format: str) -> str:
    if format == "onnx":
        import onnx

        model = onnx.load(path, load_external_data=False)
        return {entry.key: entry.value for entry in model.metadata_props}[METADATA]
    if format == "openvino":
        import openvino

        return openvino.Core().read_model(path).get_rt_info([METADATA]).astype(str)
    files: dict[str, Any] = {METADATA: ""}
    torch.export.load(path, extra_files=files)
    return files[METADATA]
