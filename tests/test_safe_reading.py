"""Every kind of file from elsewhere has one place that reads it; nothing else may.

Those places bound what a file can make of it, run no code from it, and name it in their errors.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_imports import ROOT, SOURCES

PACKAGE = "spatial_mamba_d2"

# What reads a file -> the files that may use it. A name ends a dotted call: "Image.open" is also
# PIL.Image.open.
READERS: dict[tuple[str, ...], set[str]] = {
    ("torch.load", "load_file", "safe_open", "UnpicklingError"): {
        f"{PACKAGE}/models/checkpoints/reading.py"
    },
    # They read checkpoints themselves: timm, torch.hub, PyTorch's scripts and exported programs.
    ("load_checkpoint", "load_state_dict_from_url", "load_pretrained", "hub.load", "jit.load",
     "export.load"): {f"{PACKAGE}/export/formats.py"},  # a file that it has just written
    ("np.load", "numpy.load", "np.fromfile", "np.loadtxt", "np.genfromtxt"): {
        f"{PACKAGE}/prediction/parts.py",  # of an unfinished run, without pickled objects
    },
    ("json.load", "json.loads"): {
        f"{PACKAGE}/data/json_file.py",
        # Files that this package has written, in the cache and in OUTPUT_DIR; damage is expected.
        f"{PACKAGE}/system/once.py",
        "ops/cuda/cache.py",
        f"{PACKAGE}/training/run_folder.py",
        f"{PACKAGE}/prediction/parts.py",
        f"{PACKAGE}/export/formats.py",
        f"{PACKAGE}/doctor.py",  # what pip has recorded about this package
    },
    ("yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.unsafe_load", "load_yaml_with_base",
     "merge_from_file"): {
        f"{PACKAGE}/system/yaml_file.py",
        f"{PACKAGE}/training/resuming.py",  # config.yaml of an earlier run, and cfg.dump()
    },
    ("Image.open", "ImageFile.Parser"): {
        f"{PACKAGE}/data/pixels.py",
        f"{PACKAGE}/data/label_maps.py",
    },
    ("cv2.imread", "cv2.imdecode", "cv2.imreadmulti", "imageio.imread", "plt.imread",
     "decode_image"): {f"{PACKAGE}/data/pixels.py"},
    ("cv2.imwrite",): set(),  # encode_image: any path, and errors with a reason
    ("ElementTree.parse", "ElementTree.fromstring", "ElementTree.XML", "iterparse"): {
        f"{PACKAGE}/data/formats/voc.py"
    },
    ("ZipFile", "unpack_archive", "tarfile.open"): {
        f"{PACKAGE}/models/checkpoints/reading.py",
        f"{PACKAGE}/data/ade20k.py",
        f"{PACKAGE}/prediction/archives.py",
    },
}  # fmt: skip
BUILT_IN = {"eval", "exec", "__import__"}
LAST_PARTS = {reader.rsplit(".", 1)[-1] for readers in READERS for reader in readers} | BUILT_IN
CODE_RUNNING_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

OURS = [path for path in SOURCES if path.parts[0] in (PACKAGE, "ops", "tools", "datasets")]


def names_in(tree: ast.AST):
    """The dotted names that a file uses: what is called, or passed on to be called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts:
            yield ".".join([node.id if isinstance(node, ast.Name) else "", *reversed(parts)])


def violations(source: str, path: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    for name in names_in(tree):
        if name.rsplit(".", 1)[-1] not in LAST_PARTS:
            continue
        for readers, places in READERS.items():
            if path not in places and any(f".{name}".endswith(f".{reader}") for reader in readers):
                found.append(f"{path}: {name}")
        if name in BUILT_IN:
            found.append(f"{path}: {name}")
    for node in ast.walk(tree):
        modules = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [f"{path}: import {m}" for m in modules if m in CODE_RUNNING_MODULES]
    return found


def test_files_are_read_where_they_are_checked():
    assert len(OURS) > 100
    found = [
        line
        for path in OURS
        for line in violations((ROOT / path).read_text(encoding="utf-8"), path.as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import pickle",
        "from pickle import loads",
        "import json\nwith open(p) as f:\n    json.load(f)",
        "read = map(json.loads, lines)",
        "import yaml\nyaml.safe_load(text)",
        "cfg.merge_from_file(path)",
        "from PIL import Image\nImage.open(path)",
        "import PIL.Image\nPIL.Image.open(path)",
        "cv2.imread(path)",
        "np.load(path, allow_pickle=True)",
        "timm.models.load_checkpoint(model, path)",
        "eval(text)",
    ],
)
def test_the_scan_finds(source):
    assert violations(source, "tools/new.py")


def test_the_places_exist():
    for places in READERS.values():
        assert all(Path(ROOT, place).is_file() for place in places)
