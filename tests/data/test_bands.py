"""Images with other numbers of channels than 3: all of them, in their order, or a refusal."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data.images import read_image, read_size
from spatial_mamba_d2.data.pixels import ImageFormatError, PixelRange
from tests.data.stored_images import EIGHT, SIXTEEN, scaled, write_tiff

HAS_RASTERIO = importlib.util.find_spec("rasterio") is not None


@pytest.mark.parametrize("stored", [EIGHT, SIXTEEN])
@pytest.mark.parametrize(
    "options", [{"extra": [0]}, {}, {"order": ">"}, {"photometric": 1, "extra": [0] * 3}]
)
def test_a_fourth_band_is_never_dropped(options, stored, tmp_path):
    path = write_tiff(tmp_path / "a.tif", stored[..., :4], **options)
    for read in (read_image, read_size):
        with pytest.raises(ImageFormatError, match=r"a\.tif has 4 bands .*the model takes 3"):
            read(path)
    expected = EIGHT if stored is EIGHT else scaled(stored)
    assert (read_image(path, 4) == expected[..., :4]).all()


def test_a_fourth_band_in_a_plane_of_its_own(tmp_path):
    path = write_tiff(tmp_path / "a.tif", EIGHT[..., :4], planar=True, extra=[0])
    assert (read_image(path, 4) == EIGHT[..., :4]).all()


def test_declared_alpha_is_dropped(tmp_path):
    path = write_tiff(tmp_path / "a.tif", EIGHT[..., :4], extra=[2])
    assert (read_image(path) == EIGHT[..., :3]).all()
    assert (read_image(path, 4) == EIGHT[..., :4]).all()


@pytest.mark.parametrize("stored", [EIGHT, SIXTEEN])
@pytest.mark.parametrize("num_bands", [2, 5, 6])
def test_bands_that_opencv_does_not_keep_need_rasterio(num_bands, stored, tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", stored[..., :num_bands], extra=[0] * (num_bands - 1))
    with pytest.raises(ValueError, match=r"image file .*a\.tif .*bands"):
        read_image(path, 3)
    if HAS_RASTERIO:
        expected = EIGHT if stored is EIGHT else scaled(stored)
        assert (read_image(path, num_bands) == expected[..., :num_bands]).all()
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImageFormatError, match=rf"a\.tif has {num_bands} bands: without rasterio"):
        read_image(path, num_bands)


@pytest.mark.skipif(not HAS_RASTERIO, reason="rasterio is not installed")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_sixteen_bands(dtype, tmp_path):
    stored = np.random.default_rng(0).integers(0, 200, (9, 7, 16)).astype(dtype)
    path = write_tiff(tmp_path / "a.tif", stored, photometric=1, extra=[0] * 15)
    value_range = None if dtype == np.uint8 else PixelRange(0, 255)
    assert (read_image(path, 16, value_range) == stored).all()
    many = np.concatenate([stored, stored[..., :1]], axis=2)
    path = write_tiff(tmp_path / "b.tif", many, photometric=1, extra=[0] * 16)
    with pytest.raises(ImageFormatError, match="has 17 bands; at most 16 can be read"):
        read_image(path, 17, value_range)


def test_other_numbers_of_channels(tmp_path):
    Image.fromarray(EIGHT[..., :3]).save(tmp_path / "rgb.png")
    Image.fromarray(EIGHT[..., 0]).save(tmp_path / "grey.png")
    luminance = np.array(Image.fromarray(EIGHT[..., :3]).convert("L"))
    assert (read_image(tmp_path / "rgb.png", 1)[..., 0] == luminance).all()
    assert (read_image(tmp_path / "grey.png", 1) == EIGHT[..., :1]).all()
    for name in ("rgb", "grey"):
        for num_channels in (2, 4, 5):
            with pytest.raises(ImageFormatError, match=rf"the model takes {num_channels} channels"):
                read_image(tmp_path / f"{name}.png", num_channels)
