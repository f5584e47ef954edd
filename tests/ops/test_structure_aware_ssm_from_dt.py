"""The SSM with step sizes from dt: in place for inference, and what both forms have in common."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.structure_aware_ssm_from_dt import reference

from . import emulator
from .conftest import relative_error
from .inference_suite import InferenceSuite
from .test_conformance import arguments

CASE = "structure_aware_ssm_from_dt"


class TestInPlace(InferenceSuite):
    name = "structure_aware_ssm_from_dt_"
    reference = reference

    @staticmethod
    def arguments(*ssm_inputs):
        return arguments(CASE, list(ssm_inputs))

    def test_the_output_is_the_input(self, inputs):
        u, *rest = inputs(2, 6, 9, 5)
        assert ops.structure_aware_ssm_from_dt_(u, *rest) is u


@pytest.fixture(params=["eager", "native", "emulated CUDA"])
def kernels(request):
    if request.param == "native" and _extension.WHY_NOT_COMPILED:
        pytest.skip(f"no compiled kernels: {_extension.WHY_NOT_COMPILED}")
    contexts = {
        "eager": _extension.without_compiled_kernels,
        "emulated CUDA": emulator.emulated_cuda,
    }
    with contexts.get(request.param, nullcontext)():
        yield request.param


def both_forms(u, *rest):
    return ops.structure_aware_ssm_from_dt(u, *rest), ops.structure_aware_ssm_from_dt_(
        u.clone(), *rest
    )


def test_full_rank(ssm_inputs, kernels):
    """With the identity as weight, it is :func:`structure_aware_ssm`."""
    u, delta, *rest = ssm_inputs(2, 7, 9, 21)
    expected = ops.structure_aware_ssm(u, delta, *rest)
    for actual in both_forms(u, delta, torch.eye(21), *rest):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 8, 17, 32])
def test_gradients_are_those_of_a_linear_layer(rank, ssm_inputs, kernels):
    """Of any rank: what kernels add up to a multiple of 4 has no part in them."""
    u, _, *rest = ssm_inputs(2, 6, 23, 37)
    g = torch.Generator().manual_seed(rank)
    wider = torch.randn(2, 6, 23, rank + 2, generator=g)
    weight = torch.randn(37, rank, generator=g) / rank**0.5
    results = []
    for operator in (
        ops.structure_aware_ssm_from_dt,
        lambda u, dt, weight, *x: ops.structure_aware_ssm(u, F.linear(dt, weight), *x),
    ):
        leaves = [x.clone().requires_grad_() for x in (wider, u, weight, *rest)]
        dt = leaves[0][..., :rank]  # a slice, as in the models
        y = operator(leaves[1], dt, *leaves[2:])
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual.detach(), expected.detach()) < 1e-5


@pytest.mark.parametrize("form", ["structure_aware_ssm_from_dt", "structure_aware_ssm_from_dt_"])
@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (4, 5, 3), r"u must be \[B, H, W, D\]"),
        (1, (2, 4, 5), r"dt must be \[B, H, W, R\]"),
        (1, (2, 4, 5, 0), r"dt must be \[B, H, W, R\] with no empty axis"),
        (1, (2, 4, 6, 1), r"dt must be \[B, H, W, R\] = \[2, 4, 5, 1\], got \[2, 4, 6, 1\]"),
        (2, (3, 1), r"dt_weight must be \[D, R\] = \[3, 2\], got \[3, 1\]"),
        (3, (2,), r"A must be \[D\]"),
        (4, (2, 4), r"B must be \[B, H, W\]"),
        (5, (2, 4, 5, 1), r"C must be \[B, H, W\]"),
        (6, (2,), r"D must be \[D\]"),
        (7, (4,), r"delta_bias must be \[D\]"),
        (8, (24, 3), r"taps must be \[25, D\] = \[25, 3\], got \[24, 3\]"),
    ],
)
def test_bad_arguments_are_named(form, index, shape, message, ssm_inputs):
    tensors = arguments(CASE, ssm_inputs(2, 4, 5, 3))
    tensors[index] = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        getattr(ops, form)(*tensors)


def test_kernels_check_their_arguments(ssm_inputs):
    """Those of the operators themselves, which the functions' checks do not protect."""
    u, dt, weight, *rest = arguments(CASE, ssm_inputs(2, 4, 5, 3))
    operators = torch.ops.spatial_mamba
    with emulator.emulated_cuda():
        with pytest.raises(ValueError, match=r"from_dt: dt_weight must be \[3, 2\], got \[2, 2\]"):
            operators.structure_aware_ssm_from_dt(u, dt, weight[:2], *rest)
        with pytest.raises(ValueError, match=r"_backward: dt must be \[2, 4, 5, 2\], got \["):
            operators.structure_aware_ssm_from_dt_backward(u, u, dt[:, :3], weight, *rest)
        with pytest.raises(ValueError, match=r"_backward: grad_output must be \[2, 4, 5, 3\], got"):
            operators.structure_aware_ssm_from_dt_backward(u[:1], u, dt, weight, *rest)


def test_on_cpus_plain_pytorch_is_intended(ssm_inputs, monkeypatch):
    """Training there computes the product, then the SSM: no warning, no error if it is forced."""
    monkeypatch.setattr(_extension, "FORCED_BACKEND", "native")
    leaves = [x.requires_grad_() for x in arguments(CASE, ssm_inputs(1, 3, 4, 5))]
    torch.autograd.grad(ops.structure_aware_ssm_from_dt(*leaves).sum(), leaves)


def test_the_old_name_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use structure_aware_ssm_from_dt_") as caught:
        assert ops.low_rank_structure_aware_ssm_ is ops.structure_aware_ssm_from_dt_
    assert caught[0].filename == __file__
    assert "low_rank_structure_aware_ssm_" not in ops.__all__
    with pytest.raises(AttributeError, match="has no attribute 'another_name'"):
        _ = ops.another_name
