"""Products in 8 bits, for CPUs that multiply 8-bit integers (VNNI).

:func:`quantize_for_inference` optimises a model and lets oneDNN compute its matrix products and
convolutions with 8-bit weights (a scale for each output) and 8-bit activations (one range for each
layer, which is measured on inputs of the user's). Between a block's two layers of the MLP,
activations stay in 8 bits. Scan, fusion, depthwise convolutions, norms and sums stay in float32,
and so do layers with ``stays_exact``: the first convolution, the projection that controls the scan,
and those that predict.

Large values in few channels would waste the range of all others, so each channel of a norm is
divided by a factor that the weights after it are multiplied with: Xiao et al., "SmoothQuant", arXiv
2211.10438.
"""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spatial_mamba_d2.models.inference_only import InferenceOnly
from spatial_mamba_d2.models.optimized import OptimizedBlock, optimize_for_inference
from spatial_mamba_d2.models.packed import PackedConv, PackedLinear, Part, WinogradConv, is_on_cpu
from spatial_mamba_d2.ops import quantize_uint8

#: Shares of the range of a layer's inputs that are tried as its range in 8 bits
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
_MAX_VALUES = 2**16  # of each input, by whose errors one of them is chosen
#: Exponent of the largest inputs in a channel's factor: half of the difference between channels
#: moves into the weights, as in SmoothQuant.
MIGRATION = 0.5


def why_not_int8() -> str:
    """Why this processor or PyTorch cannot multiply 8-bit integers fast and exactly; "" if it can.

    Processors without VNNI add pairs of products in 16 bits, which may overflow.
    """
    is_supported: Any = getattr(torch.cpu, "_is_vnni_supported", None)
    if is_supported is None or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this PyTorch has no matrix products in 8 bits"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if not is_supported():
        return f"the processor ({platform.machine()}) has no VNNI instructions"
    return ""


def quantize_for_inference(model: nn.Module, calibrate: Callable[[nn.Module], object]) -> nn.Module:
    """A copy of ``model`` for inference on CPUs, with products in 8 bits.

    What :func:`~.optimized.optimize_for_inference` says of its copies holds, except that outputs
    differ by the errors of 8 bits: compare scores on your own data. Activations that are not finite
    raise ``RuntimeError``.

    Args:
        model: in float32, as for ``optimize_for_inference``, or one of its copies.
        calibrate: runs the model that it gets on typical inputs, some tens of images; it is called
            three times, and what it returns is ignored. Layers that get no input, such as the mask
            head of a detector that finds nothing in them, stay in float32.

    Raises:
        ValueError: ``model`` has no layers to quantise, is not in float32, or ``calibrate`` did not
            run it.
        RuntimeError: the processor has no instructions for it (:func:`why_not_int8`).
    """
    if reason := why_not_int8():
        raise RuntimeError(f"quantize_for_inference: {reason}; use optimize_for_inference")
    is_optimized = isinstance(model, InferenceOnly)
    optimized = copy.deepcopy(model) if is_optimized else optimize_for_inference(model)
    layers = _layers(optimized)
    if not layers:
        raise ValueError(f"model must have layers to quantise, got {type(model).__name__}")
    for name, layer in layers.items():
        if layer.dtype != torch.float32 or not is_on_cpu(layer.weight):
            raise ValueError(
                f"model must be on a CPU in float32, got {layer.dtype} on {layer.weight.device} "
                f"at {name}"
            )
    with torch.no_grad():
        products = {n: layer for n, layer in layers.items() if isinstance(layer, PackedLinear)}
        _balance(optimized, _observe(optimized, products, calibrate, _Channels))
        ranges = _observe(optimized, _layers(optimized), calibrate, _Range)
        layers = {n: layer for n, layer in _layers(optimized).items() if n in ranges}
        errors = _observe(optimized, layers, calibrate, _Errors, ranges)
    grids = {name: _grid(*error.best()) for name, error in errors.items()}
    for name, layer in layers.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = optimized.get_submodule(owner_name)
        quantized: nn.Module
        if isinstance(layer, PackedLinear):
            is_before_another = isinstance(owner, OptimizedBlock) and attribute == "fc1"
            to = grids[f"{owner_name}.fc2"] if is_before_another else None
            quantized = QuantizedLinear(layer, grids[name], to)
        else:
            quantized = QuantizedConv(layer, grids[name])
        setattr(owner, attribute, quantized)
    return optimized


