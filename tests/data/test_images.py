"""Image files: one reader, one orientation, errors that name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data.images import (
    find_images,
    open_image,
    read_image,
    read_size,
    visualize_images,
    write_image,
)


def truncated(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[:-600])
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
def test_read_image_gives_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 5, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert (image == 255).all()


def test_read_image_keeps_the_order_of_channels(tmp_path):
    Image.new("RGB", (5, 3), (10, 20, 30)).save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png")[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_read_image_refuses_a_truncated_file(tmp_path, suffix):
    path = truncated(tmp_path / f"image.{suffix}")
    with pytest.raises(ValueError, match=rf"image\.{suffix} cannot be decoded: .*truncated"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_read_image_refuses_what_is_no_image(tmp_path, content):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image\.jpg cannot be decoded: ."):
        read_image(path)


def test_read_image_refuses_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image file .*gone\.jpg"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="cannot be decoded: "):
        read_image(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_one_orientation_for_pixels_and_size(tmp_path, orientation):
    image = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif)
    expected = (40, 20) if orientation >= 5 else (20, 40)
    assert read_image(tmp_path / "turned.jpg").shape[:2] == expected
    assert read_size(tmp_path / "turned.jpg") == expected
    assert open_image(tmp_path / "turned.jpg", upright=False).size == (40, 20)


def test_the_size_of_a_broken_file_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image file .*a.jpg cannot be decoded"):
        read_size(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match="no image file .*absent.jpg"):
        read_size(tmp_path / "absent.jpg")


def test_inputs_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*absent"):
        find_images([tmp_path / "absent"])
    with pytest.raises(FileNotFoundError, match="no image in"):
        find_images([tmp_path])


def test_a_broken_image_among_others(tmp_path, capsys):
    folder = tmp_path / "photos"
    for name in ("a", "c"):
        write_image(folder / f"{name}.png", np.full((4, 6, 3), 7, np.uint8))
    (folder / "b.png").write_bytes(b"no image")

    def draw(image, path):
        assert path == tmp_path / "drawn" / path.name
        return image + 1, "nothing"

    written = visualize_images([folder], tmp_path / "drawn", lambda: draw)
    assert [path.name for path in written] == ["a.png", "c.png"]
    assert (read_image(written[0]) == 8).all()
    out = capsys.readouterr().out
    assert f"skipped: image file {folder / 'b.png'} cannot be decoded" in out
    assert f"{folder / 'a.png'}: nothing -> {written[0]}" in out
    assert out.endswith(f"2 images in {tmp_path / 'drawn'}, 1 skipped\n")
