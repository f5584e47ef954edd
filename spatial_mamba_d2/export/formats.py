"""Files of exported networks in four formats: how they are written, run, and what they say.

``onnx``: one file of the standard operators of opset 20. ``openvino``: the same, converted, as
``NAME.xml`` and ``NAME.bin``. ``pt2``: the graph of ``torch.export``, which needs PyTorch only (and
torchvision for detectors). ``aoti``: compiled by AOTInductor for this kind of processor, over our
compiled operators. Metadata are JSON under one key in each of them.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from spatial_mamba_d2.export.exportable import Exportable, Outputs, Tolerance
from spatial_mamba_d2.export.precision import LOWER, quantise_products, store_as_float16
from spatial_mamba_d2.system.missing import no_such

FORMATS = ("onnx", "openvino", "pt2", "aoti")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "aoti": ".pt2"}
METADATA = "spatial_mamba_d2"
OPSET = 20
INPUT = "image"
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "aoti": ()}
_PACKAGES["openvino"] = (*_PACKAGES["onnx"][:2], "openvino")
RUN_BY_SUFFIX = {".onnx": "onnx", ".xml": "openvino"}  # by predictors, without PyTorch


def require_packages(format: str) -> dict[str, str]:
    """Versions of the packages that writing and checking ``format`` needs.

    Raises:
        ValueError: no such format.
        ImportError: a package is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return {name: _import(name, format).__version__ for name in _PACKAGES[format]}


def _import(package: str, format: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        extra = "openvino" if package == "openvino" else "export"
        raise ImportError(
            f"format {format} needs the package {package}: pip install 'spatial-mamba-d2[{extra}]'"
        ) from None


def tolerance_of(precision: str) -> Tolerance:
    return Tolerance() if precision == "fp32" else LOWER[precision]


def trace(
    exportable: Exportable, size: tuple[int, int] | None, *, native: bool = False
) -> ExportedProgram:
    """The graph of ``exportable``: for all sizes and batches, or for one image of ``size``.

    Args:
        native: over our compiled operators.

    Raises:
        ValueError: an operator of ours is in the graph, from a layer that has no portable form; or
            there is no ``native`` form.
    """
    height, width = size or exportable.trace_px
    shape: tuple[int, ...] = (height, width, exportable.num_channels)
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    if exportable.takes_batches:
        shape = (2 if size is None else 1, *shape)
        axes[2] = Dim.DYNAMIC
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    module = exportable.native if native else exportable.module
    if module is None:
        raise ValueError(
            f"format aoti is for classifiers and UPerNets, got {exportable.metadata['task']}: "
            "AOTInductor compiled a detector with wrong masks, without an error"
        )
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=None if size else (axes,))
    for node in () if native else program.graph.nodes:
        if (name := str(node.target)).startswith("spatial_mamba"):
            raise ValueError(
                f"model must consist of its own layers for export, got one with {name}"
            )
    return program


def write(
    exportable: Exportable,
    program: ExportedProgram,
    format: str,
    path: Path,
    metadata: str,
    precision: str = "fp32",
) -> list[Path]:
    """Write ``path`` in ``format``, with ``metadata``, a JSON text; returns the files.

    PyTorch's exporter for ONNX uses ``program`` up: it fails on the same one a second time.
    """
    if format == "pt2":
        torch.export.save(program, path, extra_files={METADATA: metadata})
        return [path]
    if format == "aoti":
        _write_aoti(program, path, metadata)
        return [path]
    if format == "onnx":
        _write_onnx(exportable, program, path, metadata, precision)
        return [path]
    intermediate = path.with_suffix(".onnx")
    _write_onnx(exportable, program, intermediate, metadata)
    files = convert_to_openvino(intermediate, path, metadata, precision)
    intermediate.unlink()
    return files


def convert_to_openvino(
    source: Path, path: Path, metadata: str, precision: str = "fp32"
) -> list[Path]:
    """Write an ONNX file for OpenVINO, in ``fp32`` or ``fp16``; returns the files."""
    import openvino

    model = openvino.convert_model(source)
    _replace_softplus(model)
    model.set_rt_info(metadata, [METADATA])
    openvino.save_model(model, path, compress_to_fp16=precision == "fp16")
    return [path, path.with_suffix(".bin")]


def _replace_softplus(model: Any) -> None:
    """Give OpenVINO a softplus that keeps small values, as those of delta are.

    Its own is log(1 + exp(x)), and 1 + exp(-8) has lost half of the digits. Here the logarithm is
    multiplied by e / (u - 1), where u is what 1 + e was rounded to (Goldberg 1991, theorem 4), at
    least the number after 1. Without this maximum, OpenVINO takes u - 1 for e.
    """
    from openvino import opset13 as ops

    one, after_one = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    for node in model.get_ops():
        if node.get_type_name() != "SoftPlus":
            continue
        x = node.input_value(0)
        e = ops.exp(ops.negative(ops.absolute(x)))
        u = ops.maximum(ops.add(e, one), after_one)
        log1p = ops.multiply(ops.log(u), ops.divide(e, ops.subtract(u, one)))
        node.output(0).replace(ops.add(ops.relu(x), log1p).output(0))


