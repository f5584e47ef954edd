"""Kernels that a model launches on a CUDA device, and the DRAM bytes that they move, by a model.

Every kernel reads and writes its tensors once, as in :mod:`.dram_model`; this holds for PyTorch's
kernels as for ours. Only shapes are needed, so the model runs on ``meta``, on any machine. Our
operators' launch code runs as well, which counts what it does besides the launches: casts, copies,
sums of partial results.

What is known about PyTorch's kernels and cannot be seen in an operator's tensors:

* cuDNN's convolutions take no bias: it is added by another kernel;
* layer norm and batch norm read their input once for the statistics and once more for the result
  where they are computed from the whole batch, or in the backward pass;
* fused attention is one kernel, three in the backward pass, and stores no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from spatial_mamba_d2.models.optimized import optimize_for_inference
from spatial_mamba_d2.models.spatial_mamba import SpatialMambaBackbone
from spatial_mamba_d2.models.variants import VARIANTS
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.cuda import kernels
from spatial_mamba_d2.profiling import dram_model
from spatial_mamba_d2.profiling.dram_model import Launch, Problem
from spatial_mamba_d2.profiling.tracing import RealLayouts

# Operators that launch nothing: they rename, or allocate.
_VIEWS = frozenset(
    "_reshape_alias _unsafe_view alias as_strided chunk detach empty empty_like empty_permuted "
    "empty_strided expand lift_fresh new_empty new_empty_strided permute select slice split "
    "split_with_sizes squeeze t transpose unbind unflatten unsqueeze view".split()
)
# Operators that read nothing.
_FILLS = frozenset(
    "arange fill_ full new_ones new_zeros ones ones_like zero_ zeros zeros_like".split()
)

# What autocast does on CUDA to the functions that these models call.
_LOW_PRECISION = {F.linear, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_FLOAT32 = {F.layer_norm, F.softmax, Tensor.softmax}

#: launches of our operators, for the problem of their first map
_OURS: dict[str, Callable[[Problem], list[Launch]]] = {
    "state_fusion": dram_model.fusion_forward,
    "structure_aware_ssm": dram_model.ssm_forward,
    "structure_aware_ssm_backward": dram_model.ssm_backward,
    "depthwise_conv3x3": dram_model.conv_forward,
    "depthwise_conv3x3_backward": dram_model.conv_backward,
    "depthwise_conv3x3_gradients_": dram_model.conv_backward,
    "depthwise_conv3x3_stride2": dram_model.conv_stride2_forward,
    "depthwise_conv3x3_stride2_backward": dram_model.conv_stride2_backward,
    "depthwise_conv3x3_layer_norm": dram_model.conv_norm_forward,
    "gated_layer_norm": dram_model.gate_forward,
    "gated_layer_norm_backward": dram_model.gate_backward,
    "gated_layer_norm_gradients_": dram_model.gate_gradients,
    "gelu_gradients": dram_model.gelu_gradients,
    "layer_norm_gradients": dram_model.layer_norm_gradients,
}
#: the same, if step sizes are products of low rank
_OURS_FROM_DT: dict[str, Callable[[Problem, int], list[Launch]]] = {
    "structure_aware_ssm_from_dt": dram_model.ssm_from_dt_forward,
    "structure_aware_ssm_from_dt_backward": dram_model.ssm_from_dt_backward,
}
# Where the map is whose dtype is that of the kernels, if it is not the first, or the second of a
# backward pass.
_MAIN_MAP = {
    "depthwise_conv3x3_gradients_": 2,
    "gated_layer_norm_gradients_": 2,
    "gelu_gradients": 1,
    "layer_norm_gradients": 2,
}


class Row(NamedTuple):
    """What one operator of PyTorch, or one launch of ours, does."""

    name: str
    kernels: int
    read_bytes: int
    written_bytes: int


class Traffic(NamedTuple):
    """What a pass through a model does."""

    rows: list[Row]

    @property
    def kernels(self) -> int:
        return sum(row.kernels for row in self.rows)

    @property
    def num_bytes(self) -> int:
        return sum(row.read_bytes + row.written_bytes for row in self.rows)


ModelFigures = dict[str, dict[str, dict[str, dict[str, float]]]]  # model, dtype, task -> figures
#: the backbones that :func:`model_figures` counts, by their names in timm
BACKBONES = {
    "ours": "",
    "convnext_tiny": "convnext_tiny",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}


def model_figures(height: int = 800, width: int = 1280) -> ModelFigures:
    """``{model: {dtype: {task: {"gigabytes": ..., "kernels": ...}}}}`` of one image.

    Ours is the tiny variant, for inference after ``optimize_for_inference``. bfloat16 is autocast;
    an optimised model has layers in bfloat16 instead.
    """
    x = torch.empty(1, 3, height, width, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    figures: ModelFigures = {}
    for model, name in BACKBONES.items():
        figures[model] = {}
        for label, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
            backbone = _build(name, (height, width))
            training = count_training_step(backbone, x, dtype)
            if name:
                inference = count_inference(backbone, x, dtype)
            else:
                optimized = optimize_for_inference(backbone.eval(), dtype)
                inference = count_inference(optimized, x)
            figures[model][label] = {
                task: {"gigabytes": traffic.num_bytes / 1e9, "kernels": traffic.kernels}
                for task, traffic in (("inference", inference), ("training", training))
            }
    return figures


def _build(name: str, size: tuple[int, int]) -> nn.Module:
    """A backbone on ``meta``: one of timm's, or ours if there is no name."""
    with torch.device("meta"):
        if not name:
            return SpatialMambaBackbone(**VARIANTS["tiny"])
        sizes: dict[str, Any] = {"img_size": size} if name.startswith("swin") else {}
        return timm.create_model(name, features_only=True, **sizes)


