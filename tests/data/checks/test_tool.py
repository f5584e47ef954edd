"""``tools/check_data.py``: exit codes, the JSON file and the page."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from spatial_mamba_d2.data.checks.tool import run
from spatial_mamba_d2.data.json_file import read_json


def arguments(path: Path, tmp_path: Path, task: str | None = None) -> Namespace:
    return Namespace(
        path=path, task=task, json=tmp_path / "found.json", html=tmp_path / "found.html"
    )


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_clean_data(task, shapes, tmp_path, capsys):
    assert run(arguments(shapes, tmp_path, task)) == 0
    content = read_json(tmp_path / "found.json")
    assert content["format"] == {"detection": "coco", "segmentation": "ade20k"}[task]
    assert content["num_images"] == 17
    assert content["findings"] == []
    if task == "detection":
        instances = [read_json(shapes / f"instances_{split}.json") for split in ("train", "val")]
        ordinary = [a for c in instances for a in c["annotations"] if not a["iscrowd"]]
        assert content["num_objects"] == len(ordinary)
        counted = content["splits"]["train"]["objects_an_image"]
        assert sum(int(k) * v for k, v in counted.items()) == sum(
            content["splits"]["train"]["by_class"]
        )
    assert "findings: 0" in capsys.readouterr().out


def test_findings_and_the_page(shapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    files = sorted((root / "images" / "training").iterdir())
    files[0].unlink()
    shutil.copy(files[1], files[1].with_name("twin.jpg"))
    assert run(arguments(root, tmp_path)) == 1
    content = read_json(tmp_path / "found.json")
    assert {f["kind"] for f in content["findings"]} == {
        "missing image file", "image without entry",
    }  # fmt: skip
    assert all(set(f) == {"kind", "file", "message"} for f in content["findings"])
    page = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert "missing image file" in page and files[0].name in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page), "loads something"
    assert page.count("<img") >= 5 and page.count("<svg") >= 4


def test_unusable_data_are_said_in_the_json_too(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="in no known format"):
        run(arguments(empty, tmp_path))
    (finding,) = read_json(tmp_path / "found.json")["findings"]
    assert finding["kind"] == "unusable data"


@pytest.mark.parametrize("code", [1, 2])
def test_exit_codes(code, root, shapes, tmp_path):
    data = tmp_path / "data"
    if code == 1:
        shutil.copytree(shapes, data)
        next((data / "images" / "training").iterdir()).write_bytes(b"no image")
    command = [sys.executable, root / "tools" / "check_data.py", data]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("error: data: no such file" in done.stderr) == (code == 2)
