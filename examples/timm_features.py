#!/usr/bin/env python3
"""The backbone in timm: features of images, and a linear classifier on top of them.

    python examples/timm_features.py
    python examples/timm_features.py --weights spatialmamba_tiny.pth

Importing spatial_mamba_d2.models registers spatial_mamba_tiny, _small and _base in timm, and so in
everything that takes its backbones from timm (docs/library.md).
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform

import spatial_mamba_d2.models  # noqa: F401  registers the models
from spatial_mamba_d2.data.images import find_images, read_image
from spatial_mamba_d2.data.shape_classes import generate_shape_classes
from spatial_mamba_d2.system.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="", help="default: random ones")
    parser.add_argument("--output", type=Path, default=Path("output/example_timm"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(
        "spatial_mamba_tiny", num_classes=0, checkpoint_path=args.weights
    ).eval()
    transform = create_transform(input_size=64, crop_pct=1.0)
    data = generate_shape_classes(args.output / "data", num_train=20, num_val=10, image_px=64)

    def features(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        names = sorted(path.name for path in folder.iterdir())
        files = find_images([folder])
        images = torch.stack([transform(Image.fromarray(read_image(file))) for file in files])
        with torch.inference_mode():
            found = torch.cat([model(batch) for batch in images.split(25)])
        return found, torch.tensor([names.index(file.parent.name) for file in files])

    x, labels = features(data / "train")
    x_test, labels_test = features(data / "val")
    center, scale = x.mean(0), x.std(0) + 1e-6
    x, x_test = (
        torch.nn.functional.pad((v - center) / scale, (0, 1), value=1) for v in (x, x_test)
    )
    # Ridge regression on one-hot labels
    targets = torch.nn.functional.one_hot(labels).float()
    weights = torch.linalg.solve(x.T @ x + len(x) * torch.eye(x.shape[1]), x.T @ targets)
    accuracy = ((x_test @ weights).argmax(1) == labels_test).float().mean().item()
    num_classes = targets.shape[1]
    print(f"{x.shape[1] - 1} features, top-1 {accuracy:.1%} of {num_classes} classes")


if __name__ == "__main__":
    run_tool(main)
