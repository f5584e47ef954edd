"""Results: a name for each input, and no file written over."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data import images
from spatial_mamba_d2.data.images import (
    Drawer,
    find_images,
    naming_file,
    read_image,
    read_size,
    visualize_images,
    write_image,
)
from spatial_mamba_d2.data.outputs import check_outputs, name_outputs
from spatial_mamba_d2.data.pixels import PixelRange


def photo(path, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(path)
    return path


def draw(image, path):
    """A drawing of the image's own first value, and labels of one more."""
    write_image(path.with_name(f"{path.name}_label.png"), image[..., 0] + 1)
    return image, "drawn"


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_tree_stays_a_tree(tmp_path):
    for value, name in enumerate(("x.jpg", "a/x.jpg", "a/b/x.jpg", "c d/ä.png")):
        photo(tmp_path / "in" / name, 10 * value)
    written = visualize_images([tmp_path / "in"], tmp_path / "out", lambda: draw)
    names = ["a/b/x.png", "a/x.png", "c d/ä.png", "x.png"]
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in written) == names
    assert [read_image(tmp_path / "out" / n).mean() for n in names] == [20, 10, 30, 0]
    labels = [n.replace(".png", "_label.png") for n in names]
    assert tree(tmp_path / "out") == sorted(names + labels)


def test_equal_names_in_several_inputs(tmp_path):
    photo(tmp_path / "cam1/0001.png", 1), photo(tmp_path / "cam2/0001.png", 2)
    for inputs in (["cam1", "cam2"], ["cam1/0001.png", "cam2/0001.png"], ["cam1/0001.png", "cam2"]):
        out = tmp_path / "out" / str(len(os.listdir(tmp_path)))
        visualize_images([tmp_path / i for i in inputs], out, lambda: draw, overwrite=True)
        assert [read_image(out / f"cam{i}/0001.png").mean() for i in (1, 2)] == [1, 2]


def test_files_of_one_folder_need_no_folder(tmp_path):
    files = [photo(tmp_path / name) for name in ("a.png", "b.png")]
    visualize_images(files, tmp_path / "out", lambda: draw)
    assert tree(tmp_path / "out") == ["a.png", "a_label.png", "b.png", "b_label.png"]


def test_an_input_that_is_named_twice_is_drawn_once(tmp_path):
    file = photo(tmp_path / "in/a.png")
    assert len(visualize_images([file, tmp_path / "in"], tmp_path / "out", lambda: draw)) == 1


CLASHES = {
    "suffixes": ["x.jpg", "x.png"],
    "label": ["x.png", "x_label.png"],
    "both": ["x.jpg", "x.png", "x_label.png", "x_label_label.jpg"],
    "dots": ["x.y.jpg", "x.y.png", "x.jpg"],
}


@pytest.mark.parametrize("names", CLASHES.values(), ids=CLASHES)
def test_equal_stems_keep_their_suffix(names, tmp_path):
    for value, name in enumerate(names):
        photo(tmp_path / "in" / name, 10 * value)
    written = visualize_images([tmp_path / "in"], tmp_path / "out", lambda: draw)
    assert len(set(written)) == len(names)
    assert len(tree(tmp_path / "out")) == 2 * len(names)
    order = [sorted(names).index(name) for name in names]
    for value, index in enumerate(order):
        # JPEG keeps a flat image as it is.
        assert abs(read_image(written[index]).mean() - 10 * value) <= 1
        label = written[index].with_name(f"{written[index].stem}_label.png")
        assert abs(read_image(label).mean() - 10 * value - 1) <= 1


def test_names_that_clash_on_some_file_systems_are_told_apart():
    root = Path("/in")
    named = name_outputs([root / "x.jpg", root / "X.png"], root, Path("out"), [".png"])
    assert named == [Path("out/x.jpg"), Path("out/X.png")]
    named = name_outputs([root / "x.jpg", root / "X.JPG"], root, Path("out"), [".png"])
    assert named == [Path("out/x.jpg"), Path("out/X.JPG-2")]


def refuse(*args, match, **kwargs):
    with pytest.raises(ValueError, match=match):
        visualize_images(*args, lambda: pytest.fail("a model was loaded"), **kwargs)


def test_no_input_is_written_over_however_it_is_spelled(tmp_path, monkeypatch):
    file = photo(tmp_path / "in/x.png", 9)
    before = file.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.makedirs(tmp_path / "hard")
    os.link(file, tmp_path / "hard/x.png")
    (tmp_path / "soft").mkdir()
    (tmp_path / "soft/x.png").symlink_to(file)
    monkeypatch.chdir(tmp_path / "in")
    folder = tmp_path / "in"
    for inputs, output in [
        ([folder], folder),
        ([folder], tmp_path / "link"),
        ([tmp_path / "link"], folder),
        ([folder], Path()),
        ([folder], tmp_path / "hard/../in"),
        ([folder], tmp_path / "new/../in"),
        ([folder], tmp_path / "new/../hard"),
        ([folder], tmp_path / "hard"),
        ([folder], tmp_path / "soft"),
        ([file], folder),
        ([Path("x.png")], Path()),
        ([tmp_path / "soft/x.png"], folder),
    ]:
        for overwrite in (False, True):
            refuse(inputs, output, overwrite=overwrite, match=r"x\.png")
    assert file.read_bytes() == before and not file.is_symlink()