def _layers(model: nn.Module) -> dict[str, PackedLinear | PackedConv | WinogradConv]:
    """Those that are quantised, by name."""
    found: dict[str, PackedLinear | PackedConv | WinogradConv] = {}
    inside: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, (PackedLinear, PackedConv, WinogradConv)) or layer in inside:
            continue
        inside.update(layer.modules())
        if layer.stays_exact or (isinstance(layer, PackedConv) and layer.geometry[3] > 1):
            continue
        found[name] = layer
    return found


class _Channels:
    """The largest magnitude of each channel of a layer's inputs."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        if not len(x):  # images without detections
            return
        largest = x.flatten(0, -2).abs().amax(0)
        self.largest = largest if self.largest is None else self.largest.maximum(largest)

    def has_inputs(self) -> bool:
        return self.largest is not None


class _Range:
    """The least and largest value of a layer's inputs; 0 is in the range."""

    def __init__(self) -> None:
        self.least, self.most = math.inf, -math.inf

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        least, most = x.aminmax()
        self.least = min(self.least, least.item(), 0.0)
        self.most = max(self.most, most.item(), 0.0)

    def has_inputs(self) -> bool:
        return self.least <= self.most


class _Errors:
    """Squared errors of each of the ``CLIPPED`` ranges."""

    def __init__(self, whole: _Range) -> None:
        self.whole = whole
        self.sums = torch.zeros(len(CLIPPED), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        step = x.numel() // _MAX_VALUES | 1  # odd, so that all channels have their turn
        values = x.flatten()[::step]
        for i in range(len(CLIPPED)):
            scale, zero_point = _grid(*self.clipped(i))
            rounded = (quantize_uint8(values, scale, zero_point).float() - zero_point) * scale
            self.sums[i] += (rounded - values).square().sum().double()

    def has_inputs(self) -> bool:
        return True

    def clipped(self, i: int) -> tuple[float, float]:
        return self.whole.least * CLIPPED[i], self.whole.most * CLIPPED[i]

    def best(self) -> tuple[float, float]:
        return self.clipped(int(self.sums.argmin()))


def _observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibrate: Callable[[nn.Module], object],
    kind: Callable[..., Any],
    *before: dict[str, Any],
) -> dict[str, Any]:
    """What ``kind`` finds in the inputs of each layer, given what was found before."""
    found = {name: kind(*(earlier[name] for earlier in before)) for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found[name].add(inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        calibrate(model)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: observer for name, observer in found.items() if observer.has_inputs()}
    if not found:
        raise ValueError("calibrate must run the model that it gets, but no layer got an input")
    return found


def _grid(least: float, most: float) -> tuple[float, int]:
    """Scale and zero point of a range that contains 0."""
    scale = (most - least) / 255 or 1.0
    return scale, round(-least / scale)


def _balance(model: nn.Module, channels: dict[str, _Channels]) -> None:
    """Divide channels of norms by factors, and multiply the weights that follow with them."""
    for name, part in model.named_modules():
        if isinstance(part, OptimizedBlock):
            for norm, users in (
                (part.cpe1_ln1.norm, [f"{name}.ssm.in_proj.{i}" for i in range(2)]),
                (part.ssm.out_norm, [f"{name}.ssm.out_proj"]),
                (part.cpe2_ln2.norm, [f"{name}.fc1"]),
            ):
                if users[0] in channels:
                    _balance_norm(model, norm, users, channels[users[0]].largest)


def _balance_norm(
    model: nn.Module, norm: nn.LayerNorm, users: list[str], largest: Tensor | None
) -> None:
    assert largest is not None
    layers: list[Any] = [model.get_submodule(name) for name in users]
    weights = [layer.weight.to_dense() for layer in layers]
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    factors = (largest**MIGRATION / of_weights ** (1 - MIGRATION)).clamp(1e-4, 1e4)
    factors = torch.where((largest > 0) & (of_weights > 0), factors, 1.0)
    norm.weight.div_(factors)
    norm.bias.div_(factors)
    for name, layer, weight in zip(users, layers, weights, strict=True):
        owner_name, _, attribute = name.rpartition(".")
        balanced = PackedLinear(weight * factors, layer.bias, layer.dtype, layer.act)
        setattr(model.get_submodule(owner_name), attribute, balanced)


class _Quantized(Part):
    """Layer with weights in 8 bits, with a scale for each output.

    Inputs are float32, or quantised by the layer before.
    """

    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, act: str, grid: tuple[float, int]):
        super().__init__()
        largest = weight.flatten(1).abs().amax(1)
        scales = torch.where(largest > 0, largest / 127, 1.0)
        steps = weight / scales.view(-1, *[1] * (weight.dim() - 1))
        self.out_dim, self.act, self.grid = len(weight), act, grid
        self.dtype = torch.float32
        self.register_buffer("weight", steps.round_().to(torch.int8))
        self.register_buffer("weight_scales", scales)
        self.register_buffer("bias", None if bias is None else bias.clone())

    def _packed(self) -> Tensor:
        raise NotImplementedError

    def _pack(self) -> None:
        # Not buffers: code that iterates over buffers cannot read this layout.
        self.packed_weight = self._packed()
        self.weight_zero_points = torch.zeros(self.out_dim, dtype=torch.int32)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed_weight": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def _factors(self, x: Tensor) -> tuple[Any, ...]:
        if x.dtype != torch.uint8:
            x = quantize_uint8(x, *self.grid)
        return x, *self.grid, self.packed_weight, self.weight_scales, self.weight_zero_points


