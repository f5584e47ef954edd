"""What image files of every depth and number of channels are read as: exact values, or refusals."""

from __future__ import annotations

import importlib.util
import struct
import zlib

import cv2
import numpy as np
import PIL
import pytest
from PIL import Image

from spatial_mamba_d2.data.images import open_image, orientation_hint, read_image, read_size
from spatial_mamba_d2.data.pixels import ImageFormatError, PixelRange, build_pixel_range
from tests.data.stored_images import EIGHT, SIXTEEN, scaled, write_tiff

ALL = PixelRange(0, 65535)
HAS_RASTERIO = importlib.util.find_spec("rasterio") is not None


def grey(values):
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("value_range", [None, PixelRange(1000, 50000)])
def test_16_bits_are_scaled_exactly(suffix, value_range, tmp_path):
    path = tmp_path / f"a.{suffix}"
    limits = value_range or (0, 65535)
    cv2.imwrite(str(path), SIXTEEN[..., 0])
    image = read_image(path, value_range=value_range)
    assert image.dtype == np.uint8 and image.flags.writeable
    assert (image == grey(scaled(SIXTEEN[..., 0], *limits))).all()
    cv2.imwrite(str(path), SIXTEEN[..., [2, 1, 0]])
    assert (read_image(path, value_range=value_range) == scaled(SIXTEEN[..., :3], *limits)).all()
    assert read_size(path) == (5, 7)


def test_the_ends_of_the_range_are_black_and_white(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 32768, 65535]], np.uint16))
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 128, 255]


