"""``spatial_mamba::layer_norm_gradients`` on CUDA devices: launches of ``gradients.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    check_arguments,
    check_map,
    contiguous_as,
    float_bits,
)
from spatial_mamba_d2.ops.cuda.channels import are_packed, channels_of_thread, cpp_bool
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.cuda.source import constants
from spatial_mamba_d2.ops.cuda.team import Team
from spatial_mamba_d2.ops.layer_norm_gradients import eager

_SOURCE = "layer_norm_gradients/gradients.cuh"
# By whether the channels of a thread are neighbours.
GRADIENTS = {
    packed: KernelSet(_SOURCE, gradients=f"layer_norm_gradients<{{T}}, {cpp_bool(packed)}>")
    for packed in (True, False)
}


def layer_norm_gradients(
    grad_output: Tensor, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.layer_norm_gradients`."""
    op = "layer_norm_gradients"
    check_map(op, "x", x)
    tokens, dim = x.shape[:3].numel(), x.shape[3]
    of_map = [("grad_output", grad_output, x.shape), ("residual", residual, x.shape)]
    check_arguments(op, x, [*of_map, ("weight", weight, (dim,)), ("bias", bias, (dim,))])
    acc = accumulation_dtype(x)
    team = Team.of(dim, acc)
    if team.warps > constants(_SOURCE)["kNormGradientsWarps"]:
        with torch.autocast(x.device.type, enabled=False):
            return eager.layer_norm_gradients(grad_output, residual, x, weight, bias, eps)
    maps = contiguous_as(x.dtype, grad_output, residual, x)
    small = contiguous_as(acc, weight, bias)
    count = channels_of_thread(acc)
    kernels = GRADIENTS[are_packed(count, dim, *maps, *small)].on(x.device, x.dtype)
    blocks = team.backward_blocks(tokens, kernels.multiprocessors)
    grad_x, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    sums = [torch.empty((blocks, dim), dtype=acc, device=x.device) for _ in range(2)]
    if blocks:
        shared_bytes = team.shared_bytes_with_sums(2 * count, acc)
        sizes = (tokens, dim, blocks, team.warps, float_bits(eps))
        members = (*maps, *small, grad_x, out, *sums, *sizes)
        kernels.gradients(blocks, team.block_warps, shared_bytes, *members)
    grad_weight, grad_bias = (x.sum(0) for x in sums)
    return grad_x, out, grad_weight, grad_bias
