"""Old names of modules keep working, with a warning at the user's line."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_mamba_d2.system import renamed

ROOT = Path(__file__).parents[1]
PACKAGE = "spatial_mamba_d2"


def has_file(name: str) -> bool:
    folder = ROOT if name.startswith("ops.") else ROOT / PACKAGE  # ops/ is installed into it
    path = folder / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("old_name", sorted(renamed.NEW_NAMES))
def test_new_names_are_modules(old_name):
    names = renamed._new_names(f"{PACKAGE}.{old_name}")
    assert names and all(has_file(name.removeprefix(f"{PACKAGE}.")) for name in names)


@pytest.fixture
def forget(monkeypatch):
    """``forget(module)``: as if it had not been imported yet."""

    def forget(name: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            monkeypatch.delattr(sys.modules[parent], child, raising=False)

    return forget


@pytest.mark.parametrize("old_name", sorted(renamed.NEW_NAMES))
def test_old_names_import_with_a_warning(old_name, forget):
    if has_file(old_name):
        pytest.skip(f"{old_name} still has a file")
    old = f"{PACKAGE}.{old_name}"
    new = " and ".join(renamed._new_names(old))
    try:
        modules = renamed._new_modules(old)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    forget(old)
    with pytest.warns(DeprecationWarning, match=rf"^{old} is now {new}; .* removed in 0\.2$"):
        alias = importlib.import_module(old)
    public = {n: module for module in modules for n in vars(module) if not n.startswith("_")}
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {new}"):
        assert all(getattr(alias, name) is getattr(public[name], name) for name in public)
    assert set(dir(alias)) >= set(public)


IMPORTS = [
    "import spatial_mamba_d2.allocator",
    "from spatial_mamba_d2.allocator import keep_freed_memory",
    "from spatial_mamba_d2 import allocator",
    "from spatial_mamba_d2 import allocator as memory",
]


def warnings_of(tmp_path: Path, *files: str) -> list[str]:
    """The lines `FILE:LINE` of the warnings in a process that imports these files in turn."""
    for index, text in enumerate(files):
        (tmp_path / f"user_{index}.py").write_text(text)
    script = "; ".join(f"import user_{index}" for index in range(len(files)))
    run = subprocess.run(
        [sys.executable, "-W", "default::DeprecationWarning", "-c", script],
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in run.stderr.splitlines() if "DeprecationWarning" in line]
    assert all("allocator is now spatial_mamba_d2.system.allocator" in line for line in lines)
    return [":".join(line.split(":")[:2]).rpartition("/")[2] for line in lines]


@pytest.mark.skipif(sys.platform == "win32", reason="colons separate paths and line numbers")
@pytest.mark.parametrize("statement", IMPORTS)
def test_the_warning_is_at_the_line_of_the_import(tmp_path, statement):
    assert warnings_of(tmp_path, f"import os\n\n{statement}\n") == ["user_0.py:3"]


@pytest.mark.skipif(sys.platform == "win32", reason="colons separate paths and line numbers")
def test_every_user_is_warned(tmp_path):
    """Although Python imports a module only once."""
    first, second = (f"{statement}\n" for statement in IMPORTS[:2])
    third = f"{IMPORTS[2]}\nallocator.keep_freed_memory\n"
    assert warnings_of(tmp_path, first, second, second, third) == [
        "user_0.py:1",
        "user_1.py:1",
        "user_2.py:1",
        "user_3.py:2",
    ]


def test_names_that_never_were_are_not_found():
    for name in ("no_such_module", "system.no_such_module", "models.allocator"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"{PACKAGE}.{name}")


def test_attributes_are_exactly_those_of_the_new_module():
    with pytest.warns(DeprecationWarning):
        alias = importlib.import_module(f"{PACKAGE}.allocator")
        assert hasattr(alias, "keep_freed_memory")
    assert not hasattr(alias, "no_such_name")


def test_the_finder_is_installed_once():
    renamed.install()
    assert sys.meta_path.count(renamed.RenamedModuleFinder) == 1
