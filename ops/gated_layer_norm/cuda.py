"""``spatial_mamba::gated_layer_norm`` on CUDA devices: launches of the kernels in ``norm.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops.cuda.arguments import (
    blocks_of,
    check_arguments,
    check_map,
    contiguous_as,
    float_bits,
    in_dtypes_of,
)
from spatial_mamba_d2.ops.cuda.channels import (
    are_packed,
    channels_of_thread,
    cpp_bool,
    with_even_tokens,
)
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.cuda.team import Team
from spatial_mamba_d2.ops.gated_layer_norm import eager

# By whether the channels of a thread are neighbours.
FORWARD, BACKWARD = (
    {
        packed: KernelSet("gated_layer_norm/norm.cuh", norm=f"{kernel}<{{T}}, {cpp_bool(packed)}>")
        for packed in (True, False)
    }
    for kernel in ("gated_norm", "gated_norm_backward")
)

# kMaxNormThreads and kMaxNormBackwardThreads, in warps; tokens that need more are left to plain
# PyTorch.
MAX_WARPS = {torch.float32: 32, torch.float64: 16}
MAX_BACKWARD_WARPS = 16


def _check(op: str, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_map(op, "y", y)
    dim = y.shape[3]
    check_arguments(op, y, [("z", z, y.shape), ("weight", weight, (dim,)), ("bias", bias, (dim,))])


def gated_layer_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.gated_layer_norm`."""
    _check("gated_layer_norm", y, z, weight, bias)
    y_dtype, dtype = y.dtype, torch.promote_types(y.dtype, z.dtype)
    acc = torch.promote_types(dtype, torch.float32)
    team = Team.of(y.shape[3], acc)
    if team.warps > MAX_WARPS[acc]:
        with torch.autocast(y.device.type, enabled=False):
            return eager.gated_layer_norm(y, z, weight, bias, eps)
    (y, y_stride), (z, z_stride) = with_even_tokens(y.to(dtype)), with_even_tokens(z.to(dtype))
    weight, bias = contiguous_as(acc, weight, bias)
    packed = are_packed(channels_of_thread(acc), y_stride, y, weight, bias)
    packed = packed and are_packed(channels_of_thread(acc), z_stride, z)
    kernels = FORWARD[packed].on(y.device, y.dtype)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if out.numel():
        tokens, dim = y.shape[:3].numel(), y.shape[3]
        sizes = (tokens, dim, y_stride, z_stride, team.warps, float_bits(eps))
        blocks = blocks_of(tokens, team.teams)
        kernels.norm(blocks, team.block_warps, team.shared_bytes, y, z, weight, bias, *sizes, out)
    return out.to(y_dtype)


def gated_layer_norm_backward(
    grad_output: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """Gradients of y, z, weight, bias."""
    op = "gated_layer_norm_backward"
    _check(op, y, z, weight, bias)
    check_arguments(op, y, [("grad_output", grad_output, y.shape)])
    inputs = (y, z, weight, bias)
    dtype = torch.promote_types(y.dtype, z.dtype)
    acc = torch.promote_types(dtype, torch.float32)
    team = Team.of(y.shape[3], acc)
    if team.warps > MAX_BACKWARD_WARPS:
        with torch.autocast(y.device.type, enabled=False):
            return eager.gated_layer_norm_backward(grad_output, y, z, weight, bias, eps)
    (y, y_stride), (z, z_stride) = with_even_tokens(y.to(dtype)), with_even_tokens(z.to(dtype))
    (grad,) = contiguous_as(dtype, grad_output)
    weight, bias = contiguous_as(acc, weight, bias)
    count = channels_of_thread(acc)
    packed = are_packed(count, y_stride, y, grad, weight, bias)
    packed = packed and are_packed(count, z_stride, z)
    kernels = BACKWARD[packed].on(y.device, y.dtype)
    tokens, dim = y.shape[:3].numel(), y.shape[3]
    blocks = team.backward_blocks(tokens, kernels.multiprocessors)
    grad_y, grad_z = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for _ in range(2))
    sums = [torch.empty((blocks, dim), dtype=acc, device=y.device) for _ in range(2)]
    if blocks:
        sizes = (tokens, dim, y_stride, z_stride, team.warps, float_bits(eps))
        shared_bytes = team.shared_bytes_with_sums(2 * count, acc)
        outputs = (grad, grad_y, grad_z, *sums, blocks)
        members = (y, z, weight, bias, *sizes, *outputs)
        kernels.norm(blocks, team.block_warps, shared_bytes, *members)
    return in_dtypes_of(inputs, (grad_y, grad_z, *(x.sum(0) for x in sums)))
