"""Heads of other packages on our backbone, by its name in timm: each learns four images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.models import classifier, load_weights

SIDE, OBJECT = 64, 32
CORNERS = ((0, 0), (0, 32), (32, 0), (16, 24))  # top and left of the object in each image


@pytest.fixture
def name(test_variant, monkeypatch) -> str:
    """The narrow variant's name in timm."""
    name = f"spatial_mamba_{test_variant}"

    def create(pretrained: bool = False, **kwargs: object) -> nn.Module:
        return classifier._create(test_variant, pretrained, **kwargs)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, name, create)
    return name


@pytest.fixture
def images() -> Tensor:
    """Noise with a bright square in it, ``Tensor[4, 3, 64, 64]``."""
    torch.manual_seed(0)
    return 0.5 * torch.randn(4, 3, SIDE, SIDE) + 2 * masks()[:, None]


def masks() -> Tensor:
    """1 in the square and 0 elsewhere, ``Tensor[4, 64, 64]``."""
    masks = torch.zeros(4, SIDE, SIDE, dtype=torch.long)
    for mask, (top, left) in zip(masks, CORNERS, strict=True):
        mask[top : top + OBJECT, left : left + OBJECT] = 1
    return masks


def boxes() -> list[dict[str, Tensor]]:
    """The squares, as DETR takes them."""
    half = OBJECT / 2
    return [
        {
            "class_labels": torch.tensor([0]),
            "boxes": torch.tensor([[left + half, top + half, OBJECT, OBJECT]]) / SIDE,
        }
        for top, left in CORNERS
    ]