def _write_aoti(program: ExportedProgram, path: Path, metadata: str) -> None:
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={"aot_inductor.metadata": {METADATA: metadata}},
    )


def _write_onnx(
    exportable: Exportable,
    program: ExportedProgram,
    path: Path,
    metadata: str,
    precision: str = "fp32",
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
            custom_translation_table={torch.ops.aten.softplus.default: _softplus},
            verbose=False,
        )
    assert exported is not None  # because no file is given
    exported.model.metadata_props[METADATA] = metadata
    exported.save(path, external_data=False)
    if precision != "fp32":
        {"fp16": store_as_float16, "int8": quantise_products}[precision](path)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    domains = {entry.domain for entry in model.opset_import} - {""}
    if domains or model.functions:
        raise RuntimeError(f"{path} must have standard operators only, got domains {domains}")


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """ONNX's own, which does not overflow: above the threshold, both round to ``x``.

    The exporter's form, which compares and selects, is 14 % of a classifier's time in onnxruntime.
    """
    from onnxscript import opset20

    if beta != 1 or threshold < 20:
        raise NotImplementedError(f"softplus with beta {beta} and threshold {threshold}")
    return opset20.Softplus(x)


class ExportedFile:
    """A file that is ready to run: ``uint8[(B,) H, W, C] -> {name: array}``.

    Args:
        path: for messages.
        run: from the input to the outputs, in the order of ``names``.
        names: of the outputs.
        metadata: a JSON text, if the file has one.
    """

    def __init__(
        self,
        path: Path,
        run: Callable[[np.ndarray], Sequence[np.ndarray]],
        names: Sequence[str],
        metadata: str | None,
    ):
        self.path, self.run, self.names = path, run, tuple(names)
        self._metadata = metadata

    def __call__(self, image: np.ndarray) -> Outputs:
        return dict(zip(self.names, self.run(image), strict=True))

    @property
    def metadata(self) -> dict[str, Any]:
        """What :func:`write` has put into the file.

        Raises:
            ValueError: there is nothing, or something else.
        """
        try:
            content = json.loads(self._metadata or "")
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ValueError(
                f"{self.path} must be a file of tools/export_model.py, got one without its "
                f"metadata {METADATA}"
            )
        return content


def open_file(path: Path, format: str, threads: int | None = None) -> ExportedFile:
    """Make a file ready to run, on the CPU.

    Args:
        threads: None: as many as PyTorch has.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the runtime is not installed.
        ValueError: the runtime cannot read the file.
    """
    if not path.is_file():
        raise no_such("weights", path)
    opener = {"onnx": _open_onnx, "openvino": _open_openvino, "pt2": _open_pt2, "aoti": _open_aoti}[
        format
    ]
    return opener(path, threads or torch.get_num_threads())


def _open_onnx(path: Path, threads: int) -> ExportedFile:
    onnxruntime = _import("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its types are private
        raise ValueError(f"{path} cannot be read by onnxruntime: {error}") from error
    names = [output.name for output in session.get_outputs()]
    metadata = session.get_modelmeta().custom_metadata_map.get(METADATA)
    return ExportedFile(path, lambda image: session.run(None, {INPUT: image}), names, metadata)


def _open_openvino(path: Path, threads: int) -> ExportedFile:
    openvino = _import("openvino", "openvino")
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    try:
        model = core.read_model(path)
        compiled = core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read by OpenVINO: {error}") from error
    names = [output.get_any_name() for output in compiled.outputs]
    has_metadata = model.has_rt_info([METADATA])
    metadata = model.get_rt_info([METADATA]).astype(str) if has_metadata else None

    def run(image: np.ndarray) -> list[np.ndarray]:
        return [value.copy() for value in compiled([image]).to_tuple()]

    return ExportedFile(path, run, names, metadata)


def _open_aoti(path: Path, threads: int) -> ExportedFile:
    model = torch._inductor.aoti_load_package(str(path))
    metadata = model.get_metadata()[METADATA]

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [value.numpy() for value in model(torch.from_numpy(image))]

    return ExportedFile(path, run, json.loads(metadata)["outputs"], metadata)


def _open_pt2(path: Path, threads: int) -> ExportedFile:
    files: dict[str, Any] = {METADATA: ""}
    module = torch.export.load(path, extra_files=files).module()

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [value.numpy() for value in module(torch.from_numpy(image))]

    return ExportedFile(path, run, json.loads(files[METADATA])["outputs"], files[METADATA])
