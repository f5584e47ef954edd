"""Memory and recall of a detector in scenes of few and of many objects.

    python -m spatial_mamba_d2.profiling.dense_scenes --weights output/demo_dense/model_final.pth \
        --config-file output/demo_dense/config.yaml

Generated scenes (:mod:`spatial_mamba_d2.data.cells`) of one size and 200 and 2,000 objects, which
the training has not seen. The peaks are those of a process that does nothing else, after a first
scene, above what it holds before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.cells import generate_cells
from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.profiling.memory import peak_memory_mb, reset_peak_memory_mb
from spatial_mamba_d2.system.cli import build_parser, run_tool
from spatial_mamba_d2.system.tables import console_table

NUM_SCENES, SEED = 2, 1  # not that of prepare_cells.py
FIGURES = "figures.json"


def measure(config_file: Path, weights: Path, folder: Path) -> dict[str, Any]:
    """Predict for the scenes in ``folder``, then evaluate.

    Raises:
        FileNotFoundError, ValueError: configuration or weights are not usable.
    """
    from spatial_mamba_d2.detection.config import load_config
    from spatial_mamba_d2.detection.predict import Predictor
    from spatial_mamba_d2.detection.trainer import Trainer

    words = [
        "DATASETS.TRAIN_JSON", folder / "instances_train.json",
        "DATASETS.TRAIN_IMAGES", folder / "images/training",
        "DATASETS.TEST_JSON", folder / "instances_val.json",
        "DATASETS.TEST_IMAGES", folder / "images/validation",
        "MODEL.WEIGHTS", weights, "TEST.PICTURES", 0, "OUTPUT_DIR", folder / "evaluation",
    ]  # fmt: skip
    cfg = load_config(config_file, [str(word) for word in words])
    predictor = Predictor(cfg, rle_masks=True)
    images = [read_image(path) for path in sorted((folder / "images/validation").iterdir())]
    predictor(images[0])  # allocates what stays
    held = reset_peak_memory_mb()
    start = time.perf_counter()
    found = predictor(images[-1])
    figures = {
        "detections": len(found),
        "prediction_s": time.perf_counter() - start,
        "prediction_mb": peak_memory_mb() - (held or 0),
        "rle_mb": sum(len(rle["counts"]) for rle in found.pred_masks.rles) / 1e6,
    }
    held = reset_peak_memory_mb()
    start = time.perf_counter()
    results = Trainer.test(cfg, predictor.model)
    return {
        **figures,
        "evaluation_s": time.perf_counter() - start,
        "evaluation_mb": peak_memory_mb() - (held or 0),
        "held_mb": held or 0,
        "box_recall50": results["bbox"]["AR50"],
        "mask_recall50": results["segm"]["AR50"],
    }


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--config-file", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--objects", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--image-px", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path("output/dense_scenes"))
    parser.add_argument("--only-measure", type=Path, help="for the scenes in this folder")
    args = parser.parse_args()
    if args.only_measure:
        figures = measure(args.config_file, args.weights, args.only_measure)
        (args.only_measure / FIGURES).write_text(json.dumps(figures))
        return
    columns = {}
    for number in args.objects:
        folder = generate_cells(
            args.output / str(number), num_train=1, num_val=NUM_SCENES, num_objects=number,
            image_px=args.image_px, seed=SEED,
        )  # fmt: skip
        command = [sys.executable, "-m", "spatial_mamba_d2.profiling.dense_scenes", *sys.argv[1:]]
        subprocess.run([*command, "--only-measure", folder], check=True)
        columns[number] = read_json(folder / FIGURES)
    names = list(next(iter(columns.values())))
    rows = [(name, *(f"{columns[n][name]:.4g}" for n in columns)) for name in names]
    print(console_table(("objects", *map(str, columns)), rows))


if __name__ == "__main__":
    run_tool(main)
