"""``spatial_mamba::add_bias_`` on CUDA devices: launches of the kernel in ``bias.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.add_bias import eager
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

_SOURCE = "add_bias/bias.cuh"
# By whether the channels of a thread are neighbours.
FORWARD = {
    packed: KernelSet(_SOURCE, add_bias=f"add_bias<{{T}}, {cpp_bool(packed)}>")
    for packed in (True, False)
}


def add_bias_(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> None:
    """See :func:`spatial_mamba_d2.ops.add_bias_`."""
    check_map("add_bias_", "x", x)
    dim = x.shape[3]
    check_arguments("add_bias_", x, [("bias", bias, (dim,))])
    if residual is not None:
        check_arguments("add_bias_", x, [("residual", residual, x.shape)])
    if not x.is_contiguous():
        with torch.autocast(x.device.type, enabled=False):
            eager.add_bias_(x, bias, residual, relu)
        return
    acc = accumulation_dtype(x)
    others = [] if residual is None else contiguous_as(x.dtype, residual)
    (bias,) = contiguous_as(acc, bias)
    count = channels_of_thread(acc)
    kernels = FORWARD[are_packed(count, dim, x, bias, *others)].on(x.device, x.dtype)
    if x.numel():
        warps, tokens = constants(_SOURCE)["kBiasWarps"], x.shape[:3].numel()
        blocks = blocks_of(tokens * blocks_of(dim, count), warps * LANES)
        members = (x, bias, others[0] if others else 0, tokens, dim, int(relu))
        kernels.add_bias(blocks, warps, 0, *members)
