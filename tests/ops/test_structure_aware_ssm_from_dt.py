"""The SSM with step sizes from dt, in place, for inference."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.structure_aware_ssm_from_dt import reference

from .inference_suite import InferenceSuite


class TestStructureAwareSSMFromDt(InferenceSuite):
    name = "structure_aware_ssm_from_dt"
    reference = reference

    @staticmethod
    def arguments(u, delta, A, B, C, D, bias, taps):
        dim, rank = u.shape[-1], 1 + u.shape[-1] // 16
        g = torch.Generator().manual_seed(rank)
        dt = torch.randn(*u.shape[:3], rank, generator=g, dtype=torch.float64)
        weight = torch.randn(dim, rank, generator=g, dtype=torch.float64)
        return [u, dt, weight, A, B, C, D, bias, taps]

    def test_full_rank(self, inputs):
        """With the identity as weight, it is :func:`structure_aware_ssm`."""
        u, _, _, *rest = inputs(2, 7, 9, 21)
        delta = torch.randn(u.shape, generator=torch.Generator().manual_seed(0))
        expected = ops.structure_aware_ssm(u, delta, *rest)
        (actual,) = self.call([u, delta, torch.eye(21), *rest])
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (4, 5, 3), r"u must be \[B, H, W, D\]"),
            (1, (2, 4, 5), r"dt must be \[B, H, W, R\]"),
            (1, (2, 4, 5, 0), r"dt must be \[B, H, W, R\] with no empty axis"),
            (1, (2, 4, 6, 1), r"dt must be \[B, H, W, R\] = \[2, 4, 5, 1\], got \[2, 4, 6, 1\]"),
            (2, (3, 2), r"dt_weight must be \[D, R\] = \[3, 1\], got \[3, 2\]"),
            (3, (2,), r"A must be \[D\]"),
            (4, (2, 4), r"B must be \[B, H, W\]"),
            (5, (2, 4, 5, 1), r"C must be \[B, H, W\]"),
            (6, (2,), r"D must be \[D\]"),
            (7, (4,), r"delta_bias must be \[D\]"),
            (8, (24, 3), r"taps must be \[25, D\] = \[25, 3\], got \[24, 3\]"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        self.refuses(inputs(2, 4, 5, 3), index, shape, message)


class TestInPlace(TestStructureAwareSSMFromDt):
    name = "structure_aware_ssm_from_dt_"

    def test_the_output_is_the_input(self, inputs):
        u, *rest = inputs(2, 6, 9, 5)
        assert ops.structure_aware_ssm_from_dt_(u, *rest) is u


def test_the_old_name_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use structure_aware_ssm_from_dt_") as caught:
        assert ops.low_rank_structure_aware_ssm_ is ops.structure_aware_ssm_from_dt_
    assert caught[0].filename == __file__
    assert "low_rank_structure_aware_ssm_" not in ops.__all__
    with pytest.raises(AttributeError, match="has no attribute 'another_name'"):
        _ = ops.another_name