def test_what_exists_is_replaced_only_when_told(tmp_path):
    photo(tmp_path / "in/a.png", 3), photo(tmp_path / "in/b.png", 4)
    out = tmp_path / "out"
    photo(out / "b_label.png", 200)
    message = r"1 files exist already; .*--overwrite\n  .*b_label\.png"
    refuse([tmp_path / "in"], out, match=message)
    assert tree(out) == ["b_label.png"] and read_image(out / "b_label.png").mean() == 200
    visualize_images([tmp_path / "in"], out, lambda: draw, overwrite=True)
    assert read_image(out / "b_label.png").mean() == 5


def test_drawings_below_the_inputs_are_not_drawn_again(tmp_path):
    photo(tmp_path / "in/a.png")
    for overwrite in (False, True):
        out = tmp_path / "in/drawn"
        assert len(visualize_images([out.parent], out, lambda: draw, overwrite=overwrite)) == 1


def test_an_output_that_cannot_be_a_folder(tmp_path):
    file = photo(tmp_path / "in/a.png")
    refuse([tmp_path / "in"], file, match="must be a folder, and is a file")
    refuse([tmp_path / "in"], file / "deeper", match="must be a folder, and is a file")


def test_litter_is_passed_over_and_other_files_are_counted(tmp_path, capsys):
    photo(tmp_path / "in/a.png")
    for name in (
        ".DS_Store", "Thumbs.db", "._a.png", ".hidden.png", ".hidden/b.png", "__MACOSX/c.png",
        "clip.mp4", "sub/other.mp4", "IMG.HEIC", "notes.txt", "README",
    ):  # fmt: skip
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert find_images([tmp_path / "in"]) == [tmp_path / "in/a.png"]
    said = "passed over, no images: 5 files (2 .mp4, 1 .heic, 1 no suffix, 1 .txt)"
    assert capsys.readouterr().out == said + "\n"
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image in .*passed over.*\(2 \.mp4"):
        find_images([tmp_path / "in"])


def test_links(tmp_path, capsys):
    photo(tmp_path / "real/a.png"), (tmp_path / "in").mkdir()
    (tmp_path / "in/folder").symlink_to(tmp_path / "real")
    (tmp_path / "real/circle").symlink_to(tmp_path / "real")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nowhere.png")
    written = visualize_images([tmp_path / "in"], tmp_path / "out", lambda: draw)
    assert written == [tmp_path / "out/folder/a.png"]
    assert f"skipped: no image file {tmp_path / 'in/gone.png'}" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"gone\.png is a link to .*nowhere\.png"):
        find_images([tmp_path / "in/gone.png"])


def test_nothing_drawn_is_an_error(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 1 files could be read as an image"):
        visualize_images([tmp_path / "clip.mp4"], tmp_path / "out", lambda: draw)


def test_a_drawer_says_how_its_images_are_read(tmp_path):
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "a.png")
    drawer = Drawer(lambda image, path: (image, "drawn"), 3, PixelRange(0, 4095))
    (path,) = visualize_images([tmp_path / "a.png"], tmp_path / "out", lambda: drawer)
    assert read_image(path)[0, :, 0].tolist() == [0, 255]


def test_an_image_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = photo(tmp_path / "ä/a.png", 1)
    before = path.read_bytes()

    def fail(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"cannot write image .*a\.png: .*No space left"):
        write_image(path, np.zeros((2, 2, 3), np.uint8))
    assert path.read_bytes() == before and tree(tmp_path) == ["ä/a.png"]
    with pytest.raises(OSError, match=r"cannot write image .*a\.unknown"):
        write_image(tmp_path / "a.unknown", np.zeros((2, 2, 3), np.uint8))


def test_too_many_pixels_are_named_for_every_kind_of_file(tmp_path, monkeypatch):
    big = tmp_path / "map.png"
    Image.new("1", (14000, 13000)).save(big)
    tiff = photo(tmp_path / "a.tif")
    for read in (read_image, read_size):
        with pytest.raises(ValueError, match=r"image file .*map\.png .*SMD2_MAX_PIXELS"):
            read(big)
    with pytest.raises(ValueError, match=r"label file .*map\.png .*SMD2_MAX_PIXELS"):
        with naming_file("label", big), Image.open(big):
            pass
    limit = Image.MAX_IMAGE_PIXELS
    try:
        monkeypatch.setenv("SMD2_MAX_PIXELS", "200000000")
        assert read_size(big) == (13000, 14000)
        monkeypatch.setenv("SMD2_MAX_PIXELS", "20")
        with pytest.raises(ValueError, match=r"a\.tif has 4 x 6 pixels; at most 20"):
            read_image(tiff)
        monkeypatch.setenv("SMD2_MAX_PIXELS", "many")
        with pytest.raises(ValueError, match="SMD2_MAX_PIXELS must be an integer above 0"):
            images.max_pixels()
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_check_outputs_takes_any_files(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    (tmp_path / "b.pth").symlink_to(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"b\.pth would be written over the input .*a\.pth"):
        check_outputs([tmp_path / "b.pth"], [tmp_path / "a.pth"], overwrite=True)
    check_outputs([tmp_path / "new/c.pth"], [tmp_path / "a.pth"])
