"""What label files store: values, palettes, colours; which types are read, and which refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data.class_indices import IGNORE
from spatial_mamba_d2.data.label_conventions import CLASSES, LABEL_MAPS
from spatial_mamba_d2.data.label_format import LabelFormat, build_label_format, parse_label_map
from spatial_mamba_d2.data.label_maps import read_label

NAMES = ("background", "road", "tree, plant")
INDICES = np.array([[0, 1, 2, 2], [2, 0, 1, IGNORE]], np.uint8)


def label_map(text, root=".", names=NAMES):
    return build_label_format(names, 1, (0,), text, root)


@pytest.mark.parametrize(
    "text",
    [
        '7: 0, 11: road, 300: "tree, plant", -1: ignore',
        "7: background\n11: 1\n300: 2\n-1: IGNORE\n",
        "{7: 0; 11: 1; 300: 2; -1: ignore}",
        '{"7": 0, "11": 1,\n "300": 2, "-1": "ignore"}',
        "# our labels\n7: 0\n\n11: 1  \n300: 2\n*: ignore",
    ],
    ids=["names", "lines", "braces", "JSON", "comment and rest"],
)
def test_one_map_in_several_spellings(text, tmp_path):
    stored = np.array([7, 11, 300])[np.minimum(INDICES, 2)]
    stored[INDICES == IGNORE] = -1
    labels = label_map(text)
    assert np.array_equal(labels.to_indices(stored), INDICES)
    (tmp_path / "map.txt").write_text(text, encoding="utf-16")
    assert label_map("map.txt", tmp_path) == labels


def test_comments_behind_entries_and_white_space_around_names(tmp_path):
    text = f"0: {NAMES[0]} # all else\n1: 1\t# a, b\n#804080: 2 #\n#000000: 0\n"
    (tmp_path / "map.txt").write_text(text)
    made = label_map("map.txt", tmp_path)
    assert made.values == ((0, 0), (1, 1)) and made.colors == ((0x804080, 2), (0, 0))
    assert parse_label_map(" voc ", ".", NAMES) == parse_label_map("voc", ".", NAMES)


def test_several_values_and_ranges_become_one_class():
    labels = label_map("0-3: 0, 4..6: ignore, 7: 1, 255: 1, 9: 2")
    stored = np.array([[0, 3, 4, 6, 7, 255, 9]], np.uint8)
    assert labels.to_indices(stored).tolist() == [[0, 0, IGNORE, IGNORE, 1, 1, 2]]
    assert labels.to_stored(np.array([[0, 1, 2]], np.uint8)).tolist() == [[0, 7, 9]]


@pytest.mark.parametrize(
    "text",
    ["#000000: 0, #804080: 1, #0AFFFF: 2", "(0, 0, 0): 0\n[128, 64, 128]: 1\n10 255 255: 2"],
)
def test_colours(text):
    labels = label_map(text)
    colors = np.array([[0, 0, 0], [128, 64, 128], [10, 255, 255]], np.uint8)
    indices = np.array([[0, 1], [2, 2]], np.uint8)
    assert np.array_equal(labels.to_indices(colors[indices]), indices)
    assert np.array_equal(labels.to_stored(indices), colors[indices])
    with pytest.raises(
        ValueError, match=r"label #010000 is impossible: .*LABEL_MAP lists .*#804080"
    ):
        labels.to_indices(np.array([[[1, 0, 0]]], np.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0, 1: 3", r"a class must be 0\.\.2, a name in DATASETS.CLASSES or ignore, got '3'"),
        ("0: 0, 1: rood", "got 'rood'"),
        ("0: 0, 0: 1", "0 is listed twice"),
        ("0-9: 0, 5: 1", "5 is listed twice"),
        ("0 = 0", "must be entries such as .*got '0 = 0'"),
        ("0: 0, x: 1", "got 'x: 1'"),
        ("(0, 300, 0): 0", r"colours must be 0..255, got \(0, 300, 0\)"),
        ("9-3: 0", "from low to high, got 9-3"),
        ("#: 0", "must be entries"),
    ],
)
def test_bad_maps_are_named(text, message):
    with pytest.raises(ValueError, match=f"DATASETS.LABEL_MAP.*{message}"):
        label_map(text)


def test_unknown_values_and_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"label 5 is impossible: .*LABEL_MAP lists .*values 7, 11"
    ):
        label_map("7: 0, 11: 1").to_indices(np.array([[7, 5]]))
    with pytest.raises(FileNotFoundError, match="DATASETS.LABEL_MAP: no such file: .*gone.yaml"):
        label_map("gone.yaml", tmp_path)
    with pytest.raises(ValueError, match='255 is a class of its own: .*LABEL_MAP "0: 0, 255: 1"'):
        LabelFormat(2, 0, ()).to_indices(np.array([[0, 255]], np.uint8))
    with pytest.raises(ValueError, match=r"2\.\.65535 \(background is a class\), got 1"):
        LabelFormat(1)
    with pytest.raises(ValueError, match="no stored value of class 1 to write"):
        label_map("0: 0").to_stored(np.zeros((1, 1), np.uint8))


def test_what_is_written_is_read_back():
    for labels in (LabelFormat(3), LabelFormat(3, 0, (255,)), LabelFormat(3, 1000, ())):
        stored = labels.to_stored(np.array([[0, 1, 2]], np.uint8))
        assert stored.dtype == (np.uint16 if labels.offset == 1000 else np.uint8)
        assert labels.to_indices(stored).tolist() == [[0, 1, 2]]


def test_cityscapes_and_voc_need_no_conversion():
    """Published facts: road is 7 and bicycle 33; VOC's person is 15 and (192, 128, 128)."""
    names, palette = CLASSES["cityscapes"]
    cityscapes = label_map("cityscapes", names=names)
    stored = np.array([[7, 8, 33, 0, 6, 9, 29, 255]], np.uint8)
    expected = [[0, 1, 18, *[IGNORE] * 5]]
    assert cityscapes.to_indices(stored).tolist() == expected
    assert cityscapes.to_indices(np.array([[-1]])).tolist() == [[IGNORE]]
    assert cityscapes.to_stored(np.array([[0, 18]], np.uint8)).tolist() == [[7, 33]]
    assert len(names) == 19 and palette[names.index("car")] == (0, 0, 142)

    names, palette = CLASSES["voc"]
    voc = label_map("voc", names=names)
    person = names.index("person")
    assert person == 15 and palette[person] == (192, 128, 128) and len(names) == 21
    assert voc.to_indices(np.array([[0, 15, 255]], np.uint8)).tolist() == [[0, 15, IGNORE]]
    colors = np.array([[[0, 0, 0], [192, 128, 128], [224, 224, 192]]], np.uint8)
    assert voc.to_indices(colors).tolist() == [[0, 15, IGNORE]]
    assert all(len(dict(values)) == len(values) for pair in LABEL_MAPS.values() for values in pair)


