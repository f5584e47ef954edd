"""JSON files: encodings, and errors that name the file."""

from __future__ import annotations

import codecs
import math

import pytest

from spatial_mamba_d2.data.json_file import read_json

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_of_unicode(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('{"name": "Größe 高さ", "id": 3}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"name": "Größe 高さ", "id": 3}


def test_a_big_endian_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF16_BE + '["ä"]'.encode("utf-16-be"))
    assert read_json(tmp_path / "a.json") == ["ä"]


def test_numbers_that_are_not_finite_are_left_to_the_reader(tmp_path):
    (tmp_path / "a.json").write_text("[NaN, Infinity]")
    value, infinity = read_json(tmp_path / "a.json")
    assert math.isnan(value) and infinity == math.inf


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON, or cut off: the file is empty"),
        (b"\xef\xbb\xbf", "not JSON, or cut off"),
        (b'{"images": [', "not JSON, or cut off"),
        (b'{"name": "Gr\xf6\xdfe"}', "not in UTF-8 or UTF-16"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"9" * 5000, "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x1f\x8b\x08\x00", "unpack it"),
    ],
)
def test_what_is_no_json_is_an_error_that_names_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}"):
        read_json(tmp_path / "a.json")


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.json"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path)
