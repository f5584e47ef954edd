"""The import law: which room of the package may import which, and which packages beside."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "spatial_mamba_d2"

# Rooms with a closed list of what they import, beside the standard library.
ROOMS_FOR = {"ops": {"ops"}, "models": {"ops", "models"}}
PACKAGES_FOR = {"ops": {"torch"}, "models": {"torch", "timm", "safetensors"}}
# The other rooms import what they like, but for these.
ROOMS_AGAINST = {
    "data": {"models", "training", "detection", "segmentation", "classification"},
    "explain": {"training", "detection", "segmentation", "classification"},
    "training": {"detection", "segmentation", "classification"},
    "segmentation": {"detection", "classification"},
    "classification": {"detection", "segmentation"},
}
MAY_IMPORT_DETECTRON2 = {"detection", "tools", "tests"}

SOURCES = [
    path.relative_to(ROOT)
    for pattern in ("*.py", "datasets/*.py", *(f"{f}/**/*.py" for f in ("ops", PACKAGE, "tools")))
    for path in sorted(ROOT.glob(pattern))
] + sorted(path.relative_to(ROOT) for path in ROOT.glob("tests/**/*.py"))


def module_of(path: PurePath) -> list[str]:
    """`ops/state_fusion/op.py` -> `["spatial_mamba_d2", "ops", "state_fusion", "op"]`."""
    parts = [*path.parts[:-1], path.stem]
    return [PACKAGE, *parts] if parts[0] == "ops" else parts


def imports_of(path: PurePath, source: str) -> Iterator[list[str]]:
    """All imported names, absolute, wherever in the file they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module_of(path)[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ([*base, alias.name] for alias in node.names)


def violations(path: PurePath, source: str) -> list[str]:
    module = module_of(path)
    room = module[1] if module[0] == PACKAGE else module[0]
    found = []
    for name in imports_of(path, source):
        top, imported_room = name[0], name[1] if len(name) > 1 else ""
        if top in sys.stdlib_module_names:
            continue
        if top == PACKAGE:
            allowed = imported_room in ROOMS_FOR.get(room, {imported_room})
            allowed &= imported_room not in ROOMS_AGAINST.get(room, ())
        elif top == "detectron2":
            allowed = room in MAY_IMPORT_DETECTRON2
        else:
            allowed = top != "tools" and top in PACKAGES_FOR.get(room, {top})
            allowed &= top != "tests" or room == "tests"
        if not allowed:
            found.append(f"{path} imports {'.'.join(name)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_the_import_law_holds(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/state_fusion/op.py", "import timm"),
        ("ops/state_fusion/op.py", "from spatial_mamba_d2.models import variants"),
        ("ops/state_fusion/op.py", "from ...models import variants"),
        ("spatial_mamba_d2/models/spatial_mamba.py", "from spatial_mamba_d2 import data"),
        ("spatial_mamba_d2/data/shapes.py", "def f():\n    import spatial_mamba_d2.models"),
        ("spatial_mamba_d2/segmentation/module.py", "from detectron2.config import CfgNode"),
        ("spatial_mamba_d2/segmentation/module.py", "from ..detection import backbone"),
        ("spatial_mamba_d2/detection/backbone.py", "from tools import train_net"),
        ("tools/train_net.py", "import tests.test_imports"),
    ],
)
def test_a_breach_is_found(path, source):
    assert len(violations(PurePath(path), source)) == 1


def test_importing_the_package_imports_nothing_else():
    script = (
        "import sys; before = set(sys.modules)\n"
        f"import {PACKAGE}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [PACKAGE]
