"""The import rules: one ordered list of subpackages, low to high; nobody imports upward."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "spatial_mamba_d2"

# Low to high. What stands on one level does not import each other; everything may import what
# stands on the levels below. CONTRIBUTING.md shows this list; change both together.
LEVELS = (
    ("ops", "system"),
    ("models", "data"),
    ("config", "export"),
    ("training", "evaluation", "prediction", "explain"),
    ("segmentation", "classification", "detection"),
    ("model_zoo", "doctor"),
    ("model_card",),
    ("hub", "deploy", "finetuning", "reporting", "profiling", "serving"),
    ("configs", "tools", "datasets", "examples", "docs", "dev", "setup", "__main__"),
    ("tests",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Packages that a subpackage may import, in addition to the standard library; others are free.
PACKAGES_FOR = {"ops": {"torch"}, "models": {"torch", "timm", "safetensors"}}
# Packages that only these subpackages import.
ONLY = {
    "detectron2": {"configs", "detection", "tests"},
    "lightning": {"training", "segmentation", "classification", "tests"},
}
LEVEL["__init__"] = 1  # of the package itself: it installs the old names of moved modules

SOURCES = [
    Path(name)
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.splitlines()
    if (ROOT / name).is_file()
] or [
    path.relative_to(ROOT)
    for pattern in (
        "*.py", *(f"{top}/**/*.py" for top in ("configs", "ops", PACKAGE, "tools", "tests"))
    )
    for path in sorted(ROOT.glob(pattern))
]  # fmt: skip


def module_of(path: PurePath) -> list[str]:
    """`ops/state_fusion/op.py` -> `["spatial_mamba_d2", "ops", "state_fusion", "op"]`."""
    parts = [*path.parts[:-1], path.stem]
    return [PACKAGE, *parts] if parts[0] == "ops" else parts


def place_of(module: list[str]) -> str:
    """The entry of the list that a module belongs to."""
    return module[1] if module[0] == PACKAGE and len(module) > 1 else module[0]


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
    place = place_of(module_of(path))
    if place not in LEVEL:
        return [f"{path} is in no entry of LEVELS"]
    found = []
    for name in imports_of(path, source):
        top = name[0]
        if top in sys.stdlib_module_names:
            continue
        imported = place_of(name) if top == PACKAGE else top
        if imported == "__version__" or name == [PACKAGE]:
            continue
        if imported in LEVEL:
            allowed = imported == place or LEVEL[imported] < LEVEL[place]
        elif top == PACKAGE:
            allowed = False  # a name that is no entry
        else:
            allowed = top in PACKAGES_FOR.get(place, {top})
            allowed &= place in ONLY.get(top, {place})
        if not allowed:
            found.append(f"{path} imports {'.'.join(name)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_the_import_rules_hold(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/state_fusion/op.py", "import timm"),
        ("ops/state_fusion/op.py", "from spatial_mamba_d2.models import variants"),
        ("ops/state_fusion/op.py", "from ...models import variants"),
        ("spatial_mamba_d2/models/spatial_mamba.py", "from spatial_mamba_d2 import data"),
        ("spatial_mamba_d2/data/shapes.py", "def f():\n    import spatial_mamba_d2.models"),
        ("spatial_mamba_d2/data/shapes.py", "import lightning"),
        ("spatial_mamba_d2/explain/states.py", "import spatial_mamba_d2.training"),
        ("spatial_mamba_d2/explain/states.py", "from lightning.pytorch import Trainer"),
        ("spatial_mamba_d2/training/fit.py", "from spatial_mamba_d2.profiling import model_size"),
        ("spatial_mamba_d2/system/atomic.py", "from spatial_mamba_d2.config import load"),
        ("spatial_mamba_d2/segmentation/module.py", "from detectron2.config import CfgNode"),
        ("spatial_mamba_d2/segmentation/module.py", "from ..detection import backbone"),
        ("spatial_mamba_d2/detection/backbone.py", "from tools import train_net"),
        ("spatial_mamba_d2/model_zoo.py", "from spatial_mamba_d2.profiling import flops"),
        ("spatial_mamba_d2/model_zoo.py", "from spatial_mamba_d2 import benchmark"),
        ("tools/train_net.py", "import tests.test_imports"),
        ("spatial_mamba_d2/loose.py", ""),
        ("spatial_mamba_d2/misc/loose.py", ""),
        ("scripts/loose.py", ""),
    ],
)
def test_a_violation_is_found(path, source):
    assert len(violations(PurePath(path), source)) == 1


def test_contributing_shows_the_list():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]
    names = [name.strip(" `/") for line in shown for name in line.split(",")]
    package = [name for level in LEVELS[:8] for name in level]
    assert [name for name in names if name in package] == package


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
