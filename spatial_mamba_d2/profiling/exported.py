"""What the benchmark times of networks in other runtimes next to PyTorch."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from spatial_mamba_d2.export import formats
from spatial_mamba_d2.export.exportable import Exportable, Normalize, Outputs
from spatial_mamba_d2.export.portable import portable_copy
from spatial_mamba_d2.models import build_backbone, build_upernet, optimize_for_inference
from spatial_mamba_d2.profiling.candidates import NATIVE, OPTIMISED, Candidates, check_agreement

_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "backbone": lambda: build_backbone("tiny"),
    "UPerNet": lambda: build_upernet("tiny"),
}
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}


class _OnPixels(nn.Module):
    """The coarsest feature map, or logits, of ``uint8 Tensor[B, H, W, 3]``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        mean, std = ([255 * x for x in xs] for xs in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.normalize, self.model = Normalize(mean, std), model

    def forward(self, image: Tensor) -> tuple[Tensor]:
        outputs = self.model(self.normalize(image))
        return (outputs["res5"] if isinstance(outputs, dict) else outputs,)


def export_candidates(batch: int, height: int, width: int) -> Candidates:
    """Tiny backbone and UPerNet in PyTorch, and as files for all sizes in onnxruntime and OpenVINO.

    Raises:
        ImportError: one of them is not installed.
    """
    versions: dict[str, str] = {}
    for format in _RUNTIMES:
        versions |= formats.require_packages(format)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, height, width, 3), np.uint8)
    folder = tempfile.TemporaryDirectory()  # lives as long as the candidates
    candidates: Candidates = {}
    for network, build in _NETWORKS.items():
        model = build().eval()
        own = {NATIVE: model, OPTIMISED: optimize_for_inference(model)}
        calls: Candidates = {
            f"{name}: {network}": partial(_in_pytorch, _OnPixels(variant).eval(), pixels)
            for name, variant in own.items()
        }
        exportable = _exportable(model)
        files = {f: Path(folder.name, network + formats.SUFFIXES[f]) for f in _RUNTIMES}
        program = formats.trace(exportable, None)
        formats.write(exportable, program, "onnx", files["onnx"], "{}")
        formats.convert_to_openvino(files["onnx"], files["openvino"], "{}")
        for format, runtime in _RUNTIMES.items():
            run = formats.open_file(files[format], format)
            name = f"{runtime} {versions[runtime].split('-')[0]}: {network}"
            calls[name] = partial(_in_runtime, run, pixels, folder)
        check_agreement({name: call() for name, call in calls.items()})
        candidates |= calls
    return candidates


def _exportable(model: nn.Module) -> Exportable:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError("the benchmark compares candidates itself")

    return Exportable(
        module=_OnPixels(portable_copy(model)).eval(),
        native=None,
        reference=refuse,
        outputs=("y",),
        takes_batches=True,
        num_channels=3,
        trace_px=(140, 210),
        check_px=(),
        compare=refuse,
        metadata={},
    )


def _in_pytorch(network: nn.Module, pixels: np.ndarray) -> Tensor:
    with torch.no_grad():
        return network(torch.from_numpy(pixels))[0]


def _in_runtime(run: Callable[[np.ndarray], Outputs], pixels: np.ndarray, _: object) -> Tensor:
    return torch.from_numpy(run(pixels)["y"])


def in_openvino(
    model: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """Inference of a timm backbone by OpenVINO, which returns the coarsest map.

    OpenVINO converts the model for images of this size, without a file, and has as many threads as
    PyTorch.

    Args:
        image: ``Tensor[B, C, H, W]``, float32, on the CPU.
        dtype: what OpenVINO may compute in: float32 or, if the processor can, bfloat16.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "networks in OpenVINO need openvino: pip install 'spatial-mamba-d2[openvino]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about tracing
        graph = openvino.convert_model(model, input=[tuple(image.shape)], example_input=image)
    config = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(graph, "CPU", config)
    pixels = image.contiguous().numpy()

    def forward() -> Tensor:
        outputs = compiled([pixels], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[len(outputs) - 1])

    return forward