def count_inference(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Traffic:
    """Count a forward pass without gradients.

    Args:
        model: on ``meta``.
        x: its input, on ``meta``.
        dtype: of autocast, if it is enabled.
    """
    with torch.no_grad(), _counting(dtype) as counter:
        model.eval()(x)
    return Traffic(counter.rows)


def count_training_step(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Traffic:
    """Count a forward and a backward pass, without loss and optimizer."""
    with _counting(dtype) as counter:
        outputs = tuple(y for y in tree_leaves(model.train()(x)) if y.requires_grad)
        gradients = tuple(torch.empty_like(y) for y in outputs)
        # What torch.autograd.backward calls, but it leaves our function mode before.
        _engine_run_backward(
            outputs, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    return Traffic(counter.rows)


@contextmanager
def _counting(dtype: torch.dtype | None) -> Iterator[_Counter]:
    counter = _Counter(dtype)
    previous = kernels.OPENERS.get("meta")
    kernels.OPENERS["meta"] = _Device
    try:
        with counter, _Functions(counter):
            yield counter
    finally:
        del kernels.OPENERS["meta"]
        if previous:
            kernels.OPENERS["meta"] = previous


def _num_bytes(tensors: Iterable[Any]) -> int:
    """Of each tensor once; axes that repeat the same memory do not count."""
    total = 0
    for x in tensors:
        if isinstance(x, Tensor):
            sizes = zip(x.shape, x.stride(), strict=True)
            count = 1
            for size, stride in sizes:
                count *= size if stride or not size else 1
            total += count * x.element_size()
    return total


class _Device:
    """The device that our launch code finds: it launches nothing."""

    multiprocessors = dram_model.NUM_MULTIPROCESSORS["H100"]
    shared_bytes = dram_model.SHARED_BYTES["H100"]

    def __init__(self, device: torch.device):
        pass

    def load(self, text: str, names: Sequence[str], title: str) -> list[Callable[..., None]]:
        return [lambda *_: None for _ in names]


class _Counter(RealLayouts):
    """Counts what every operator does."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype  # of autocast
        self.rows: list[Row] = []

    def cast(self, tree: Any, dtype: torch.dtype | None) -> Any:
        """Convert the tensors in ``tree`` as autocast does; nothing if it is off."""

        def convert(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return tree_map(convert, tree) if self.dtype else tree

    def add(self, name: str, num_kernels: int, read: int, written: int) -> None:
        self.rows.append(Row(name, num_kernels, read, written))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "spatial_mamba":
            return self._ours(name, args)
        is_aten = namespace == "aten"
        if is_aten and func._can_decompose() and name != "silu_backward":  # has a kernel on CUDA
            with self:
                return func.decompose(*args, **kwargs)
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if name == "convolution_backward" and args[1].stride(1) == 1:
            grad_x, *others = output
            if grad_x is not None:
                grad_x = torch.empty_like(grad_x, memory_format=torch.channels_last)
            output = (grad_x, *others)
        if is_aten and name not in _VIEWS:
            self._count(name, args, kwargs, output)
        return output

    def _count(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        inputs = tree_leaves((args, kwargs))
        num_kernels, read, written = 1, _num_bytes(inputs), _num_bytes(tree_leaves(output))
        if name == "convolution" and args[2] is not None:
            num_kernels, read, written = 2, read + written, 2 * written
        elif name == "convolution_backward":
            grad, x, weight = (_num_bytes([t]) for t in args[:3])
            of_x, of_weight, of_bias = args[-1]
            num_kernels = of_x + of_weight + of_bias
            read = of_x * (grad + weight) + of_weight * (grad + x) + of_bias * grad
        elif "norm_backward" in name:
            num_kernels, read = 2, 2 * _num_bytes(args[:2])
        elif "batch_norm" in name and any(x is True for x in args):  # training
            num_kernels, read = 2, 2 * _num_bytes(args[:1])
        elif name == "copy_":
            read, written = _num_bytes(args[1:2]), _num_bytes(args[:1])
        elif name in _FILLS:
            read = 0
        elif name.endswith("_"):
            written = _num_bytes(args[:1])
        self.add(name, num_kernels, read, written)

    def _ours(self, name: str, args: Any) -> Any:
        """Count the launches, and what the launch code does besides."""
        maps = args[_MAIN_MAP.get(name, int(name.endswith("_backward"))) :]
        dtype = maps[0].dtype
        if name.startswith("structure_aware_ssm"):
            dtype = torch.promote_types(dtype, maps[1].dtype)
        images, height, width, dim = maps[0].shape
        problem = Problem(images, height, width, dim, dtype.itemsize, _Device.multiprocessors)
        if name in _OURS_FROM_DT:
            launches = _OURS_FROM_DT[name](problem, maps[1].shape[-1])
        elif name == "add_bias_":
            launches = dram_model.add_bias(problem, residual=args[2] is not None)
        elif name in _OURS:
            launches = _OURS[name](problem)
        else:
            raise ValueError(f"{name}: its launches are unknown, add it to {__name__}")
        for launch in launches:
            self.add(f"{name}: {launch.name}", 1, launch.read_bytes, launch.written_bytes)
        with self:
            return _extension.CUDA_KERNELS[name](*args)


class _Attention(torch.autograd.Function):
    """Fused attention."""

    @staticmethod
    def forward(ctx: Any, counter: _Counter, *inputs: Tensor | None) -> Tensor:
        query, _, value, _ = inputs
        assert query is not None and value is not None
        ctx.counter = counter
        ctx.save_for_backward(*inputs)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        counter.add("attention", 1, _num_bytes(inputs), _num_bytes([output]))
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        inputs = ctx.saved_tensors
        gradients = [None if x is None else torch.empty_like(x) for x in inputs]
        read = 2 * _num_bytes([*inputs, *grad]) + _num_bytes(grad)  # grad is as large as the output
        ctx.counter.add("attention backward", 3, read, _num_bytes(gradients))
        return None, *gradients


class _Functions(TorchFunctionMode):
    """Imitates CUDA's autocast, which does not exist for ``meta``, and fused attention."""

    def __init__(self, counter: _Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, counter = kwargs or {}, self.counter
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return _Attention.apply(counter, *counter.cast((*args[:3], mask), counter.dtype))
        if func in _LOW_PRECISION:
            args, kwargs = counter.cast((args, kwargs), counter.dtype)
        elif func in _FLOAT32:
            args, kwargs = counter.cast((args, kwargs), torch.float32)
        elif func is torch.ops.spatial_mamba.structure_aware_ssm_from_dt:  # the model casts these
            args = (args[0], *counter.cast(args[1:3], counter.dtype), *args[3:])
        return func(*args, **kwargs)
