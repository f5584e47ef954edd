#!/usr/bin/env python3
"""Fine-tune a detector on a folder of labelled images, here generated ones, and use it.

    python examples/finetune_detector.py --minutes 3
    python examples/finetune_detector.py --data my/data --weights spatialmamba_tiny.pth --minutes 60

Three calls: finetune() reads the data, chooses the settings and trains; load_predictor() reads the
result; calling that predicts.
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.data.images import find_images, read_image, write_image
from spatial_mamba_d2.data.shapes import generate_shapes
from spatial_mamba_d2.finetuning import finetune
from spatial_mamba_d2.prediction import load_predictor
from spatial_mamba_d2.system.cli import log_to_stdout, run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="labelled images; default: generated ones")
    parser.add_argument("--weights", type=Path, help="to start from; default: random ones")
    parser.add_argument("--minutes", type=float, help="default: 3, unless --epochs is given")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--output", type=Path, default=Path("output/example_detector"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    log_to_stdout()
    data = args.data or generate_shapes(args.output / "data", num_train=200, num_val=20)
    run = args.output / "run"
    minutes = 3 if args.minutes is None and args.epochs is None else args.minutes
    finetune(
        data, args.weights, run, task="detection", minutes=minutes, epochs=args.epochs,
        overrides=tuple(args.opts),
    )  # fmt: skip

    predict = load_predictor(run / "model_final.pth")
    images = find_images([data])[-5:]
    for found in predict(images, score_thresh=0.3):
        print(f"{found.source}: {len(found)} objects")
        drawing = predict.model.draw(read_image(found.source), found)
        write_image(args.output / "drawings" / f"{found.source.stem}.png", drawing)
    print(f"Configuration, scores and checkpoints: {run}; drawings: {args.output / 'drawings'}")


if __name__ == "__main__":
    run_tool(main)
