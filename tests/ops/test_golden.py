"""The operators against the authors' code."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.state_fusion.taps import OFFSETS

from .conftest import relative_error


@pytest.mark.parametrize("case", ["scan_a", "scan_b", "scan_c"])
def test_selective_scan(case, golden):
    values = {k.removeprefix(f"{case}."): v for k, v in golden("ops.npz").items() if case in k}
    leaves = {
        "u": values["u"].transpose(1, 2),
        "delta": values["delta"].transpose(1, 2),
        "A": values["A"][:, 0],
        "B": values["B"][:, 0],
        "delta_bias": values["delta_bias"],
    }
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    h = ops.selective_scan(**leaves)
    assert relative_error(h.transpose(1, 2), values["h"][:, :, 0]) < 1e-6
    gradients = torch.autograd.grad(h, list(leaves.values()), values["dh"][:, :, 0].transpose(1, 2))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        expected = values[f"d_{name}"]
        if name in ("u", "delta"):
            expected = expected.transpose(1, 2)
        assert relative_error(gradient, expected.reshape(leaf.shape)) < 1e-5, name


@pytest.mark.parametrize("case", ["sasf_a", "sasf_b"])
def test_state_fusion(case, golden):
    values = {k.removeprefix(f"{case}."): v for k, v in golden("ops.npz").items() if case in k}
    names = ("kernel_3", "kernel_3_1", "kernel_3_2", "alpha")
    weights = [values[name].requires_grad_() for name in names]
    h = values["h"].permute(0, 2, 3, 1).clone().requires_grad_()
    fused = ops.state_fusion(h, ops.merge_taps(*weights))
    for mode in ("out_train", "out_eval"):
        assert relative_error(fused.permute(0, 3, 1, 2), values[mode]) < 2e-6
    gradients = torch.autograd.grad(fused, [h, *weights], values["dout"].permute(0, 2, 3, 1))
    assert relative_error(gradients[0].permute(0, 3, 1, 2), values["d_h"]) < 1e-5
    for name, gradient in zip(names, gradients[1:], strict=True):
        assert relative_error(gradient, values[f"d_{name}"]) < 1e-5, name


@pytest.mark.parametrize("case", ["sasf_a", "sasf_b"])
def test_merged_taps(case, golden):
    values = {k.removeprefix(f"{case}."): v for k, v in golden("ops.npz").items() if case in k}
    taps = ops.merge_taps(*(values[n] for n in ("kernel_3", "kernel_3_1", "kernel_3_2", "alpha")))
    dense = torch.zeros_like(values["merged"])
    for (dy, dx), tap in zip(OFFSETS, taps, strict=True):
        dense[:, 0, 5 + dy, 5 + dx] = tap
    assert relative_error(dense, values["merged"]) < 1e-6
