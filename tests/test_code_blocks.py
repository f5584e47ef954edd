"""The code in the documentation: Python runs, and tools accept the commands that are shown.

A command is parsed by the tool's own parser, and its configuration is loaded, but it does not run:
what tools do is tested elsewhere, and full trainings take days.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_mamba_d2 import hub
from spatial_mamba_d2.__main__ import find_tools
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.system.package_files import find_recipe

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md", "CONTRIBUTING.md", "datasets/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")),
]  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TASK_OF_TOOL = {
    "train_net": "detection", "visualize": "detection",
    "train_seg": "segmentation", "visualize_seg": "segmentation",
    "train_cls": "classification", "visualize_cls": "classification",
}  # fmt: skip
pytestmark = [
    pytest.mark.docs,
    pytest.mark.skipif(
        not (ROOT / "README.md").is_file(), reason="not a checkout: README.md is missing"
    ),
]


def blocks(page: str, language: str) -> Iterator[tuple[int, str]]:
    """Line and text of each block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[1] == language:
            yield text[: match.start()].count("\n") + 2, match[2]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where it stands, and the words, of each command that starts something of ours."""
    for page in PAGES:
        for line, text in blocks(page, ""):
            for command in text.replace("\\\n", " ").splitlines():
                command = command.partition("   #")[0].removesuffix("&").strip()
                if re.match(r"(SMD2_\w+=\S+ )?(python3? |spatial-mamba-d2 )", command):
                    if "..." not in command:
                        words = shlex.split(command)
                        yield f"{page}:{line}", words[1:] if "=" in words[0] else words


COMMANDS = list(commands())


class Parsed(Exception):
    """Carries the options of a tool out of it."""


def options_of(script: Path, words: list[str], monkeypatch) -> argparse.Namespace:
    """What the parser of a tool makes of ``words``; it does nothing else.

    Raises:
        SystemExit: it does not accept them.
    """
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    # Of the class itself: a parser of ours that calls it first does its own part afterwards.
    from spatial_mamba_d2.system import cli

    ours = cli._KeyValueParser.parse_args

    def parsed_by_ours(self, args=None, namespace=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            raise Parsed(ours(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(cli._KeyValueParser, "parse_args", parsed_by_ours)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Parsed as found:
        return found.args[0]
    raise AssertionError(f"{script} has parsed nothing")


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[f"{p}-{w[1]}" for p, w in COMMANDS])
def test_tools_accept_what_is_shown(place, words, monkeypatch, capsys):
    program, name, *rest = words
    if program == "spatial-mamba-d2":
        script = find_tools()[name]
    elif name == "-m":
        name, *rest = rest
        script = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        assert script.is_file() or name == "pytest", name
        if name != "spatial_mamba_d2.doctor":
            return
    else:
        script = ROOT / name
    assert script.is_file()
    try:
        options = options_of(script, rest, monkeypatch)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    if script.stem in TASK_OF_TOOL and options.config_file:
        module = f"spatial_mamba_d2.{TASK_OF_TOOL[script.stem]}.config"
        try:
            load_config = importlib.import_module(module).load_config
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed")
        recipe = find_recipe(options.config_file)
        if recipe.parent.name == "configs":  # others are made by earlier commands
            load_config(recipe, ["MODEL.DEVICE", "cpu", *options.opts])


def test_a_wrong_command_is_refused(monkeypatch, capsys):
    for words in (["--wieghts", "x"], ["--weights", "x", "--input", "y"]):
        with pytest.raises(SystemExit):
            options_of(ROOT / "tools/predict.py", words, monkeypatch)
    assert len(COMMANDS) > 50


@pytest.fixture(scope="module")
def files(tmp_path_factory, official_state) -> Path:
    """A folder with what the pages name."""
    for package in ("detectron2", "lightning"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from spatial_mamba_d2.detection import build_model as build_detector
    from spatial_mamba_d2.detection.config import load_config as detection_config
    from spatial_mamba_d2.segmentation.config import load_config as segmentation_config
    from spatial_mamba_d2.segmentation.module import build_model as build_segmentor

    folder = tmp_path_factory.mktemp("pages")
    torch.save({"model": official_state("tiny")}, folder / "spatialmamba_tiny.pth")
    pixels = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    (folder / "configs").symlink_to(ROOT / "configs")
    kinds = {
        "output/demo/model_final.pth": (
            detection_config, build_detector, "demo_mask_rcnn_spatial_mamba_t.yaml"
        ),
        "output/upernet/best.ckpt": (
            segmentation_config, build_segmentor, "demo_upernet_spatial_mamba_t.yaml"
        ),
    }  # fmt: skip
    for name, (load_config, build, recipe) in kinds.items():
        cfg = load_config(ROOT / "configs" / recipe, ["MODEL.DEVICE", "cpu"])
        (folder / name).parent.mkdir(parents=True)
        torch.save({"model": build(cfg).state_dict(), "config": cfg.dump()}, folder / name)
        (folder / name).with_name("config.yaml").write_text(cfg.dump())
    hub.save_pretrained(build_classifier("tiny", 3), folder / "my-classifier")
    return folder


PYTHON = [page for page in PAGES if next(blocks(page, "python"), None)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page, files, monkeypatch, capsys):
    """The blocks of a page one after the other, as a reader would paste them."""
    monkeypatch.chdir(files)
    uploads = []
    monkeypatch.setattr(hub, "push_to_hub", lambda *words, **options: uploads.append(words))
    names: dict = {"__name__": "__page__"}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, str(ROOT / page), "exec"), names)
    assert page != "docs/library.md" or len(uploads) == 1
