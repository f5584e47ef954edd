#!/usr/bin/env python3
"""Segment an image that is larger than the network can see at once, by windows.

    python examples/segment_raster.py --weights output/demo_seg/best.ckpt
    python examples/segment_raster.py --weights best.ckpt --input scene.tif --window 512

Without --input it is a mosaic of generated images. Where windows overlap, probabilities are
averaged (docs/large_images.md); tools/predict.py writes GeoTIFFs, from rasters of any size.
"""

import argparse
from pathlib import Path

import numpy as np

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.data.shapes import render_image
from spatial_mamba_d2.prediction import load_predictor
from spatial_mamba_d2.system.cli import run_tool

CELL_PX = 192


def mosaic(rows: int, columns: int) -> np.ndarray:
    """Generated images side by side, RGB ``uint8[rows * CELL_PX, columns * CELL_PX, 3]``."""
    image = np.full((rows * CELL_PX, columns * CELL_PX, 3), 127, np.uint8)
    for number in range(rows * columns):
        cell = render_image("val", number).image[:CELL_PX, :CELL_PX]
        top, left = (CELL_PX * i for i in divmod(number, columns))
        image[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("output/demo_seg/best.ckpt"))
    parser.add_argument("--input", type=Path, help="an image; default: generated")
    parser.add_argument("--window", type=int, default=192, metavar="PX")
    parser.add_argument("--output", type=Path, default=Path("output/example_raster"))
    args = parser.parse_args()
    predict = load_predictor(args.weights)
    scene = args.input or mosaic(2, 3)
    result = predict(scene, window_px=args.window)
    for row in result.rows():
        print(f"{row['name']:20} {row['share']:6.1%}")
    write_image(args.output / "label.png", result.label)  # indices of classes
    if isinstance(scene, np.ndarray):
        write_image(args.output / "drawing.png", predict.model.draw(scene, result))
    print(f"Results are in {args.output}")


if __name__ == "__main__":
    run_tool(main)
