"""Winograd's formula ``A^T [U * (B^T d B)] A`` written out."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise
from spatial_mamba_d2.ops.winograd_conv3x3.factors import (
    INPUTS,
    OUTPUTS,
    PATCH,
    assembled,
    patches,
    unpacked,
)


def winograd_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.winograd_conv3x3`."""
    x_, weight, bias_ = precise(x, weight, bias)
    U = unpacked(weight, len(bias)).unflatten(0, (PATCH, PATCH))  # [6, 6, C, O]
    BT, AT = x_.new_tensor(INPUTS), x_.new_tensor(OUTPUTS)
    V = torch.einsum("ik,kltc,jl->ijtc", BT, patches(x_), BT)
    M = torch.einsum("ijtc,ijco->ijto", V, U)
    Y = torch.einsum("ik,klto,jl->ijto", AT, M, AT)
    y = assembled(Y, (x.shape[0], x.shape[1], x.shape[2])) + bias_
    return (y.relu() if relu else y).to(x.dtype)
