"""UPerNet against the authors' values, and its promises about shapes and arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.segmentation_transforms import TestTransform
from spatial_mamba_d2.models import VARIANTS, build_upernet, load_weights
from spatial_mamba_d2.models.checkpoints.names import to_official
from spatial_mamba_d2.models.upernet import resize
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.inference import build_protocol, segment

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1), "channels": 8, "aux_channels": 8}


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_same_labels(logits, golden, case):
    """Equal but where the two best classes are within 1e-4 of the largest logit."""
    label, margin = golden[f"{case}.label"], golden[f"{case}.margin_f16"].float()
    clear = margin > 1e-4 * logits.abs().max()
    assert clear.float().mean() > 0.99
    assert torch.equal(logits.argmax(0)[clear].to(torch.uint8), label[clear])


@pytest.fixture(scope="module")
def golden_upernet(official_state):
    model = build_upernet("tiny")
    report = load_weights(model, {"state_dict": official_state("upernet_tiny")})
    assert not report.new and not report.ignored
    return model.eval()


@pytest.mark.parametrize("height, width", [(75, 101), (128, 160)])
def test_upernet_equals_the_authors(height, width, golden_upernet, golden, noise):
    expected, case = golden("upernet_tiny.npz"), f"t{height}x{width}"
    x = noise("input", (1, 3, height, width))
    with torch.no_grad():
        logits = golden_upernet(x)
        auxiliary = golden_upernet.auxiliary_head(golden_upernet.backbone(x)["res4"])
    if case == "t75x101":
        assert relative_error(logits, expected[f"{case}.logits"]) < 1e-4
        assert relative_error(auxiliary, expected[f"{case}.aux_logits"]) < 1e-4
    else:
        assert relative_error(logits[:, ::5, ::2, ::2], expected[f"{case}.logits_sub"]) < 1e-4
    assert_same_labels(resize(logits, (height, width))[0], expected, case)


@pytest.mark.slow
def test_photograph_equals_the_authors(golden_upernet, golden, root):
    """The whole test pipeline: resize to a short side of 512, normalise, segment, resize back."""
    expected = golden("upernet_tiny.npz")
    cfg = load_config(root / "configs/upernet_spatial_mamba_t.yaml")
    image = read_image(root / "tests/golden/image_b.png")
    transform = TestTransform(
        cfg.INPUT.SHORT_PX, cfg.INPUT.LONG_PX, (1.0,), cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    )
    (view,) = transform(image)
    assert list(view.shape) == expected["image_b.input_shape"].tolist()[1:]
    assert (view[:, ::37, ::41] - expected["image_b.input_sample"]).abs().max() < 1e-4
    outputs = []
    hook = golden_upernet.register_forward_hook(lambda *call: outputs.append(call[-1]))
    logits = segment(golden_upernet, [view], image.shape[:2], build_protocol(cfg))
    hook.remove()
    (low,) = outputs
    low = low[0, ::3, ::8, ::8]
    assert relative_error(low, expected["image_b.lowres_logits_sub"]) < 1e-4
    assert relative_error(logits[::3, ::16, ::16], expected["image_b.logits_sub"]) < 1e-4
    assert_same_labels(logits, expected, "image_b")


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_names(variant, golden):
    official = golden(f"official_keys_upernet_{variant}.json")
    model = build_upernet(variant)
    assert sum(p.numel() for p in model.parameters()) == official["params"]
    names = {to_official(name): list(t.shape) for name, t in model.state_dict().items()}
    assert names == official["keys"]


@pytest.mark.parametrize("size", [(1, 1), (5, 37), (33, 64), (70, 95)], ids=str)
def test_any_size(size):
    model = build_upernet("tiny", num_classes=7, **SMALL)
    x = torch.randn(2, 3, *size)
    model.eval()
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (2, 7, *(-(-n // 4) for n in size))
    assert logits.isfinite().all()
    logits, auxiliary = model.train()(x)
    assert logits.shape == (2, 7, *(-(-n // 4) for n in size))
    assert auxiliary.shape == (2, 7, *(-(-n // 16) for n in size))
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sync_batch_norm_is_everywhere():
    model = build_upernet("tiny", bn_policy="sync", **SMALL)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert model.state_dict().keys() == build_upernet("tiny", **SMALL).state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"bn_policy": "on"}, "bn_policy must be one of train, frozen, sync, got 'on'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_upernet("tiny", **arguments)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\] with H, W >= 1, got \[1, 4,"):
        build_upernet("tiny", **SMALL)(torch.zeros(1, 4, 8, 8))
