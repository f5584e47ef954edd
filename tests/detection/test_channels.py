"""Images of other channels than RGB, and of more than 8 bits: training, evaluation, prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.detection import build_model
from spatial_mamba_d2.detection.predict import Predictor
from spatial_mamba_d2.detection.train import run
from spatial_mamba_d2.models import load_weights
from spatial_mamba_d2.models.checkpoints.reading import read_checkpoint
from spatial_mamba_d2.prediction import load_predictor

NAMES = ("blue", "green", "red", "edge", "nir")


@pytest.mark.parametrize("num_channels", [4, 6, 16])
def test_repeated_bands_give_the_result_of_rgb(num_channels, make_cfg, tmp_path, noise):
    """R, G, B, R, G, ...: the widened stem computes the same."""
    rgb_cfg = make_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    torch.manual_seed(0)
    rgb = build_model(rgb_cfg).eval()
    torch.save({"model": rgb.state_dict()}, tmp_path / "rgb.pth")
    sources = np.arange(num_channels) % 3
    mean, std = (np.array(values)[sources].tolist()
                 for values in (rgb_cfg.MODEL.PIXEL_MEAN, rgb_cfg.MODEL.PIXEL_STD))  # fmt: skip
    cfg = make_cfg("INPUT.CHANNELS", num_channels, "MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", std,
                   "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)  # fmt: skip
    model = build_model(cfg).eval()
    report = load_weights(model, tmp_path / "rgb.pth")
    assert report.inflated == "backbone.bottom_up.stem.conv1.conv.weight" and not report.new
    image = torch.randint(0, 255, (1, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    image = image.float()
    with torch.no_grad():
        expected = rgb.backbone((image - rgb.pixel_mean) / rgb.pixel_std)
        found = model.backbone((image[:, sources] - model.pixel_mean) / model.pixel_std)
    for name, value in expected.items():
        # Sums over more bands, whose rounding differs between versions of PyTorch
        assert (found[name] - value).abs().max() <= 4e-6 * value.abs().max(), name


@pytest.fixture
def rasters(shapes, tmp_path):
    """``KEY VALUE`` pairs for copies of the sample with five bands of 16 bits."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
    words = ["INPUT.CHANNELS", 5, "MODEL.PIXEL_MEAN", (100, 110, 120, 90, 80), "MODEL.PIXEL_STD",
             (50,) * 5, "INPUT.PIXEL_RANGE", (0, 5000), "INPUT.BAND_NAMES", NAMES]  # fmt: skip
    for split, part in (("training", "train"), ("validation", "val")):
        content = json.loads((shapes / f"instances_{part}.json").read_text())
        for record in content["images"]:
            image = read_image(shapes / "images" / split / record["file_name"])
            bands = np.stack([image[..., i] for i in (2, 1, 0, 0, 1)]).astype(np.uint16) * 19
            record["file_name"] = record["file_name"].replace(".jpg", ".tif")
            path = tmp_path / split / record["file_name"]
            path.parent.mkdir(exist_ok=True)
            with rasterio.open(
                path, "w", driver="GTiff", count=5, height=bands.shape[1], width=bands.shape[2],
                dtype="uint16", crs="EPSG:32633", transform=rasterio.Affine(2, 0, 0, 0, -2, 0),
            ) as file:  # fmt: skip
                file.write(bands)
                file.descriptions = NAMES
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        key = {"train": "TRAIN", "val": "TEST"}[part]
        words += [f"DATASETS.{key}_JSON", tmp_path / f"{part}.json"]
        words += [f"DATASETS.{key}_IMAGES", tmp_path / split]
    return words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_five_bands_of_16_bits(rasters, arguments, root, tmp_path, shapes):
    recipe = str(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml")
    run(arguments(*rasters, "TEST.PICTURES", 1, "SOLVER.MAX_ITER", 3, config_file=recipe))
    assert len(list((tmp_path / "output").rglob("*.png"))) == 1  # drawn from the first bands
    weights = tmp_path / "output/model_final.pth"
    content = read_checkpoint(weights)
    assert content["model"]["backbone.bottom_up.stem.conv1.conv.weight"].shape[1] == 5
    predict = load_predictor(weights, device="cpu")
    assert predict.model.num_channels == 5 and predict.model.band_names == NAMES
    file = next((tmp_path / "validation").glob("*.tif"))
    whole, windows = predict(file, score_thresh=0), predict(file, score_thresh=0, window_px=512)
    assert len(whole) > 0
    np.testing.assert_allclose(windows.scores, whole.scores, atol=1e-6)
    # Bands in another order are taken by their names.
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(file) as opened:
        bands, profile = opened.read(), opened.profile
    order = [4, 2, 0, 1, 3]
    with rasterio.open(tmp_path / "other.tif", "w", **profile) as other:
        other.write(bands[order])
        other.descriptions = [NAMES[i] for i in order]
    named = predict(tmp_path / "other.tif", score_thresh=0, window_px=512)
    np.testing.assert_array_equal(named.boxes, windows.boxes)
    with rasterio.open(tmp_path / "none.tif", "w", **profile) as other:
        other.write(bands)
        other.descriptions = [*NAMES[:4], "swir"]
    with pytest.raises(ValueError, match=r"none.tif has the bands .*swir, the model takes nir"):
        predict(tmp_path / "none.tif", window_px=512)
    with pytest.raises(ValueError, match=r"has 3 bands, the model takes 5 channels"):
        predict(next((shapes / "images/validation").glob("*.jpg")))


def test_settings_that_do_not_fit(make_cfg):
    mean = ("MODEL.PIXEL_MEAN", [1.0] * 5, "MODEL.PIXEL_STD", [1.0] * 5)
    with pytest.raises(ValueError, match="MODEL.PIXEL_MEAN must have 4 elements"):
        make_cfg("INPUT.CHANNELS", 4)
    with pytest.raises(ValueError, match=r"INPUT.CHANNELS must be in \[1, 16\], got 17"):
        make_cfg("INPUT.CHANNELS", 17)
    with pytest.raises(ValueError, match="INPUT.FORMAT must be RGB"):
        make_cfg("INPUT.CHANNELS", 5, *mean, "INPUT.FORMAT", "BGR")
    with pytest.raises(ValueError, match=r"INPUT.BAND_NAMES must be \(\) or 5 different names"):
        make_cfg("INPUT.CHANNELS", 5, *mean, "INPUT.BAND_NAMES", ("a", "b", "a", "c", "d"))


def test_drawings_of_other_channels(make_cfg, tmp_path):
    cfg = make_cfg("INPUT.CHANNELS", 1, "MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [50.0])
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "grey.pth")
    predictor = Predictor(make_cfg(
        "INPUT.CHANNELS", 1, "MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [50.0],
        "MODEL.WEIGHTS", tmp_path / "grey.pth", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    ))  # fmt: skip
    found = predictor(np.zeros((50, 81, 1), np.uint8))
    from spatial_mamba_d2.detection.visualize import draw_instances

    drawing = draw_instances(np.zeros((50, 81, 1), np.uint8), found, predictor.metadata, 0.0)
    assert drawing.shape[2] == 3
