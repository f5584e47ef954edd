"""More than 255 classes: label maps of 16 bits, from the files to the files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_mamba_d2.data.class_indices import IGNORE, as_label_array, ignore_index
from spatial_mamba_d2.evaluation.label_maps import LabelMapScores
from spatial_mamba_d2.prediction import load_predictor
from spatial_mamba_d2.prediction.blending import Blender
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.windows import Grid
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.data import build_data
from spatial_mamba_d2.segmentation.inference import build_protocol
from spatial_mamba_d2.segmentation.losses import cross_entropy, dice_loss, lovasz_loss
from spatial_mamba_d2.segmentation.metrics import Confusion
from spatial_mamba_d2.segmentation.train import run

NUM_CLASSES = 300
NOTHING = 65535  # in memory
STORED_NOTHING = 0


@pytest.fixture
def tree(tmp_path):
    """Maps of bands of classes, of which 255 is one, with some ignored pixels."""
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for index in range(2):
            truth = np.repeat(np.array([3, 254, 255, 256, 299]), 8)[:, None].repeat(48, 1)
            truth[:, :4] = -1
            pixels = rng.integers(0, 256, (*truth.shape, 3), np.uint8)
            for kind, content in (("images", pixels), ("annotations", (truth + 1).astype("u2"))):
                path = tmp_path / "data" / kind / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    return tmp_path / "data"


@pytest.fixture
def words(tree, arguments):
    return arguments(
        "DATASETS.ROOT", tree, "DATASETS.CLASSES", "", "MODEL.NUM_CLASSES", NUM_CLASSES,
        "MODEL.CLASS_WEIGHTS", (), "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1,
        "TEST.PICTURES", 1,
    )  # fmt: skip


def test_the_ground_truth_scores_100(words):
    cfg = load_config(None, words.opts)
    data = build_data(cfg, build_protocol(cfg))
    data.setup("fit")
    confusion, evaluation = Confusion(NUM_CLASSES), LabelMapScores(data.names)
    for sample in data.val_dataloader():
        label = sample["label"]
        assert set(label.unique().tolist()) == {3, 254, 255, 256, 299, NOTHING}
        confusion.update(torch.where(label == NOTHING, 0, label), label)
        array = as_label_array(label, NUM_CLASSES)
        assert array.dtype == np.uint16
        evaluation.update(np.where(array == NOTHING, 0, array), array)
        stored = data.labels.to_stored(np.where(array == NOTHING, 255, array))
        assert stored.dtype == np.uint16 and stored.max() == 300
    assert confusion.scores() == {"mIoU": 100, "mAcc": 100, "aAcc": 100}
    assert evaluation.evaluate().scores["mIoU"] == 1
    _, target = next(iter(data.train_dataloader()))
    assert target.dtype == torch.int32 and (target == 255).any() and (target == NOTHING).any()


def test_losses_count_class_255_and_not_what_is_ignored():
    target = torch.tensor([[[255, 256, NOTHING]]], dtype=torch.int32)
    assert ignore_index(NUM_CLASSES) == NOTHING and ignore_index(IGNORE) == IGNORE
    perfect = torch.zeros(1, NUM_CLASSES, 1, 3)
    perfect[0, 255, 0, 0] = perfect[0, 256, 0, 1] = perfect[0, 7, 0, 2] = 100
    wrong = perfect.roll(1, 1)
    for loss in (cross_entropy, dice_loss, lovasz_loss):
        assert loss(perfect, target) < 1e-6 < loss(wrong, target)


def test_training_prediction_and_files(words, tree, tmp_path):
    scores = run(words)
    assert 0 <= scores["mIoU"] <= 100
    drawn = list((tmp_path / "output/pictures").iterdir())
    assert drawn
    predictor = load_predictor(tmp_path / "output/last.ckpt")
    bias = predictor.model.predictor.model.decode_head.classify.bias.data
    bias[[7, 255, 256]] = 1000  # the classes that are found are these
    photos = tree / "images" / "validation"
    for window in (None, 24):
        output = tmp_path / f"predictions_{window}"
        options = Options(formats=("label", "csv"), window_px=window, overlap_px=window and 8)
        predict_files([photos], output, predictor, options)
        files = sorted(output.rglob("*.png"))
        assert len(files) == 2
        label = np.asarray(Image.open(files[0]))
        assert set(np.unique(label)) <= {7, 255, 256} and label.max() > 7
        rows = (output / "predictions.csv").read_text().splitlines()[1:]
        assert {int(row.split(",")[1]) for row in rows} <= {7, 255, 256}


def test_blended_windows_of_many_classes():
    grid = Grid((4, 6), 4, 2)
    blender = Blender(grid, NUM_CLASSES)
    scores = np.zeros((NUM_CLASSES, 4, 4), np.float32)
    scores[[255, 299], :, :2], scores[299, :, 2:] = [[[1.0]], [[0.5]]], 1.0
    packed = {0: blender.pack(0, scores)}
    label = np.concatenate([rows for _, rows in blender.strips(packed.get)])
    assert label.dtype == np.uint16
    assert label.tolist() == [[255, 255, 299, 299, NOTHING, NOTHING]] * 4