class QuantizedLinear(_Quantized):
    """``act(x W^T + b)`` in 8 bits: ``Tensor[..., I]`` -> ``Tensor[..., O]``.

    Args:
        layer: the layer in float32.
        grid: scale and zero point of the inputs.
        to: those of the outputs, if they are to be quantised; otherwise outputs are float32.
    """

    def __init__(
        self, layer: PackedLinear, grid: tuple[float, int], to: tuple[float, int] | None = None
    ):
        super().__init__(layer.weight.to_dense(), layer.bias, layer.act, grid)
        self.to_grid = to
        self._pack()

    def _packed(self) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self.to_grid or (1.0, 0)
        dtype = torch.uint8 if self.to_grid else torch.float32
        product: Any = torch.ops.onednn.qlinear_pointwise
        factors = self._factors(x.flatten(0, -2))
        y = product(*factors, self.bias, scale, zero_point, dtype, self.act, [], "none")
        return y.view(*x.shape[:-1], self.out_dim)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """``out += x W^T + b``: ``Tensor[tokens, I]`` to ``Tensor[tokens, O]``, in float32."""
        assert self.act == "none" and self.to_grid is None
        product: Any = torch.ops.onednn.qlinear_pointwise.binary
        same: Any = (1.0, 0, torch.float32, 1.0, 0)
        sum_in_place: Any = ("sum", 1.0, "none", [], "none")
        product(*self._factors(x), out, self.bias, *same, *sum_in_place)


class QuantizedConv(_Quantized):
    """``act(convolution)`` in 8 bits: ``Tensor[B, C, H, W]`` -> ``Tensor[B, O, H', W']``.

    Args:
        layer: the layer in float32, with one group.
        grid: scale and zero point of the inputs.
    """

    def __init__(self, layer: PackedConv | WinogradConv, grid: tuple[float, int]):
        conv = layer.direct if isinstance(layer, WinogradConv) else layer
        assert conv is not None
        super().__init__(conv.weight.to_dense(), conv.bias, conv.act, grid)
        padding, stride, dilation, groups = conv.geometry
        self.geometry = (stride, padding, dilation, groups)
        self._pack()

    def _packed(self) -> Tensor:
        prepack: Any = torch.ops.onednn.qconv_prepack
        return prepack(self.weight, self.weight_scales, *self.grid, *self.geometry, None)

    def forward(self, x: Tensor) -> Tensor:
        convolution: Any = torch.ops.onednn.qconv_pointwise
        factors = self._factors(x.contiguous(memory_format=torch.channels_last))
        to = (1.0, 0, torch.float32)
        return convolution(*factors, self.bias, *self.geometry, *to, self.act, [], None)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + convolution``, a new ``Tensor[B, C, H, W]``."""
        return self(x).add_(residual)