# Files

VALUES = np.array([[0, 1, 2, 3]] * 3, np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return path


def write_big_endian_tiff(path, values):
    """16 bits, which Pillow writes in the order of this machine only."""
    data = values.astype(">u2").tobytes()
    height, width = values.shape
    fields = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1),
              (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data))]  # fmt: skip
    entries = b"".join(
        tag.to_bytes(2, "big")
        + kind.to_bytes(2, "big")
        + (1).to_bytes(4, "big")
        + (value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big"))
        for tag, kind, value in fields
    )
    offset = (8 + len(data)).to_bytes(4, "big")
    path.write_bytes(b"MM\0*" + offset + data + len(fields).to_bytes(2, "big") + entries + bytes(4))
    return path


def write_grey_png(path, values, bits):
    """Fewer bits than 8, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    digits = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    rows = [int(row, 2).to_bytes(len(row) // 8, "big") for row in digits]
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


def palette_png(path, array):
    image = Image.fromarray(array, "L").convert("P")
    image.putdata(array.ravel().tolist())
    image.putpalette([90, 9, 9, 0, 128, 0, 128, 128, 0, 7, 7, 7])
    image.save(path)
    return path


INTEGER_FILES = {
    "8 bits": lambda path: save(path / "a.png", VALUES),
    "16 bits": lambda path: save(path / "a.png", VALUES.astype(np.uint16)),
    "32 bits": lambda path: save(path / "a.tif", VALUES.astype(np.int32)),
    "16 bits, big-endian": lambda path: write_big_endian_tiff(path / "a.tif", VALUES),
    "2 bits": lambda path: write_grey_png(path / "a.png", VALUES, 2),
    "4 bits": lambda path: write_grey_png(path / "a.png", VALUES, 4),
    "palette": lambda path: palette_png(path / "a.png", VALUES),
    "BMP": lambda path: save(path / "a.bmp", VALUES),
}


@pytest.mark.parametrize("name", INTEGER_FILES)
def test_integers_are_read_as_they_are_stored(name, tmp_path):
    stored = read_label(INTEGER_FILES[name](tmp_path))
    assert stored.shape == VALUES.shape and stored.dtype.kind in "iu"
    assert np.array_equal(stored, VALUES)
    assert LabelFormat(4, 0, ()).to_indices(stored).tolist() == VALUES.tolist()


@pytest.mark.parametrize("file", ["a.png", "a.tif", "lzw.tif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6])
def test_labels_are_turned_upright_whatever_the_format(file, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    options = {"compression": "tiff_lzw"} if "lzw" in file else {}
    path = save(tmp_path / file, values, exif=exif, **options)
    upright = {1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 6: np.rot90(values, -1)}
    assert read_label(path).tolist() == upright[orientation].tolist()


def test_1_bit_is_0_and_1(tmp_path):
    mask = (VALUES > 1).astype(np.uint8)
    stored = read_label(save(tmp_path / "a.png", mask * 255, "1"))
    assert stored.dtype == np.uint8 and np.array_equal(stored, mask)


def test_large_values_keep_all_their_bits(tmp_path):
    values = np.array([[0, 70_000, 2**31 - 1]], np.int32)
    stored = read_label(save(tmp_path / "a.tif", values))
    assert label_map("0: 0, 70000: 1, 2147483647: 2").to_indices(stored).tolist() == [[0, 1, 2]]


COLORS = np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 0], [0, 0, 0]]], np.uint8)
OPAQUE = np.dstack([COLORS, np.full(COLORS.shape[:2], 255, np.uint8)])
MAP = "#000000: 0, #800000: 1, #008000: 2"


@pytest.mark.parametrize(
    "array", [COLORS, OPAQUE, COLORS[:, [0, 3]]], ids=["RGB", "opaque RGBA", "only black"]
)
def test_colours_are_read_where_they_have_a_meaning(array, tmp_path):
    labels = label_map(MAP)
    path = save(tmp_path / "a.png", array)
    expected = labels.to_indices(array[..., :3])
    assert np.array_equal(labels.to_indices(read_label(path, labels)), expected)
    with pytest.raises(ValueError, match=r"a\.png .*DATASETS.LABEL_MAP.*#000000: 0"):
        read_label(path)
    # Black alone may be saved as grey or as a palette by a program that saves space.
    grey = save(tmp_path / "grey.png", np.zeros((1, 2), np.uint8))
    assert labels.to_indices(read_label(grey, labels)).tolist() == [[0, 0]]


def test_a_palette_means_colours_if_only_they_are_listed(tmp_path):
    path = palette_png(tmp_path / "a.png", VALUES)
    labels = label_map("#5a0909: 2, #008000: 1, #808000: 0, #070707: ignore")
    assert labels.to_indices(read_label(path, labels))[0].tolist() == [2, 1, 0, IGNORE]
    both = label_map("0: 0, 1: 1, 2: 2, 3: ignore, #ffffff: 0")
    assert both.to_indices(read_label(path, both))[0].tolist() == [0, 1, 2, IGNORE]


def lossy_tiff(path):
    Image.fromarray(COLORS.repeat(8, 0)).save(path / "a.tif", compression="jpeg")
    return path / "a.tif"


def two_pages(path):
    first, second = (Image.fromarray(VALUES) for _ in range(2))
    first.save(path / "a.tif", save_all=True, append_images=[second])
    return path / "a.tif"


TRANSPARENT = np.dstack([COLORS, np.full(COLORS.shape[:2], 9, np.uint8)])
REFUSED = {
    "JPEG": (lambda p: save(p / "a.jpg", VALUES), "is JPEG, a lossy format"),
    "JPEG that is called PNG": (
        lambda p: save(p / "a.png", np.zeros((4, 4), np.uint8), format="JPEG"),
        "is JPEG, a lossy format",
    ),
    "lossy WebP": (lambda p: save(p / "a.webp", COLORS), "is WEBP, a lossy format"),
    "TIFF of JPEG": (lossy_tiff, "is TIFF of jpeg, a lossy format"),
    "fractions": (lambda p: save(p / "a.tif", VALUES.astype(np.float32)), "has fractions"),
    "transparent": (lambda p: save(p / "a.png", TRANSPARENT), "transparent pixels"),
    "CMYK": (lambda p: save(p / "a.tif", COLORS, "CMYK"), "has mode CMYK"),
    "two pages": (two_pages, "must hold one image, and has 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_their_content(name, tmp_path):
    write, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"label file .*/a\.\w+ .*{message}"):
        read_label(write(tmp_path), label_map(MAP))


def test_lossless_webp_and_grey_rgb(tmp_path):
    labels = label_map(MAP)
    path = save(tmp_path / "a.webp", COLORS, lossless=True)
    assert np.array_equal(read_label(path, labels), COLORS)
    grey = save(tmp_path / "b.png", np.dstack([VALUES] * 3))
    with pytest.raises(ValueError, match="channels RGB that are equal: save one of them"):
        read_label(grey)


def test_a_bomb_is_a_fault_that_names_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"label file .*a\.png has too many pixels"):
        read_label(path)