def learn(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    record: Callable[[str, str], None],
    iterations: int = 60,
    rate: float = 3e-3,
) -> tuple[float, float]:
    """The loss before and after some iterations, which must reach the first layer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, iterations)
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            stems = [p for n, p in model.named_parameters() if "stem.conv1.conv.weight" in n]
            assert stems and all(p.grad is not None and p.grad.abs().sum() > 0 for p in stems)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    record("loss at start and end", f"{losses[0]:.3f} {losses[-1]:.3f}")
    return losses[0], losses[-1]


SMP_HEADS = {
    "Unet": {"decoder_channels": (16, 16, 16, 8, 8)},
    "UnetPlusPlus": {"decoder_channels": (16, 16, 16, 8, 8)},
    "FPN": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32},
    "PSPNet": {"psp_out_channels": 16, "psp_use_batchnorm": False},
    "MAnet": {"decoder_channels": (16, 16, 16, 8, 8), "decoder_pab_channels": 8},
    "Linknet": {},
    "UPerNet": {"decoder_channels": 16},
    "Segformer": {"decoder_segmentation_channels": 16},
    "PAN": {"decoder_channels": 16, "encoder_output_stride": 32},
}


def build_smp(head: str, name: str, **options: object) -> nn.Module:
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
    )
    torch.manual_seed(0)
    return smp.create_model(head, f"tu-{name}", encoder_weights=None, classes=2, **options)


@pytest.mark.parametrize("head", SMP_HEADS)
def test_heads_of_segmentation_models_pytorch(head, name, images, record_property):
    model = build_smp(head, name, **SMP_HEADS[head])
    target = masks()
    if head == "PAN":  # which pools the maps of stride 32 three times
        images = F.interpolate(images, scale_factor=4)
        target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    start, end = learn(model, lambda: F.cross_entropy(model(images), target), record_property)
    assert end < start / 4


@pytest.mark.parametrize(("head", "stride"), [("PAN", 16), ("DeepLabV3Plus", 16), ("DeepLabV3", 8)])
def test_heads_that_need_dilation_are_refused(head, stride, name):
    message = rf"output_stride must be 32 for {name}, got {stride}: .* maps of stride 4, 8, 16, 32"
    with pytest.raises(ValueError, match=message):
        build_smp(head, name, encoder_output_stride=stride)


def test_weights_of_an_encoder(name, tmp_path):
    source = timm.create_model(name)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    model = build_smp("Unet", name)
    report = load_weights(model.encoder, tmp_path / "weights.pth")
    assert not report.new
    assert torch.equal(model.encoder.model.model.stem.conv1.conv.weight,
                       source.stem.conv1.conv.weight)  # fmt: skip


def backbone_config(name: str, levels: int) -> object:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("scipy", reason="scipy, which transformers' losses need, is not installed")
    return transformers.TimmBackboneConfig(
        backbone=name, out_indices=list(range(4 - levels, 4)), num_channels=3
    )


def build_mask2former(config: object) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=config, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, dim_feedforward=32,
            num_attention_heads=4, num_queries=4, num_labels=2, train_num_points=256,
            feature_strides=[4, 8, 16, 32], dropout=0.0,
        )
    )  # fmt: skip


def build_maskformer(config: object) -> nn.Module:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation

    decoder = DetrConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32, num_queries=4,
        encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=4, num_labels=2, dropout=0.0,
    )  # fmt: skip
    return MaskFormerForInstanceSegmentation(
        MaskFormerConfig(
            backbone_config=config, decoder_config=decoder, fpn_feature_size=32,
            mask_feature_size=32, num_labels=2,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "iterations", "rate"), [(build_mask2former, 40, 3e-3), (build_maskformer, 120, 1e-3)]
)
def test_mask_classification_of_transformers(
    build, iterations, rate, name, images, record_property
):
    config = backbone_config(name, levels=4)
    torch.manual_seed(0)
    model = build(config).train()
    maps = [torch.stack([1 - mask, mask]).float() for mask in masks()]
    classes = [torch.tensor([0, 1])] * len(maps)

    def loss() -> Tensor:
        return model(pixel_values=images, mask_labels=maps, class_labels=classes).loss.squeeze()

    start, end = learn(model, loss, record_property, iterations, rate)
    assert end < start / 2


def test_upernet_of_transformers(name, images, record_property):
    config = backbone_config(name, levels=4)
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config, hidden_size=64, num_labels=2, use_auxiliary_head=False,
        )
    ).train()  # fmt: skip
    target = masks()
    start, end = learn(
        model,
        lambda: model(pixel_values=images, labels=target).loss,
        record_property,
        iterations=80,
    )
    assert end < start / 4


def load_statistics(model: nn.Module, name: str, images: Tensor) -> None:
    """Give a backbone with frozen batch norms weights to which their statistics fit."""
    source = timm.create_model(name)
    for norm in source.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        source.train()(images)
    report = load_weights(model, source.state_dict())
    assert [n for n in report.new if ".stem." in n or ".stages." in n] == []


def build_detr(config: object) -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection

    return DetrForObjectDetection(
        DetrConfig(
            backbone_config=config, d_model=64, encoder_layers=1, decoder_layers=2, num_queries=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
            decoder_attention_heads=4, num_labels=1, dropout=0.0, auxiliary_loss=False,
        )
    )  # fmt: skip


def build_rt_detr(config: object) -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=config, encoder_in_channels=[32, 64, 128], encoder_hidden_dim=32,
            encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32, num_queries=10,
            decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=2,
            decoder_attention_heads=4, num_denoising=0, num_labels=1, hidden_expansion=0.5,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "levels", "iterations"), [(build_detr, 1, 200), (build_rt_detr, 3, 60)]
)
def test_detectors_of_transformers(build, levels, iterations, name, images, record_property):
    config = backbone_config(name, levels)
    torch.manual_seed(0)
    images = F.interpolate(images, scale_factor=2)  # boxes are relative to the size
    model = build(config).train()
    load_statistics(model, name, images)
    labels = boxes()
    start, end = learn(
        model,
        lambda: model(pixel_values=images, labels=labels).loss,
        record_property,
        iterations,
        rate=2e-3,
    )
    assert end < start / 2
