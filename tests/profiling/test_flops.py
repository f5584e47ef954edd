"""The authors' FLOP count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spatial_mamba_d2 import ops
from spatial_mamba_d2.models import build_classifier, build_upernet
from spatial_mamba_d2.models.layers import GatedLayerNorm
from spatial_mamba_d2.ops import fvcore_handles
from spatial_mamba_d2.profiling.flops import official_flops


@pytest.mark.parametrize(
    ("variant", "total"), [("tiny", 4.46768128), ("small", 7.11697408), ("base", 15.800638464)]
)
def test_classifiers(variant, total):
    """At 224 x 224 in train mode, from the authors' own counter; published: 4.5, 7.1, 15.8."""
    flops = official_flops(build_classifier(variant), (1, 3, 224, 224))
    assert flops["total"] == pytest.approx(total, rel=1e-9)


def test_each_kind_of_operator(pointwise_gflops):
    """Tiny classifier, against the authors' counter, which names linear layers otherwise."""
    flops = official_flops(build_classifier("tiny"), (1, 3, 224, 224))
    fusion = 27 / (7 + 27) * flops["structure_aware_ssm"]
    convolutions = sum(flops[name] for name in flops if "conv" in name)
    pointwise = pointwise_gflops(64)
    assert convolutions + pointwise + fusion == pytest.approx(1.110796288)
    assert flops["native_batch_norm"] == pytest.approx(0.0119168)
    assert flops["native_layer_norm"] + flops["gated_layer_norm"] == pytest.approx(0.02621696)
    products = flops["mm"] + flops["addmm"] - pointwise
    assert products == pytest.approx(3.237466112 + 0.063021056)
    assert flops["structure_aware_ssm"] - fusion == pytest.approx(0.018264064)


@pytest.mark.parametrize(("variant", "published"), [("tiny", 936), ("small", 992), ("base", 1176)])
def test_upernets(variant, published):
    """At 512 x 2048 in eval mode, without the auxiliary head."""
    flops = official_flops(build_upernet(variant).eval(), (1, 3, 512, 2048))
    assert round(flops["total"]) == published


def test_pytorchs_counter():
    """It leaves out norms, and counts the additions of products too."""
    with torch.device("meta"):
        model, x = build_classifier("tiny"), torch.empty(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(4.46768128, rel=0.03)


def test_pytorchs_counter_backward():
    x = torch.randn(1, 8, 8, 16, requires_grad=True)
    norm = GatedLayerNorm(16)
    with FlopCounterMode(display=False) as forward:
        output = norm(x, x)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert forward.get_total_flops() == 2 * 5 * x.numel()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_step_sizes_inside_the_ssm_count_as_a_linear_layer():
    u, dt, weight = torch.randn(1, 4, 5, 16), torch.randn(1, 4, 5, 3), torch.randn(16, 3)
    A, D, bias, taps = -torch.ones(16), torch.ones(16), torch.zeros(16), torch.ones(25, 16)
    others = (A, u[..., 0], u[..., 1], D, bias, taps)
    leaves = [x.clone().requires_grad_() for x in (u, dt, weight, *others)]
    totals = []
    for operator in (
        ops.structure_aware_ssm_from_dt,
        lambda u, dt, weight, *x: ops.structure_aware_ssm(u, F.linear(dt, weight), *x),
    ):
        with FlopCounterMode(display=False) as forward:
            output = operator(*leaves)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        totals.append((forward.get_total_flops(), backward.get_total_flops()))
    with torch.no_grad(), FlopCounterMode(display=False) as in_place:
        ops.structure_aware_ssm_from_dt_(u, dt, weight, *others)
    assert totals[0] == totals[1] == (in_place.get_total_flops(), 2 * in_place.get_total_flops())


def test_operators_for_backward_passes():
    """They count as the backward operators that they replace, and the gate's output as forward."""
    x, weight, vector = torch.randn(2, 6, 5, 8), torch.randn(8, 1, 3, 3), torch.randn(8)
    with FlopCounterMode(display=False) as convolution:
        ops.depthwise_conv3x3_gradients_(torch.empty_like(x), x, x, weight, vector, False)
    with FlopCounterMode(display=False) as gate:
        ops.gated_layer_norm_gradients_(torch.empty_like(x), x, x, x, vector, vector)
    assert convolution.get_total_flops() == 2 * 2 * 9 * x.numel()
    assert gate.get_total_flops() == 3 * 2 * 5 * x.numel()


def test_fvcores_counter():
    count = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    model = build_classifier("tiny", embed_dim=16, depths=(1, 1, 1, 1)).train()
    shape = (1, 3, 64, 64)
    counter = count(model, torch.randn(shape)).unsupported_ops_warnings(False)
    total = counter.set_op_handle(**fvcore_handles()).total() / 1e9
    assert total == pytest.approx(official_flops(model, shape)["total"], rel=0.03)
