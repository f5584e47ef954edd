"""For every way in which labels are stored, the ground truth scores 100 and something else less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from spatial_mamba_d2.data.class_indices import IGNORE
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.data import build_data
from spatial_mamba_d2.segmentation.inference import build_protocol
from spatial_mamba_d2.segmentation.metrics import Confusion

PALETTE = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
ZERO = ["DATASETS.LABEL_OFFSET", "0", "DATASETS.IGNORE_LABELS", "(255,)"]

# How class indices and IGNORE are stored, and the keys that say so.
FORMATS = {
    "ADE20K": (lambda t: np.where(t == IGNORE, 0, t + 1).astype(np.uint8), []),
    "from 0": (lambda t: t, ZERO),
    "16 bits": (lambda t: t.astype(np.uint16), ZERO),
    "gaps": (
        lambda t: np.array([7, 11, 300] + [9] * 253, np.uint16)[t],
        ["DATASETS.LABEL_MAP", "7: 0, 11: 1, 300: 2, 9: ignore"],
    ),
    "two values of a class": (
        lambda t: (t + 10 * (t == 0) * (np.indices(t.shape)[0] % 2)).astype(np.uint8),
        ["DATASETS.LABEL_MAP", "0: 0, 10: 0, 1: 1, 2: 2, 255: ignore"],
    ),
    "colours": (
        lambda t: np.concatenate([PALETTE, np.full((253, 3), 255, np.uint8)])[t],
        ["DATASETS.LABEL_MAP", "#000000: 0, (128, 0, 0): 1, #008000: 2, #ffffff: ignore"],
    ),
    "names in a file": (lambda t: t, ["DATASETS.LABEL_MAP", "map.yaml"]),
}


def write_tree(root, store):
    rng = np.random.default_rng(0)
    truths = []
    for index in range(3):
        truth = rng.integers(0, 3, (9, 13)).astype(np.uint8)
        truth[:2] = IGNORE
        for split in ("training", "validation"):
            for kind, pixels in (
                ("images", np.zeros((9, 13, 3), np.uint8)),
                ("annotations", store(truth)),
            ):
                path = root / kind / split / "deep" / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        truths.append(truth)
    (root / "map.yaml").write_text('0: class 0\n"1": class 1\n2: "class 2"\n255: ignore\n')
    return truths


@pytest.mark.parametrize("name", FORMATS)
def test_ground_truth_scores_100(name, tmp_path):
    store, keys = FORMATS[name]
    truths = write_tree(tmp_path, store)
    words = ["DATASETS.ROOT", str(tmp_path), "DATASETS.CLASSES", "", "MODEL.NUM_CLASSES", "3",
             "DATALOADER.NUM_WORKERS", "0", *keys]  # fmt: skip
    cfg = load_config(None, words)
    data = build_data(cfg, build_protocol(cfg))
    data.setup("fit")
    counts = data.checked["training"].counts
    assert counts.pixels == tuple(sum(int((t == k).sum()) for t in truths) for k in range(3))
    assert counts.images == (3, 3, 3) and counts.ignored_px == 3 * 2 * 13

    right, wrong = Confusion(3), Confusion(3)
    jaccard = MulticlassJaccardIndex(3, ignore_index=IGNORE)
    for sample, truth in zip(data.val_dataloader(), truths, strict=True):
        assert np.array_equal(sample["label"].numpy(), truth)
        perfect = sample["label"].clamp(max=2)
        other = torch.where(torch.rand(9, 13) < 0.4, (perfect + 1) % 3, perfect)
        right.update(perfect, sample["label"])
        wrong.update(other, sample["label"])
        jaccard.update(other[None].long(), sample["label"][None].long())
        # What would be written for a submission means the same.
        stored = data.labels.to_stored(perfect.numpy())
        assert np.array_equal(data.labels.to_indices(stored), perfect.numpy())
    assert right.scores() == {"mIoU": 100.0, "mAcc": 100.0, "aAcc": 100.0}
    assert wrong.scores()["mIoU"] == pytest.approx(100 * float(jaccard.compute()), abs=1e-4)
    assert wrong.scores()["mIoU"] < 80


def test_0_255_masks_are_explained_at_the_start(tmp_path, caplog):
    """By offset 0 and 255 ignored, nothing but background would be left."""
    write_tree(tmp_path, lambda t: np.where(t == 1, 255, 0).astype(np.uint8))
    words = ["DATASETS.ROOT", str(tmp_path), "DATASETS.CLASSES", "", "MODEL.NUM_CLASSES", "2",
             "DATALOADER.NUM_WORKERS", "0"]  # fmt: skip

    def setup(*keys):
        cfg = load_config(None, [*words, *keys])
        data = build_data(cfg, build_protocol(cfg))
        data.setup("fit")
        return data

    with pytest.raises(ValueError, match=r"only 'class 0' occurs; .*LABEL_MAP \"0: 0, 255: 1\""):
        setup(*ZERO)
    with pytest.raises(ValueError, match="every pixel is ignored"):
        setup("DATASETS.LABEL_OFFSET", "100", "DATASETS.IGNORE_LABELS", "(0, 255)")
    data = setup("DATASETS.LABEL_MAP", "0: 0, 255: 1")
    assert min(data.checked["training"].counts.pixels) > 0 and "no pixel" not in caplog.text


def test_a_class_that_training_lacks_is_named(tmp_path, caplog):
    write_tree(tmp_path, lambda t: (t % 2).astype(np.uint8))
    words = ["DATASETS.ROOT", str(tmp_path), "DATASETS.CLASSES", "", "MODEL.NUM_CLASSES", "3"]
    cfg = load_config(None, [*words, *ZERO])
    build_data(cfg, build_protocol(cfg)).setup("fit")
    assert "1 of 3 classes have no pixel in the training labels" in caplog.text
    assert "'class 2'" in caplog.text
