"""``spatial_mamba::gelu_gradients`` on CUDA devices: launches of the kernel in ``gelu.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    LANES,
    blocks_of,
    check_arguments,
    check_map,
    contiguous_as,
)
from spatial_mamba_d2.ops.cuda.channels import are_packed, channels_of_thread, cpp_bool
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.cuda.source import constants
from spatial_mamba_d2.ops.cuda.team import Team

_SOURCE = "gelu_gradients/gelu.cuh"
# By whether the channels of a thread are neighbours.
GRADIENTS = {
    packed: KernelSet(_SOURCE, gradients=f"gelu_gradients<{{T}}, {cpp_bool(packed)}>")
    for packed in (True, False)
}


def cut(tokens: int, dim: int, acc: torch.dtype, multiprocessors: int) -> tuple[int, int]:
    """The number of parts of the tokens, each with partial sums, and of blocks for each part."""
    across = blocks_of(dim, LANES * channels_of_thread(acc))
    warps = Team(1, constants(_SOURCE)["kGeluWarps"], 0)  # a warp has 32 kPack channels of a token
    return blocks_of(warps.backward_blocks(tokens * across, multiprocessors), across), across


def gelu_gradients(grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.gelu_gradients`."""
    check_map("gelu_gradients", "x", x)
    check_arguments("gelu_gradients", x, [("grad_output", grad_output, x.shape)])
    acc = accumulation_dtype(x)
    x, grad = contiguous_as(x.dtype, x, grad_output)
    tokens, dim = x.shape[:3].numel(), x.shape[3]
    count = channels_of_thread(acc)
    kernels = GRADIENTS[are_packed(count, dim, x, grad)].on(x.device, x.dtype)
    parts, across = cut(tokens, dim, acc, kernels.multiprocessors)
    grad_x, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    grad_sum = torch.empty((parts, dim), dtype=acc, device=x.device)
    if parts:
        warps = constants(_SOURCE)["kGeluWarps"]
        shared_bytes = warps * count * LANES * acc.itemsize
        members = (grad, x, grad_x, out, grad_sum, tokens, dim, parts)
        kernels.gradients(parts * across, warps, shared_bytes, *members)
    return grad_x, out, grad_sum.sum(0)
