"""``spatial_mamba::gated_layer_norm`` on CUDA devices: launches of the kernels in ``norm.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._checks import check_written
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
    copy_back,
    cpp_bool,
    memory_for,
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
    op, inputs = "gated_layer_norm_backward", (y, z, weight, bias)
    _check(op, *inputs)
    check_arguments(op, y, [("grad_output", grad_output, y.shape)])
    if _is_too_wide(y, z):
        with torch.autocast(y.device.type, enabled=False):
            return eager.gated_layer_norm_backward(grad_output, *inputs, eps)
    dtype = torch.promote_types(y.dtype, z.dtype)
    grad_y, grad_z = (torch.empty(y.shape, dtype=dtype, device=y.device) for _ in range(2))
    sums = _write_gradients(grad_y, (grad_z, y.shape[3]), None, grad_output, *inputs, eps)
    return in_dtypes_of(inputs, (grad_y, grad_z, *sums))


def gated_layer_norm_gradients_(
    grad_z: Tensor,
    grad_output: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """See :func:`spatial_mamba_d2.ops.gated_layer_norm_gradients_`."""
    op, inputs = "gated_layer_norm_gradients_", (y, z, weight, bias)
    _check(op, *inputs)
    check_arguments(op, y, [("grad_output", grad_output, y.shape), ("grad_z", grad_z, y.shape)])
    check_written(op, "grad_z", grad_z, "z", z)
    if _is_too_wide(y, z):
        with torch.autocast(y.device.type, enabled=False):
            return eager.gated_layer_norm_gradients_(grad_z, grad_output, *inputs, eps)
    dtype = torch.promote_types(y.dtype, z.dtype)
    grad_y, out = (torch.empty(y.shape, dtype=dtype, device=y.device) for _ in range(2))
    written = memory_for(grad_z, dtype)
    sums = _write_gradients(grad_y, written, out, grad_output, *inputs, eps)
    copy_back(grad_z, written[0])
    return in_dtypes_of((y, y, weight, bias), (grad_y, out, *sums))


def _is_too_wide(y: Tensor, z: Tensor) -> bool:
    """Whether the kernel of the backward pass cannot process tokens of so many channels."""
    acc = torch.promote_types(torch.promote_types(y.dtype, z.dtype), torch.float32)
    return Team.of(y.shape[3], acc).warps > MAX_BACKWARD_WARPS


def _write_gradients(
    grad_y: Tensor,
    written: tuple[Tensor, int],
    out: Tensor | None,
    grad_output: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> list[Tensor]:
    """Write the gradients of y and z, and the output if it is wanted; return those of weight, bias.

    Args:
        grad_y, out: contiguous, in the dtype of the kernel.
        written: memory for the gradient of z, in this dtype, and the distance from token to token.
    """
    grad_z, grad_z_stride = written
    dtype = grad_y.dtype
    acc = torch.promote_types(dtype, torch.float32)
    team = Team.of(y.shape[3], acc)
    (y, y_stride), (z, z_stride) = with_even_tokens(y.to(dtype)), with_even_tokens(z.to(dtype))
    (grad,) = contiguous_as(dtype, grad_output)
    weight, bias = contiguous_as(acc, weight, bias)
    count = channels_of_thread(acc)
    packed = are_packed(count, y_stride, y, grad, weight, bias)
    packed = packed and are_packed(count, z_stride, z)
    packed = packed and are_packed(count, grad_z_stride, grad_z)
    kernels = BACKWARD[packed].on(y.device, y.dtype)
    tokens, dim = y.shape[:3].numel(), y.shape[3]
    blocks = team.backward_blocks(tokens, kernels.multiprocessors)
    sums = [torch.empty((blocks, dim), dtype=acc, device=y.device) for _ in range(2)]
    if blocks:
        sizes = (tokens, dim, y_stride, z_stride, team.warps, float_bits(eps))
        shared_bytes = team.shared_bytes_with_sums(2 * count, acc)
        outputs = (grad_y, grad_z, *sums, 0 if out is None else out)
        members = (y, z, weight, bias, *sizes, grad, *outputs, grad_z_stride, blocks)
        kernels.norm(blocks, team.block_warps, shared_bytes, *members)
    return [x.sum(0) for x in sums]
