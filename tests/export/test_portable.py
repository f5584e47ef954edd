"""Our operators in plain PyTorch against the references, and models made of them."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.nn import functional as F

from spatial_mamba_d2.export import portable
from spatial_mamba_d2.models import build_backbone, build_classifier, build_upernet, load_weights
from spatial_mamba_d2.ops.depthwise_conv3x3 import reference as conv_reference
from spatial_mamba_d2.ops.gated_layer_norm import reference as norm_reference
from spatial_mamba_d2.ops.state_fusion.taps import split_taps
from spatial_mamba_d2.ops.structure_aware_ssm import reference as ssm_reference

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1)}
SHAPES = [(2, 7, 5, 8), (3, 1, 1, 4), (1, 1, 9, 4), (2, 11, 1, 4), (2, 3, 300, 8)]


def close(actual, expected, tolerance=1e-5):
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error <= tolerance  # false for NaN


def ssm_inputs(shape):
    *tokens, dim = shape
    u, delta = torch.randn(2, *shape)
    B, C = torch.randn(2, *tokens)
    D, bias = torch.randn(2, dim)
    return [u, delta, -torch.rand(dim) * 4, B, C, D, bias], torch.randn(25, dim) * 0.2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_structure_aware_ssm(shape):
    """Also on rows so wide that the product of all decays is 0 in float32."""
    torch.manual_seed(0)
    inputs, taps = ssm_inputs(shape)
    expected = ssm_reference.structure_aware_ssm(*(x.double() for x in (*inputs, taps)))
    close(portable.structure_aware_ssm(*inputs, split_taps(taps)), expected)


class Operator(torch.nn.Module):
    def forward(self, u, delta, A, B, C, D, bias, taps):
        return portable.structure_aware_ssm(u, delta, A, B, C, D, bias, split_taps(taps))


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="PyTorch 2.8 cannot export our scan")
def test_one_graph_of_the_ssm_for_all_sizes():
    torch.manual_seed(0)
    inputs, taps = ssm_inputs((2, 6, 7, 8))
    map_ = dict.fromkeys(range(3), Dim.DYNAMIC)
    shapes = (map_, map_, None, map_, map_, None, None, None)
    with torch.no_grad():
        graph = torch.export.export(Operator(), (*inputs, taps), dynamic_shapes=shapes).module()
        for shape in ((2, 7, 5, 8), (3, 2, 40, 8)):
            inputs, taps = ssm_inputs(shape)
            expected = ssm_reference.structure_aware_ssm(*(x.double() for x in (*inputs, taps)))
            close(graph(*inputs, taps), expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise_conv3x3(shape, residual):
    x, (weight, bias) = (
        torch.randn(shape),
        (torch.randn(shape[-1], 1, 3, 3), torch.randn(shape[-1])),
    )
    expected = conv_reference.depthwise_conv3x3(x.double(), weight, bias, residual)
    close(portable.depthwise_conv3x3(x, weight, bias, residual), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_layer_norm(shape):
    (y, z), (weight, bias) = torch.randn(2, *shape), torch.randn(2, shape[-1])
    expected = norm_reference.gated_layer_norm(y.double(), z.double(), weight, bias, 1e-5)
    close(portable.gated_layer_norm(y, z, weight, bias, 1e-5), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (6, 6), (7, 13), (16, 11)])
def test_adaptive_avg_pool2d(size, height, width):
    """With fewer, as many, and more pixels than bins."""
    x = torch.randn(2, 3, height, width)
    close(portable.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size), 1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_backbone("tiny", **SMALL),
        lambda: build_classifier("tiny", 5, **SMALL),
        lambda: build_upernet("tiny", 4, channels=16, aux_channels=8, **SMALL),
    ],
    ids=["backbone", "classifier", "upernet"],
)
def test_a_portable_copy_computes_the_same(build, filled_state):
    model = build().eval()
    load_weights(model, filled_state(model))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    copied = portable.portable_copy(model)
    for batch, height, width in ((2, 64, 96), (3, 33, 47), (1, 1, 5), (2, 224, 31)):
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected, actual = model(x), copied(x)
        if isinstance(expected, torch.Tensor):
            expected, actual = {"": expected}, {"": actual}
        for name, value in expected.items():
            close(actual[name], value)
    # The original is as it was, and its weights are there once.
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in copied.parameters()} <= own
    assert not any("spatial_mamba.Depth" in str(type(m)) for m in copied.modules())


def test_other_dtypes_are_refused():
    model = build_backbone("tiny", **SMALL).to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"model must be float32 for export, got torch.bfloat16 in"
    ):
        portable.portable_copy(model)
