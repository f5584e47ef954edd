"""Mean and standard deviation of images, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data import pixel_statistics
from spatial_mamba_d2.data.pixel_statistics import measure_pixels, statistics_as_keys
from spatial_mamba_d2.data.pixels import PixelRange
from tests.data.stored_images import SIXTEEN, write_tiff


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for number in range(7):
        image = rng.integers(0, 40 * (number + 1) // 2, (9 + number, 20, 3), dtype=np.uint8)
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
    return files


def test_all_pixels_count_alike(files):
    pixels = np.concatenate([np.array(Image.open(file)).reshape(-1, 3) for file in files])
    mean, std = measure_pixels(files)
    assert mean == pytest.approx(pixels.mean(axis=0)) and std == pytest.approx(pixels.std(axis=0))
    text = "({:.2f}, {:.2f}, {:.2f})".format(*mean)
    assert f'pixels of 7 images: MODEL.PIXEL_MEAN "{text}" MODEL.PIXEL_STD "(' in (
        statistics_as_keys(files)
    )


def test_some_of_many_images(files, monkeypatch):
    """The first, the last, and evenly spaced ones between them."""
    monkeypatch.setattr(pixel_statistics, "MAX_IMAGES", 3)
    expected = measure_pixels([files[0], files[3], files[6]])
    assert np.array_equal(measure_pixels(files), expected)
    assert statistics_as_keys(files).startswith("pixels of 3 images")


def test_bands_of_16_bits_by_their_range(tmp_path):
    """As the network will see them."""
    file = write_tiff(tmp_path / "a.tif", SIXTEEN[..., :4], extra=[0])
    mean, _ = measure_pixels([file], 4, PixelRange(0, 65535))
    assert mean == pytest.approx(SIXTEEN[..., :4].mean(axis=(0, 1)) / 257, abs=0.3)
