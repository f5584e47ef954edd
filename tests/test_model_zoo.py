"""The published models: their figures are consistent, and they can be built and loaded."""

from __future__ import annotations

import hashlib

import pytest
import torch

from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.models.checkpoints.convert import save_official
from spatial_mamba_d2.models.checkpoints.reading import WeightsError

TASKS = list(model_zoo.TASKS)


def test_lists():
    assert [len(model_zoo.list_models(task)) for task in TASKS] == [3, 5, 3]
    assert sum((model_zoo.list_models(task) for task in TASKS), []) == model_zoo.list_models()
    with pytest.raises(ValueError, match="task must be one of .*, got 'tracking'"):
        model_zoo.list_models("tracking")
    with pytest.raises(ValueError, match="name must be one of .*, got 'resnet50'"):
        model_zoo.get_entry("resnet50")


@pytest.mark.parametrize("entry", model_zoo.ENTRIES.values(), ids=lambda entry: entry.name)
def test_entries_are_consistent(entry):
    assert round(entry.parameters / 1e6) == entry.published_parameters_m
    assert len(entry.scores) == len(model_zoo.TASKS[entry.task].metrics)
    assert entry.license == "Apache-2.0" and "EdwardChasel" in entry.source
    head = entry.config_file.read_text().partition("MODEL:")[0]  # states the same scores
    assert all(str(score) in head for score in entry.scores)


@pytest.mark.parametrize("name", model_zoo.list_models())
def test_recipes_are_of_the_variant(name):
    entry = model_zoo.get_entry(name)
    needed = {"detection": "detectron2"}.get(entry.task, "fvcore")
    pytest.importorskip(needed, reason=f"{needed} is not installed")
    cfg = model_zoo.get_config(name, ["SEED", "5"])
    assert cfg.MODEL.SPATIAL_MAMBA.VARIANT == entry.variant and cfg.SEED == 5


@pytest.fixture(scope="module")
def folder(official_state, tmp_path_factory):
    """Official tiny checkpoints under the zoo's names."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, keys in (
        ("spatial_mamba_t", "tiny"),
        ("mask_rcnn_spatial_mamba_t", "maskrcnn_tiny"),
        ("upernet_spatial_mamba_t", "upernet_tiny"),
    ):
        wrapper = "model" if keys == "tiny" else "state_dict"
        torch.save({wrapper: official_state(keys)}, folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize(
    "name", ["spatial_mamba_t", "mask_rcnn_spatial_mamba_t", "upernet_spatial_mamba_t"]
)
def test_get_from_file_and_folder(name, folder, tmp_path):
    if name.startswith("mask"):
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    path = folder / f"{name}.pth"
    model = model_zoo.get(name, folder)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == model_zoo.ENTRIES[name].parameters
    save_official(model, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    (wrapper,) = again.keys() - {"meta"}
    original = torch.load(path, weights_only=True)[wrapper]
    assert again[wrapper].keys() == original.keys()
    assert all(torch.equal(value, original[key]) for key, value in again[wrapper].items())


def test_hashes_are_verified(folder):
    path = folder / "spatial_mamba_t.pth"
    model_zoo.get("spatial_mamba_t", path, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(WeightsError, match="its SHA-256 is"):
        model_zoo.get("spatial_mamba_t", path, "0" * 64)


def test_a_missing_or_unfitting_checkpoint_is_an_error(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spatial_mamba_s.safetensors or .*README of http"):
        model_zoo.get("spatial_mamba_s", folder)
    with pytest.raises(WeightsError, match="does not fit SpatialMambaClassifier"):
        model_zoo.get("spatial_mamba_s", folder / "spatial_mamba_t.pth")
    with pytest.raises(ValueError, match="must hold all parameters of UPerNet"):
        model_zoo.get("upernet_spatial_mamba_t", folder / "spatial_mamba_t.pth")


def test_the_readme_has_these_tables(root):
    path = root / "README.md"
    if not path.is_file():
        pytest.skip("this is no checkout: README.md is absent")
    readme = path.read_text(encoding="utf-8")
    begin, end = model_zoo.BEGIN, model_zoo.END
    assert readme.count(begin) == readme.count(end) == 1
    between = readme.partition(begin)[2].partition(end)[0]
    message = "paste the output of `python -m spatial_mamba_d2.model_zoo` there"
    assert between.strip() == model_zoo.markdown_tables(), message
