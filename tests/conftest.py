"""Fixtures that several rooms share: golden values, the checkout, optional real data."""

from __future__ import annotations

import importlib.util
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spatial_mamba_d2.models.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED_DATA = ROOT.parent / "shared" / "data"

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
assert _spec and _spec.loader
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def noise() -> Callable[..., torch.Tensor]:
    """``noise(key, shape)``: the goldens' inputs."""
    return lambda key, shape: torch.from_numpy(_fill.noise(key, shape))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """``golden(file)``: a golden npz (arrays as tensors) or json."""

    def load(name: str) -> dict:
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        with np.load(GOLDEN / name) as content:
            return {key: torch.from_numpy(content[key]) for key in content}

    return load


@pytest.fixture(scope="session")
def official_state(golden) -> Callable[[str], dict[str, torch.Tensor]]:
    """``official_state(model)``: a whole state dict under official names, e.g. ``"tiny"``,
    ``"maskrcnn_tiny"`` or, for the backbone with its output norms, ``"backbone_tiny"``.
    """

    def state(model: str) -> dict[str, torch.Tensor]:
        if model == "backbone_tiny":
            names = golden("official_keys_maskrcnn_tiny.json")["keys"]
            shapes = {
                name.removeprefix("backbone."): shape
                for name, shape in names.items()
                if name.startswith("backbone.")
            }
        else:
            shapes = golden(f"official_keys_{model}.json")["keys"]
        return {name: torch.from_numpy(value) for name, value in _fill.fill(shapes).items()}

    return state


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """210 real COCO images, which are not part of this repository."""
    folder = SHARED_DATA / "coco_mini"
    if not folder.is_dir():
        pytest.skip(f"real COCO images are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def imagenet_mini() -> Path:
    """280 real images of ten classes of ImageNet, which are not part of this repository."""
    folder = SHARED_DATA / "imagenet_mini"
    if not folder.is_dir():
        pytest.skip(f"real ImageNet images are not at {folder}")
    return folder


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Makes the tiny variant narrow and shallow."""
    arguments = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.1}
    monkeypatch.setitem(VARIANTS, "tiny", arguments)


@pytest.fixture(autouse=True)
def quiet_package_logger():
    """What ``setup`` adds to the package's logger goes, so that ``caplog`` sees messages."""
    package = logging.getLogger("spatial_mamba_d2")
    before = list(package.handlers)
    yield
    package.handlers[:] = before


@pytest.fixture
def arguments(overrides) -> Callable[..., Namespace]:
    """``arguments(KEY, VALUE, ..., resume=...)``: what the command line of a training tool gives.

    The room's fixture ``overrides`` comes before.
    """

    def make(*more: object, resume: bool = False) -> Namespace:
        return Namespace(
            config_file=None,
            num_gpus=1,
            num_machines=1,
            machine_rank=0,
            dist_url="auto",
            opts=[*overrides, *(str(word) for word in more)],
            resume=resume,
        )

    return make
