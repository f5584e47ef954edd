"""Single images and folders of them, and the drawings."""

from __future__ import annotations

import shutil
from functools import partial

import cv2
import numpy as np
import pytest

from spatial_mamba_d2.data.images import visualize_images
from spatial_mamba_d2.data.label_maps import Classes, distinct_colors, read_label
from spatial_mamba_d2.prediction import load_predictor
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.predict import Predictor, build_draw, label_folder
from spatial_mamba_d2.segmentation.train import run
from spatial_mamba_d2.segmentation.visualize import draw_panels, paint


def test_a_folder_with_a_broken_image(arguments, overrides, shapes, tmp_path, capsys):
    run(arguments("SOLVER.MAX_ITER", 1))
    weights = ["MODEL.WEIGHTS", str(tmp_path / "output/last.ckpt")]
    folder = tmp_path / "photos"
    folder.mkdir()
    image = cv2.imread(str(next((shapes / "images/validation").iterdir())))
    cv2.imwrite(str(folder / "a.png"), image)
    cv2.imwrite(str(folder / "tiny.png"), image[:1, :3])
    (folder / "b.jpg").write_bytes(b"no image")
    # Names and colours come from the checkpoint: no data set needs to be there.
    words = [*overrides, *weights, "DATASETS.ROOT", "nowhere", "TEST.PROTOCOL", "ms"]
    drawings = visualize_images([folder], tmp_path / "drawings", partial(build_draw, None, words))
    assert [path.name for path in drawings] == ["a.png", "tiny.png"]
    label = cv2.imread(str(tmp_path / "drawings/a_label.png"), cv2.IMREAD_UNCHANGED)
    assert label.shape == image.shape[:2] and label.max() < 6
    # A copy of the checkpoint is enough: it holds its configuration.
    alone = shutil.copy(tmp_path / "output/last.ckpt", tmp_path / "alone.ckpt")
    predict = load_predictor(alone, overrides=["TEST.PROTOCOL", "ms"])
    assert np.array_equal(predict(folder / "a.png").label, label)
    out = capsys.readouterr().out
    assert "skipped: image file" in out and "2 images in" in out and ", 1 skipped" in out


def test_label_maps_in_stored_values(arguments, overrides, shapes, tmp_path):
    """In a folder of their own, with the tree of the images, and never over one of them."""
    run(arguments("SOLVER.MAX_ITER", 1, "DATASETS.TEST", ""))
    folder, labels = tmp_path / "photos", tmp_path / "labels"
    source = next((shapes / "images/validation").iterdir())
    for name in ("a/x.png", "b/x.png"):
        (folder / name).parent.mkdir(parents=True)
        cv2.imwrite(str(folder / name), cv2.imread(str(source)))

    def visualize(stored, output):
        words = [*overrides, "MODEL.WEIGHTS", str(tmp_path / "output/last.ckpt"),
                 "DATASETS.LABEL_MAP", "10-20: 0, 30: 1, 40: 2, 50: 3, 60: 4, 700: 5",
                 "TEST.SAVE_LABELS", str(stored)]  # fmt: skip
        visualize_images(
            [folder], output, partial(build_draw, None, words, output),
            label_folder=label_folder(None, words),
        )  # fmt: skip

    visualize(labels, tmp_path / "drawings")
    stored = np.array([10, 30, 40, 50, 60, 700])
    for name in ("a/x", "b/x"):
        indices = read_label(tmp_path / f"drawings/{name}_label.png")
        assert np.array_equal(read_label(labels / f"{name}.png"), stored[indices])
    before = (folder / "a/x.png").read_bytes()
    with pytest.raises(ValueError, match=r"would be written over the input .*a/x\.png"):
        visualize(folder, tmp_path / "other")
    with pytest.raises(ValueError, match="drawings and label maps need two folders"):
        visualize(tmp_path / "other", tmp_path / "other")
    assert (folder / "a/x.png").read_bytes() == before


def test_weights_and_images_must_be_there(overrides, tmp_path):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS must name a checkpoint"):
        Predictor(load_config(None, overrides))
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*absent"):
        visualize_images([tmp_path / "absent"], tmp_path, partial(build_draw, None, overrides))


def test_colours_and_legend():
    classes = Classes(tuple(f"class {i}" for i in range(6)), distinct_colors(6))
    label = np.array([[0, 5], [255, 5]], np.uint8)
    painted = paint(label, classes.palette)
    assert tuple(painted[0, 1]) == classes.palette[5] and not painted[1, 0].any()
    image = np.full((100, 150, 3), 127, np.uint8)
    large = np.zeros((100, 150), np.uint8)
    large[50:] = 5
    picture = draw_panels(image, {"ground truth": large, "prediction": large}, classes)
    assert picture.shape[1] == 3 * 360 and picture.shape[0] > 240
    colours = {tuple(colour) for colour in picture[-20:].reshape(-1, 3).tolist()}
    assert {classes.palette[0], classes.palette[5]} <= colours  # in the legend
    assert classes.palette[1] not in colours


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_panels_of_degenerate_shapes(shape, channels):
    image, label = np.zeros((*shape, channels), np.uint8), np.zeros(shape, np.uint8)
    panels = draw_panels(image, {"prediction": label}, Classes(("a",), ((1, 2, 3),)))
    assert panels.nbytes < 10 << 20 and panels.shape[1] >= 2 * 240


@pytest.mark.parametrize("number", [2, 6, 19, 150])
def test_colours_are_distinct(number):
    assert len(set(distinct_colors(number))) == number
