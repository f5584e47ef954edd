"""Sources that the writers of all formats start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.formats.writers import Source, place, read_source


@pytest.fixture(scope="session")
def shape_source(shapes, tmp_path_factory) -> Source:
    """12 training and 5 test images of the generated shapes, all under names of their own."""
    source = read_source(
        {"train": shapes / "instances_train.json", "val": shapes / "instances_val.json"},
        {"train": shapes / "images/training", "val": shapes / "images/validation"},
    )
    folder = tmp_path_factory.mktemp("renamed")
    for split, images in source.images.items():
        for index, (path, size, objects) in enumerate(images):
            place(path, folder / f"{split}_{path.name}")
            images[index] = folder / f"{split}_{path.name}", size, objects
    return source


@pytest.fixture(scope="session")
def coco_source(coco_mini) -> Source:
    """60 photos."""
    return read_source(
        {split: coco_mini / f"instances_{split}.json" for split in ("train", "val")},
        dict.fromkeys(("train", "val"), coco_mini / "images"),
        num_images=30,
    )


@pytest.fixture(scope="session")
def shape_maps(shapes, tmp_path_factory) -> dict[str, list[tuple[Path, np.ndarray]]]:
    """Images with class indices, in which 255 is ignored, all under names of their own."""
    folder = tmp_path_factory.mktemp("renamed")
    maps = _read_maps(shapes)
    for split, pairs in maps.items():
        for index, (path, indices) in enumerate(pairs):
            place(path, folder / f"{split}_{path.name}")
            pairs[index] = folder / f"{split}_{path.name}", indices
    return maps


@pytest.fixture(scope="session")
def ade_maps() -> dict[str, list[tuple[Path, np.ndarray]]]:
    from tests.conftest import SHARED_DATA

    root = SHARED_DATA / "ade20k_mini" / "ADEChallengeData2016"
    if not root.is_dir():
        pytest.skip(f"real images of ADE20K are not at {root}")
    return _read_maps(root)


def _read_maps(root: Path) -> dict[str, list[tuple[Path, np.ndarray]]]:
    maps = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        maps[split] = [
            (path, np.asarray(Image.open(root / "annotations" / folder / f"{path.stem}.png")) - 1)
            for path in sorted((root / "images" / folder).iterdir())
        ]
    return maps
