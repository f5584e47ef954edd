"""Which command installs packages: pip's, or uv's in environments that have no pip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_mamba_d2.system.installer import pip_command

ROOT = Path(__file__).parents[2]
# The installer's command for an exit code that shows what was run
INSTALL = (
    "from spatial_mamba_d2.system import install_detectron2 as installer\n"
    "raise SystemExit(installer.pip('install', '--no-deps', 'some-package'))"
)
UV = f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:])\nsys.exit(3)\n"


@pytest.fixture(scope="module")
def without_pip(tmp_path_factory) -> Path:
    """The Python of an environment as `uv venv` makes it."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(python: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", INSTALL],
        cwd=ROOT, env={"PATH": str(path)}, capture_output=True, text=True,
    )  # fmt: skip


def test_pip_is_used_where_it_is_installed():
    assert pip_command("install", Path("a")) == [sys.executable, "-m", "pip", "install", "a"]


@pytest.mark.skipif(os.name == "nt", reason="a script is no program on Windows")
def test_uv_installs_into_an_environment_without_pip(without_pip, tmp_path):
    uv = tmp_path / "uv"
    uv.write_text(UV)
    uv.chmod(0o755)
    done = install(without_pip, tmp_path)
    shown, ran = done.stdout.splitlines()
    arguments = f"pip install --python {without_pip} --no-deps some-package"
    assert (shown, ran) == (f"$ {uv} {arguments}", arguments)
    assert done.returncode == 3


def test_without_both_the_error_names_pip(without_pip, tmp_path):
    done = install(without_pip, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("No module named pip")
