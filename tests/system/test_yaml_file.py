"""Configuration files: what is no plain mapping is named, and so is a chain of bases."""

from __future__ import annotations

import codecs

import pytest

from spatial_mamba_d2.system.yaml_file import read_yaml

# 40 lines, each of which has the value of the line before twice
DOUBLING = "A0: &a0 1\n" + "".join(f"A{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- SEED: 1\n", "must hold KEY: VALUE, got list"),
        ("SEED = 1\n", "must hold KEY: VALUE, got str 'SEED = 1'"),
        ("SEED: 1\nSEED: 2\n", "not plain YAML: SEED occurs twice, in lines 1 and 2"),
        (
            "SOLVER:\n  BASE_LR: 1\nSOLVER:\n  GAMMA: 1\n",
            "not plain YAML: SOLVER occurs twice, in lines 1 and 3",
        ),
        ("SOLVER:\n\tBASE_LR: 1\n", r"not plain YAML: .*'\\t' that cannot start any token"),
        ("A: 1\n---\nA: 2\n", "not plain YAML: expected a single document"),
        ("SEED: !!python/name:os.system\n", "not plain YAML: .*python/name:os.system"),
        ("SEED: !my 1\n", "not plain YAML: .*!my"),
        ("[A, B]: 1\n", "not plain YAML: .*line 1: not a key"),
        ("SEED: 2024-99-99\n", "not plain YAML"),
        (f"SEED: {'[' * 1000}\n", "nested too deeply|not plain YAML"),
        ("SOLVER: &s\n  BASE_LR: *s\n", r"not plain YAML: a value contains itself, by an alias"),
        ("A: &a [1, [*a]]\n", r"not plain YAML: a value contains itself, by an alias"),
        (DOUBLING, "not plain YAML: must have at most 100000 values; aliases"),
        (
            "A: !!python/object/apply:eval ['[[2 ** n] for n in (5, 6)]']\n",
            r"not plain YAML: .*object/apply:eval.* runs code, which is refused; write the values",
        ),
        ("_BASE_: 3\n", "_BASE_ must name a file or a list of files, got 3"),
        ("_BASE_: https://host/a.yaml\n", "_BASE_ must name a file"),
        ("_BASE_: .\n", "_BASE_: must be a file, got the folder /"),
        ("_BASE_: my.yaml\n", "_BASE_ leads back to the file itself: .*my.yaml -> .*my.yaml"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    path = tmp_path / "my.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)my.yaml: {message}"):
        read_yaml(path)


def test_a_loop_of_several_files(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: [c.yaml]\n")
    (tmp_path / "c.yaml").write_text(f"_BASE_: ../{tmp_path.name}/a.yaml\n")
    with pytest.raises(ValueError, match=r"a.yaml -> .*b.yaml -> .*c.yaml -> .*a.yaml"):
        read_yaml(tmp_path / "a.yaml")


def test_missing_files_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("_BASE_: sub/b.yaml\n")
    with pytest.raises(FileNotFoundError, match=rf"a.yaml: _BASE_: .*: {tmp_path}/sub/b.yaml"):
        read_yaml("a.yaml")
    with pytest.raises(FileNotFoundError, match=f"config file: no such file: {tmp_path}/c.yaml"):
        read_yaml("c.yaml")
    with pytest.raises(ValueError, match=f"config file: must be a file, got the folder {tmp_path}"):
        read_yaml(tmp_path)


def test_bases_come_first_and_may_be_shared(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: [b.yaml, c.yaml]\nA: 1\n")
    (tmp_path / "b.yaml").write_text("_BASE_: c.yaml\nB: 2\n")
    (tmp_path / "c.yaml").write_text("C: 3\n")
    documents = read_yaml(tmp_path / "a.yaml")
    assert [content for _, content in documents] == [{"C": 3}, {"B": 2}, {"C": 3}, {"A": 1}]
    assert [path.name for path, _ in documents] == ["c.yaml", "b.yaml", "c.yaml", "a.yaml"]


def test_aliases_repeat_values(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("A: &a {B: [1, 2]}\nC: *a\nD: [*a, *a]\n")
    a = {"B": [1, 2]}
    assert read_yaml(path)[0].content == {"A": a, "C": a, "D": [a, a]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_unicode(tmp_path, encoding):
    path = tmp_path / "my.yaml"
    path.write_bytes("OUTPUT_DIR: Übung\n".encode(encoding))
    assert read_yaml(path)[0].content == {"OUTPUT_DIR": "Übung"}


def test_another_encoding(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes("OUTPUT_DIR: Übung\n".encode("latin-1"))
    with pytest.raises(ValueError, match="my.yaml: must be text in UTF-8"):
        read_yaml(path)
    path.write_bytes(codecs.BOM_UTF16_LE + b"a")
    with pytest.raises(ValueError, match="my.yaml: must be text in UTF-8"):
        read_yaml(path)
