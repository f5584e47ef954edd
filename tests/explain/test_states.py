"""States before and after fusion: those of the model's own computation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")

from spatial_mamba_d2.explain.states import plot_states, record_states
from spatial_mamba_d2.models import build_classifier
from tests.ops import emulator


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_classifier("tiny", embed_dim=16, depths=(1, 3, 1, 1)).eval()
    for parameter in model.parameters():  # initial fusion kernels are all ones
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("stage", "block"), [(1, 1), (2, 3), (4, 1)])
def test_the_operator_is_taken_apart_exactly(model, stage, block):
    image = torch.randn(2, 3, 70, 50)
    states = record_states(model, image, stage, block)
    stride = 2 ** (stage + 1)
    shape = (2, -(-70 // stride), -(-50 // stride), 2 * 16 * 2 ** (stage - 1))
    for part in (states.step, states.before, states.after, states.output):
        assert part.shape == shape and part.isfinite().all()
    torch.testing.assert_close(states.observed, states.output, rtol=1e-4, atol=1e-5)
    assert (states.step > 0).all()
    assert not torch.allclose(states.before, states.after)


def test_kernels_for_gpus_are_taken_apart_too(model):
    """They get step sizes as two factors."""
    image = torch.randn(2, 3, 70, 50)
    expected = record_states(model, image, 2, 2)
    with emulator.emulated_cuda():
        states = record_states(model, image, 2, 2)
    for part in ("step", "before", "after", "output", "observed"):
        torch.testing.assert_close(
            getattr(states, part), getattr(expected, part), rtol=1e-4, atol=1e-5
        )


def test_it_is_the_block_that_was_asked_for(model):
    """The operator's output, gated and normalised, is what goes into the block's last layer."""
    image = torch.randn(1, 3, 64, 64)
    ssm = model.stages[1].blocks[1].ssm
    seen = {}
    hooks = [
        ssm.in_proj.register_forward_hook(lambda m, x, y: seen.update(z=y.chunk(2, dim=-1)[1])),
        ssm.out_proj.register_forward_hook(lambda m, x, y: seen.update(gated=x[0])),
    ]
    states = record_states(model, image, 2, 2)
    for hook in hooks:
        hook.remove()
    gated = ssm.out_norm(states.observed, seen["z"])
    torch.testing.assert_close(gated, seen["gated"], rtol=1e-4, atol=1e-5)


def test_a_missing_stage_or_block_is_an_error(model):
    image = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="stage must be 1..4, got 5"):
        record_states(model, image, 5, 1)
    with pytest.raises(ValueError, match="block must be 1..3 in stage 2, got 0"):
        record_states(model, image, 2, 0)


def test_figures(tmp_path):
    options = {"stage": 2, "block": 1, "num_images": 2, "size_px": 64, "seed": 0}
    paths = plot_states("spatial_mamba_tiny", None, [], tmp_path, channels=(0, 5), **options)
    assert [path.name for path in paths] == ["states_0.png", "states_1.png"]
    figures = [cv2.imread(str(path)) for path in paths]
    assert all(figure.shape == (900, 1200, 3) for figure in figures)
    assert not np.array_equal(*figures)
    with pytest.raises(ValueError, match=r"channels must be in 0..255, got 256"):
        plot_states("spatial_mamba_tiny", None, [], tmp_path, channels=(256,), **options)
    with pytest.raises(ValueError, match="model must be one of spatial_mamba_.*, got 'resnet10t'"):
        plot_states("resnet10t", None, [], tmp_path, channels=(), **options)