def write_png(path, pixels, color_type, transparent=b""):
    """A PNG of ``uint16[H, W, bands]``; Pillow and OpenCV cannot write every kind."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("color_type", "bands"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_every_kind_of_png_with_16_bits(color_type, bands, tmp_path):
    pixels = SIXTEEN[..., :bands]
    colors = bands - (color_type in (4, 6))
    expected = np.broadcast_to(scaled(pixels[..., :colors]), (5, 7, 3))
    for transparent in ("", pixels[0, 0].astype(">u2").tobytes()):
        if transparent and color_type > 2:
            continue
        write_png(tmp_path / "a.png", pixels, color_type, transparent)
        assert (read_image(tmp_path / "a.png") == expected).all()
        assert (read_image(tmp_path / "a.png", bands) == scaled(pixels)).all()


def test_16_bits_with_alpha(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), SIXTEEN[..., [2, 1, 0, 3]])
    assert (read_image(tmp_path / "a.png") == scaled(SIXTEEN[..., :3])).all()
    assert (read_image(tmp_path / "a.png", 4) == scaled(SIXTEEN[..., :4])).all()
    write_tiff(tmp_path / "a.tif", SIXTEEN[..., :4], extra=[2])
    assert (read_image(tmp_path / "a.tif") == scaled(SIXTEEN[..., :3])).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": ">"},
        {"planar": True},
        {"big": True},
        {"big": True, "order": ">"},
        {"photometric": 1, "extra": [0, 0]},
        {"photometric": 1},
    ],
)
@pytest.mark.parametrize("stored", [EIGHT, SIXTEEN])
def test_tiff_however_it_is_written(options, stored, tmp_path):
    expected = EIGHT if stored is EIGHT else scaled(stored)
    path = write_tiff(tmp_path / "a.tif", stored[..., :3], **options)
    if stored is SIXTEEN and "planar" in options and not HAS_RASTERIO:
        with pytest.raises(ImageFormatError, match="stored pixel by pixel"):
            read_image(path)
        return
    assert (read_image(path) == expected[..., :3]).all()
    if "photometric" not in options:
        path = write_tiff(tmp_path / "a.tif", stored[..., 0], **options)
        assert (read_image(path) == grey(expected[..., 0])).all()


@pytest.mark.parametrize("stored", [EIGHT, SIXTEEN])
def test_grey_in_which_0_is_white(stored, tmp_path):
    path = write_tiff(tmp_path / "a.tif", stored[..., 0], photometric=0)
    expected = 255 - (EIGHT if stored is EIGHT else scaled(stored))[..., 0]
    assert (read_image(path) == grey(expected)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["8.jpg", "8.png", "16.png", "8.tif", "16.tif"])
def test_one_orientation_whatever_the_depth(name, orientation, tmp_path):
    path, stored = tmp_path / name, SIXTEEN[..., 0] if "16" in name else EIGHT[..., 0]
    if path.suffix == ".tif":
        write_tiff(path, stored, tags={274: orientation})
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(path, exif=exif)
    upright = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: x[::-1, ::-1],
        4: np.flipud,
        5: np.transpose,
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].T,
        8: lambda x: np.rot90(x, 1),
    }[orientation](stored)
    expected = scaled(upright) if "16" in name else upright
    image = read_image(path)[..., 0]
    assert image.shape == read_size(path) == expected.shape
    # JPEG changes the values a little.
    assert np.abs(image.astype(int) - expected).max() <= (40 if path.suffix == ".jpg" else 0)


@pytest.mark.parametrize("type_", ["float32", "float64", "int16", "int32", "uint32", "int8"])
def test_other_types_need_a_range(type_, tmp_path):
    stored = (SIXTEEN[..., 0].astype(np.int64) % 200 - 100).astype(type_)
    if type_ == "uint32":
        stored = SIXTEEN[..., 0].astype(type_)
    path = write_tiff(tmp_path / "a.tif", stored)
    for read in (read_image, read_size):
        with pytest.raises(ImageFormatError, match=r"a\.tif has .*INPUT\.PIXEL_RANGE"):
            read(path)
    image = read_image(path, value_range=PixelRange(-50, 90))
    assert (image == grey(scaled(stored, -50, 90))).all()


@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_32_bits_without_sign(bands, order, tmp_path):
    stored = SIXTEEN[..., :bands].astype(np.uint32) * 65537  # 0 .. 2^32 - 1
    path = write_tiff(tmp_path / "a.tif", stored, order=order)
    image = read_image(path, bands, value_range=PixelRange(0, 2**32 - 1))
    assert stored.max() > 2**31 and (image == scaled(stored, 0, 2**32 - 1)).all()


def test_float_colors(tmp_path):
    stored = SIXTEEN[..., :3].astype(np.float32) / 65535
    path = write_tiff(tmp_path / "a.tif", stored)  # OpenCV before 5 writes rounded colours, LogLuv
    image = read_image(path, value_range=PixelRange(0, 1))
    assert (image == scaled(stored, 0, 1)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    stored = np.zeros((3, 4), np.float32)
    stored[1, 1] = value
    path = write_tiff(tmp_path / "a.tif", stored)
    with pytest.raises(ImageFormatError, match=r"a\.tif has values that are not finite"):
        read_image(path, value_range=PixelRange(0, 1))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 4095), (3300, 4180), (0, 1023), (0, 16383), (30000, 32000)]
)
def test_a_small_part_of_16_bits_is_refused_unless_a_range_is_given(low, high, tmp_path):
    stored = np.linspace(low, high, 35).astype(np.uint16).reshape(5, 7)
    cv2.imwrite(str(tmp_path / "a.png"), stored)
    message = rf"a\.png has 16 bits of which it uses {low}\.\.{high} only.*INPUT\.PIXEL_RANGE"
    with pytest.raises(ImageFormatError, match=message):
        read_image(tmp_path / "a.png")
    own = PixelRange(low, high)
    image = read_image(tmp_path / "a.png", value_range=own)
    assert (image == grey(scaled(stored, *own))).all() and (image.min(), image.max()) == (0, 255)
    assert (read_image(tmp_path / "a.png", value_range=ALL) == grey(scaled(stored))).all()


@pytest.mark.parametrize("value", [0, 65535])
def test_a_blank_image_of_16_bits_is_one(value, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((3, 4), value, np.uint16))
    assert (read_image(tmp_path / "a.png") == value // 257).all()


def test_a_range_that_makes_all_white_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[300, 60000]], np.uint16))
    with pytest.raises(ImageFormatError, match=r"all white by INPUT\.PIXEL_RANGE \(0, 255\)"):
        read_image(tmp_path / "a.png", value_range=PixelRange(0, 255))


@pytest.mark.parametrize(
    ("stored", "value_range", "what"),
    [
        (np.array([[0, 4095]], np.uint16), (9000, 54000), "all black"),
        (np.array([[0, 1]], np.float32), (1, 255), "all black"),
        (np.array([[0, 1]], np.float32), (0, 255), "nearly uniform"),
        (np.array([[2, 3]], np.float32), (0, 1), "all white"),
    ],
)
def test_a_range_that_leaves_one_step_is_refused(stored, value_range, what, tmp_path):
    path = write_tiff(tmp_path / "a.tif", stored)
    for read in (read_image, read_size):
        with pytest.raises(ImageFormatError, match=rf"{what} by INPUT\.PIXEL_RANGE"):
            read(path, value_range=PixelRange(*value_range))
    own = PixelRange(*map(float, stored[0]))
    assert read_image(path, value_range=own)[0, :, 0].tolist() == [0, 255]
    uniform = write_tiff(tmp_path / "a.tif", stored[:, :1])
    assert read_image(uniform, value_range=own)[0, :, 0].tolist() == [0]


def test_the_check_of_sizes_decodes_what_values_decide(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 4095]], np.uint16))
    with pytest.raises(ImageFormatError, match=r"uses 0\.\.4095 only"):
        read_size(tmp_path / "a.png")
    assert read_size(tmp_path / "a.png", value_range=PixelRange(0, 4095)) == (1, 2)


def test_orientation_of_png_wherever_it_is_stored(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(EIGHT[..., :3])
    image.save(tmp_path / "first.png", exif=exif)
    content = (tmp_path / "first.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, rest = content[start:end], content[:start] + content[end:]
    last = rest.index(b"IEND") - 4
    (tmp_path / "last.png").write_bytes(rest[:last] + chunk + rest[last:])
    for name in ("first.png", "last.png"):
        assert read_size(tmp_path / name) == (7, 5)
        assert (read_image(tmp_path / name) == np.rot90(EIGHT[..., :3], -1)).all()

    def fail(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert read_size(tmp_path / "first.png") == (7, 5)


def test_netpbm_colors_of_16_bits_are_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535\n" + bytes([1, 0, 2, 0, 3, 0]))
    for read in (read_image, read_size):
        with pytest.raises(ImageFormatError, match="colours of 16 bits"):
            read(tmp_path / "a.ppm")
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 255\n" + bytes([1, 2, 3]))
    assert read_image(tmp_path / "a.ppm").tolist() == [[[1, 2, 3]]]


def test_8_bits_know_no_range(tmp_path):
    Image.fromarray(EIGHT[..., :3]).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", value_range=PixelRange(0, 4095)) == EIGHT[..., :3]).all()


def test_palettes_one_bit_and_alpha(tmp_path):
    colors = [[255, 0, 0], [0, 255, 0], [1, 2, 3]]
    indices = np.array([[0, 1, 2, 2]], np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette([channel for color in colors for channel in color])
    image.save(tmp_path / "p.png", transparency=0)
    assert (read_image(tmp_path / "p.png")[0] == np.array(colors)[[0, 1, 2, 2]]).all()
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png")[0, :, 1].tolist() == [255, 0]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.tif", compression="group4")
    assert read_image(tmp_path / "1.tif")[0, :, 1].tolist() == [255, 0]
    for suffix in ("png", "tif", "webp"):
        path = tmp_path / f"rgba.{suffix}"
        Image.fromarray(EIGHT[..., :4]).save(path, **({"lossless": True, "exact": True}))
        assert (read_image(path) == EIGHT[..., :3]).all()
    Image.fromarray(EIGHT[..., :2], "LA").save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png") == grey(EIGHT[..., 0])).all()
    assert (read_image(tmp_path / "la.png", 2) == EIGHT[..., :2]).all()


def test_cmyk_and_ycbcr(tmp_path):
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 100, 50], np.uint8)
    for mode in ("CMYK", "YCbCr"):
        for suffix, options in (("tif", {"compression": "tiff_lzw"}), ("jpg", {"quality": 100})):
            Image.fromarray(flat).convert(mode).save(tmp_path / f"a.{suffix}", **options)
            assert np.abs(read_image(tmp_path / f"a.{suffix}").astype(int) - flat).max() <= 3
    path = write_tiff(tmp_path / "k.tif", EIGHT[..., :4], photometric=5)
    assert (
        read_image(path) == np.array(Image.fromarray(EIGHT[..., :4], "CMYK").convert("RGB"))
    ).all()
    with pytest.raises(ImageFormatError, match="CMYK"):
        read_image(write_tiff(path, SIXTEEN[..., :4], photometric=5))
    with pytest.raises(ImageFormatError, match="LAB"):
        read_image(write_tiff(path, EIGHT[..., :3], photometric=8))


def test_ycbcr_without_compression(tmp_path):
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 100, 50], np.uint8)
    image = Image.fromarray(flat)
    image.convert("YCbCr").save(tmp_path / "a.tif")
    image.convert("CMYK").save(tmp_path / "b.tif")
    assert np.abs(read_image(tmp_path / "b.tif").astype(int) - flat).max() <= 3
    if int(PIL.__version__.split(".")[0]) >= 13:
        assert np.abs(read_image(tmp_path / "a.tif").astype(int) - flat).max() <= 3
        return
    for read in (read_image, read_size):
        with pytest.raises(ImageFormatError, match=r"a\.tif has YCbCr .*version 13"):
            read(tmp_path / "a.tif")


def test_stacks_and_animations_are_refused(tmp_path):
    page = EIGHT[..., :3]
    with pytest.raises(ImageFormatError, match="holds 2 images"):
        read_image(write_tiff(tmp_path / "a.tif", page, page))
    # An overview, or a preview, is another size of the same image.
    assert (read_image(write_tiff(tmp_path / "a.tif", page, page[::2, ::2])) == page).all()
    frames = [Image.fromarray(frame) for frame in (page, 255 - page)]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageFormatError, match="holds 2 images"):
            read_image(path)
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.jpg").shape == (5, 7, 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_that_are_cut_off(suffix, channels, tmp_path):
    path = tmp_path / f"a.{suffix}"
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 65536, (64, 64, channels), dtype=np.uint16)
    write_tiff(path, stored) if suffix == "tif" else cv2.imwrite(str(path), stored)
    content = path.read_bytes()
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=rf"image file .*a\.{suffix} cannot be decoded"):
            read_image(path)


def test_headers_of_tiff_that_lie(tmp_path):
    path = write_tiff(tmp_path / "a.tif", EIGHT[..., :3], tags={274: 9})
    assert (read_image(path) == EIGHT[..., :3]).all()
    with pytest.raises(ImageFormatError, match="has values of 12 bits"):
        read_image(write_tiff(path, SIXTEEN[..., 0], tags={258: 12}))
    content = write_tiff(path, SIXTEEN[..., 0]).read_bytes()
    start = 8
    for number in (b"\xff\xff", b"\x00\x00"):  # of fields
        path.write_bytes(content[:start] + number + content[start + 2 :])
        with pytest.raises(ValueError, match=r"image file .*a\.tif cannot be decoded"):
            read_image(path)
    # A page that is the next one of itself
    (num_fields,) = struct.unpack("<H", content[start : start + 2])
    following = start + 2 + 12 * num_fields
    path.write_bytes(content[:following] + struct.pack("<I", start) + content[following + 4 :])
    with pytest.raises(ImageFormatError, match="holds 100 images"):
        read_image(path)


def test_classification_reads_depths_too(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), SIXTEEN[..., 0])
    image = open_image(tmp_path / "a.png", upright=False)
    assert image.mode == "RGB" and (np.array(image) == grey(scaled(SIXTEEN[..., 0]))).all()


def test_the_range_is_checked():
    assert build_pixel_range(()) is None
    assert build_pixel_range((0, 4095)) == PixelRange(0.0, 4095.0)
    for wrong in [(0,), (1, 1), (2, 1), (0, float("nan")), ("a", "b"), (0, 1, 2)]:
        with pytest.raises(ValueError, match=r"INPUT\.PIXEL_RANGE must be \(\) or \(low, high\)"):
            build_pixel_range(wrong)


def test_the_orientation_is_named_where_it_explains_a_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(EIGHT[..., :3]).save(tmp_path / "a.jpg", exif=exif)
    hint = orientation_hint(tmp_path / "a.jpg", (5, 7))
    assert "stored as 5x7" in hint and "EXIF orientation 6" in hint
    assert orientation_hint(tmp_path / "a.jpg") == hint
    assert orientation_hint(tmp_path / "a.jpg", (6, 7)) == ""
    Image.fromarray(EIGHT[..., :3]).save(tmp_path / "b.jpg")
    assert orientation_hint(tmp_path / "b.jpg") == orientation_hint(tmp_path / "gone.jpg") == ""
