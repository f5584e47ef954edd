#!/usr/bin/env python3
"""The backbone under a segmentation head of another library, trained on generated images.

    pip install segmentation-models-pytorch transformers
    python examples/heads_of_others.py
    python examples/heads_of_others.py --library transformers --weights spatialmamba_tiny.pth

Importing spatial_mamba_d2.models registers the backbones in timm, from which both libraries take
theirs (docs/library.md).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spatial_mamba_d2.data.images import find_images, read_image
from spatial_mamba_d2.data.shapes import generate_shapes
from spatial_mamba_d2.models import load_weights
from spatial_mamba_d2.system.cli import run_tool

SIDE_PX, NUM_CLASSES = 128, 6  # a background and five shapes


def unet(weights: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    model = smp.Unet("tu-spatial_mamba_tiny", encoder_weights=None, classes=NUM_CLASSES)
    if weights:
        load_weights(model.encoder, weights)
    return model


def upernet(weights: str) -> nn.Module:
    from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = TimmBackboneConfig(backbone="spatial_mamba_tiny", out_indices=[0, 1, 2, 3])
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=64, num_labels=NUM_CLASSES, use_auxiliary_head=False
    )
    model = UperNetForSemanticSegmentation(config)
    if weights:
        load_weights(model.backbone, weights)
    return model


MODELS: dict[str, Callable[[str], nn.Module]] = {"smp": unet, "transformers": upernet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=MODELS, default="smp")
    parser.add_argument("--weights", default="", help="of the backbone; default: random ones")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("output/example_heads"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = MODELS[args.library](args.weights)
    data = generate_shapes(args.output / "data", num_train=64, num_val=16)

    def load(split: str) -> tuple[Tensor, Tensor]:
        images, labels = (
            np.stack([
                read_image(file, num_channels=channels)[:SIDE_PX, :SIDE_PX]
                for file in find_images([data / folder / split])
            ])
            for folder, channels in (("images", 3), ("annotations", 1))
        )  # fmt: skip
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        return x, torch.from_numpy(labels[..., 0]).long() - 1  # class k is stored as k + 1, 0: none

    def logits(images: Tensor) -> Tensor:
        outputs = model(images)
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    images, labels = load("training")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.iterations)
    balance = torch.ones(NUM_CLASSES)
    balance[0] = 0.3  # nine of ten pixels are background
    for iteration in range(args.iterations):
        batch = torch.randint(len(images), (4,))
        loss = nn.functional.cross_entropy(
            logits(images[batch]), labels[batch], balance, ignore_index=-1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if iteration % 10 == 9:
            print(f"iteration {iteration + 1}: loss {loss.item():.3f}")

    model.eval()
    images, labels = load("validation")
    with torch.inference_mode():
        found = torch.cat([logits(batch).argmax(1) for batch in images.split(4)])
    found = torch.where(labels >= 0, found, -1)
    classes = torch.arange(NUM_CLASSES)[:, None, None, None]
    both = ((found == classes) & (labels == classes)).sum((1, 2, 3))
    either = ((found == classes) | (labels == classes)).sum((1, 2, 3))
    print(f"mIoU {(both / either).mean():.1%} of {NUM_CLASSES} classes, {len(images)} images")


if __name__ == "__main__":
    run_tool(main)
