"""The gated structure-aware state space model of a block.

Symbols as in the paper; see :mod:`.spatial_mamba`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from spatial_mamba_d2.models.branches import Body, Weights
from spatial_mamba_d2.models.layers import DepthwiseConv, GatedLayerNorm
from spatial_mamba_d2.models.plain_layers import is_plain
from spatial_mamba_d2.models.pointwise import (
    Pointwise,
    pointwise,
    pointwise_grad_input,
    pointwise_grad_weight,
)
from spatial_mamba_d2.models.recompute import as_under_autocast, recompute
from spatial_mamba_d2.ops import (
    depthwise_conv3x3,
    depthwise_conv3x3_gradients_,
    gated_layer_norm_gradients_,
    merge_taps,
    structure_aware_ssm,
    structure_aware_ssm_from_dt,
)
from spatial_mamba_d2.ops.cuda.kernels import run_on

# These look at shapes, which are unknown while torch.fx traces, so they become nodes of its graph.
torch.fx.wrap("merge_taps")
torch.fx.wrap("structure_aware_ssm")


class StateFusion(nn.Module):
    """Weights of structure-aware state fusion; ``forward()`` returns them as ``Tensor[25, D]``."""

    def __init__(self, dim: int):
        super().__init__()
        self.kernel_d1 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_d3 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_d5 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.alpha = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return merge_taps(self.kernel_d1, self.kernel_d3, self.kernel_d5, self.alpha)


class StructureAwareSSM(Body):
    """Gated structure-aware state space model, ``Tensor[B, H, W, C]`` -> the same shape.

    Paper, section 3.3 and figure 4; ``StructureAwareSSM`` in the authors' code, with one state per
    channel. A, D and the bias of delta stay float32 under autocast.

    Args:
        dim: C.
        ssm_ratio: D / C.
        dt_min, dt_max: range of the initial values of delta.
        dt_floor: lower bound of the initial values of delta.
    """

    first, last = "in_proj", "out_proj"
    kinds: ClassVar = {
        "in_proj": Pointwise,
        "conv": DepthwiseConv,
        "x_proj": Pointwise,
        "dt_proj": Pointwise,
        "out_norm": GatedLayerNorm,
        "out_proj": Pointwise,
    }
    weights = (
        *("in_proj.weight", "conv.weight", "conv.bias", "x_proj.weight", "dt_proj.weight"),
        *("D", "dt_bias", "out_norm.weight", "out_norm.bias", "out_proj.weight"),
    )

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 2.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_floor: float = 1e-4,
    ):
        super().__init__()
        inner = int(ssm_ratio * dim)
        rank = math.ceil(dim / 16)
        self.split_sizes = (rank, 1, 1)
        self.in_proj = Pointwise(dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv(inner, residual=False)
        self.x_proj = Pointwise(inner, sum(self.split_sizes), bias=False)
        self.dt_proj = Pointwise(rank, inner, bias=False, recompute_output=True)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.zeros(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.fusion = StateFusion(inner)
        self.out_norm = GatedLayerNorm(inner)
        self.out_proj = Pointwise(inner, dim, bias=False)
        self.dt_range = (dt_min, dt_max, dt_floor)
        self.reset_dt_parameters()

    @torch.no_grad()
    def reset_dt_parameters(self) -> None:
        """Initialise ``x_proj``, ``dt_proj`` and ``dt_bias``: delta log-uniform in its range."""
        dt_min, dt_max, dt_floor = self.dt_range
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_()
        dt.clamp_(min=dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def derived(self) -> dict[str, Tensor]:
        return {"A": -torch.exp(self.A_log.float().flatten()), "taps": self.fusion()}

    def inner(self, h: Tensor, derived: Weights) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, z = h.chunk(2, dim=-1)  # [B, H, W, D] each
        u = self.conv(u)
        steps = self.x_proj(u)
        dt, B, C = self._split(steps)
        others = (derived["A"], B, C, self.D, self.dt_bias, derived["taps"])
        # The slowest part of a block on a GPU, where there is more memory for the time of training.
        layer, on_gpu = self.dt_proj, run_on(u)
        if on_gpu and is_plain(layer, Pointwise) and layer.bias is None:
            factors = as_under_autocast(dt, layer.weight)
            y = structure_aware_ssm_from_dt(u, *factors, *others)  # delta is never in memory
        else:
            inputs = (u, layer(dt), *others)
            y = structure_aware_ssm(*inputs) if on_gpu else recompute(structure_aware_ssm, *inputs)
        return self.out_norm(y, z), ((steps, y) if on_gpu else (steps,))

    def _split(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, B, C = steps.split(self.split_sizes, dim=-1)
        return dt, B.squeeze(-1), C.squeeze(-1)

    def inner_gradients(
        self, grad: Tensor, h: Tensor, kept: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        conv = (weights["conv.weight"], weights["conv.bias"])
        norm = (weights["out_norm.weight"], weights["out_norm.bias"])
        x_weight, dt_weight = (
            weights[f"{name}.weight"].to(h.dtype) for name in ("x_proj", "dt_proj")
        )
        u_in, z = h.chunk(2, dim=-1)
        u = depthwise_conv3x3(u_in, *conv, False)
        steps, *y_kept = kept
        dt, B, C = self._split(steps)
        others = (weights["A"], B, C, weights["D"], weights["dt_bias"], weights["taps"])
        grad_h = torch.empty_like(h)
        grad_u_in, grad_z = grad_h.chunk(2, dim=-1)
        if y_kept:
            (y,) = y_kept
        else:
            delta = pointwise(dt, dt_weight)
            y = structure_aware_ssm(u, delta, *others)
        of_gate = gated_layer_norm_gradients_(grad_z, grad, y, z, *norm, self.out_norm.eps)
        grad_y, output, *grad_norm = of_gate
        del y
        operators = torch.ops.spatial_mamba
        if y_kept:
            of_ssm = operators.structure_aware_ssm_from_dt_backward(
                grad_y, u, dt, dt_weight, *others
            )
            grad_u, grad_dt, grad_dt_weight, *grads = of_ssm
        else:
            of_ssm = operators.structure_aware_ssm_backward(grad_y, u, delta, *others)
            grad_u, grad_delta, *grads = of_ssm
            grad_dt = pointwise_grad_input(grad_delta, dt_weight)
            grad_dt_weight = pointwise_grad_weight(grad_delta, dt, dt_weight)
        grad_A, grad_B, grad_C, grad_D, grad_dt_bias, grad_taps = grads
        grad_steps = torch.cat((grad_dt, grad_B[..., None], grad_C[..., None]), dim=-1)
        grad_u.flatten(0, 2).addmm_(grad_steps.flatten(0, 2), x_weight)
        grad_conv = depthwise_conv3x3_gradients_(grad_u_in, grad_u, u_in, *conv, False)
        gradients = {
            "conv.weight": grad_conv[0],
            "conv.bias": grad_conv[1],
            "x_proj.weight": pointwise_grad_weight(grad_steps, u, x_weight),
            "dt_proj.weight": grad_dt_weight,
            "D": grad_D,
            "dt_bias": grad_dt_bias,
            "out_norm.weight": grad_norm[0],
            "out_norm.bias": grad_norm[1],
            "A": grad_A,
            "taps": grad_taps,
        }
        return grad_h, output, gradients
