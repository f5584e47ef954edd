#!/usr/bin/env python3
"""Set up this checkout in .venv and work in it.

    python3 dev.py demo [KEY VALUE ...]       train, evaluate and draw on generated sample data
    python3 dev.py demo-seg [KEY VALUE ...]   the same for semantic segmentation
    python3 dev.py demo-cls [KEY VALUE ...]   the same for classification
    python3 dev.py test [pytest args]         run the tests
    python3 dev.py lint [paths]               check style and types
    python3 dev.py cuda-report                registers, occupancy, DRAM bytes of the CUDA kernels
    python3 dev.py setup                      install again, after adding a compiler for example

Needs Python 3.10 to 3.13 and nothing else; git, a C++ compiler and a GPU are used where they are.
The first call installs; later ones skip that until the sources it depends on change. Any call can
be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
WINDOWS = os.name == "nt"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
PIP_INSTALL = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check")
STAMP = VENV / "installed.sha256"

OLDEST, NEWEST = (3, 10), (3, 13)
BUILD_TOOLS = ("setuptools>=77,<81", "wheel", "ninja", "torch", "torchvision")
DETECTRON2_GIT = "https://github.com/facebookresearch/detectron2"
DETECTRON2_COMMIT = "a59f05630a8f205756064244bf5beb8661f96180"
# That commit as a wheel on PyPI, but for three small edits: needs neither git nor a compiler. It
# is tagged for Python 3.10, and pure Python but for a compiled _C that belongs to another PyTorch.
DETECTRON2_WHEEL = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


def call(*command: object) -> int:
    """Print a command, run it in the checkout, return its exit code as a shell would."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    code = subprocess.run(words, cwd=ROOT).returncode
    return code if code >= 0 else 128 - code


def run(*command: object) -> None:
    """As `call`, but end with the command's exit code if it fails."""
    if code := call(*command):
        sys.exit(code)


def succeeds(*command: object, timeout: float | None = None) -> bool:
    """Whether a command exits with 0, in silence and in `timeout` seconds."""
    words = [str(word) for word in command]
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # else git may ask for a password
    null = subprocess.DEVNULL
    try:
        done = subprocess.run(words, env=env, timeout=timeout, stdout=null, stderr=null)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def check_python() -> None:
    here = sys.version_info[:2]
    if not OLDEST <= here <= NEWEST:
        sys.exit(
            f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is required, this is {here[0]}.{here[1]}: "
            f"run this file with another interpreter, for example python3.{NEWEST[1]} dev.py"
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        sys.exit(
            "This Python has no venv or no ensurepip module. "
            f"On Debian and Ubuntu: sudo apt install python{here[0]}.{here[1]}-venv"
        )


def native_sources() -> list[Path]:
    """The files under ops/ that get compiled."""
    suffixes = {".cpp", ".cu", ".cuh", ".h"}
    return sorted(path for path in ROOT.glob("ops/**/*") if path.suffix in suffixes)


def fingerprint() -> str:
    """A hash of all that the installation depends on."""
    digest = hashlib.sha256()
    names = ("dev.py", "pyproject.toml", "setup.py", "spatial_mamba_d2/system/cuda_toolkit.py")
    for path in (*(ROOT / name for name in names), *native_sources()):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_installed() -> bool:
    return PYTHON.exists() and STAMP.is_file() and STAMP.read_text() == fingerprint()


def site_packages() -> Path:
    return next(VENV.glob("Lib/site-packages" if WINDOWS else "lib/python3*/site-packages"))


def prepare_venv() -> None:
    """Make the environment, or repair one that an interruption left half-made."""
    if not succeeds(PYTHON, "-c", ""):
        run(sys.executable, "-m", "venv", "--clear", VENV)
    # pip writes RECORD last: a distribution without one was cut off, and pip would keep it so.
    for info in site_packages().glob("*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)
    if not any(site_packages().glob("pip-*.dist-info")):
        run(PYTHON, "-m", "ensurepip", "--upgrade", "--default-pip")


def can_build_detectron2() -> bool:
    """Whether upstream is within reach; its setup.py always compiles C++."""
    compiler = os.environ.get("CXX") or ("cl" if WINDOWS else "c++")
    return bool(
        shutil.which("git")
        and shutil.which(compiler)
        and succeeds("git", "ls-remote", DETECTRON2_GIT, "HEAD", timeout=10)
    )


def install_detectron2() -> None:
    """Keep a working Detectron2, else install upstream's sources, else the wheel from PyPI."""
    if succeeds(PYTHON, "-c", "import detectron2.engine"):
        return
    # pyproject.toml lists what Detectron2 needs, hence --no-deps.
    source = f"detectron2 @ git+{DETECTRON2_GIT}@{DETECTRON2_COMMIT}"
    if can_build_detectron2() and (
        call(*PIP_INSTALL, "--no-deps", "--no-build-isolation", source) == 0
    ):
        return
    target, requirement = VENV / "detectron2", VENV / "detectron2.txt"
    requirement.write_text(f"{DETECTRON2_WHEEL} --hash=sha256:{DETECTRON2_SHA256}\n")
    run(
        *(*PIP_INSTALL, "--no-deps", "--only-binary=:all:", "--python-version", "3.10"),
        *("--upgrade", "--target", target, "-r", requirement),
    )
    for library in target.glob("detectron2/_C.*"):
        library.unlink()
    # Only now does Python see it: an interrupted installation stays invisible.
    (site_packages() / "detectron2.pth").write_text(f"{target}\n")


def install() -> None:
    wanted = fingerprint()
    STAMP.unlink(missing_ok=True)
    prepare_venv()
    run(*PIP_INSTALL, *BUILD_TOOLS)
    run(*PIP_INSTALL, "--no-build-isolation", "--editable", ".[dev]")
    install_detectron2()
    STAMP.write_text(wanted)


def demo(args: list[str]) -> None:
    run_demo("tools/train_net.py", "configs/demo_mask_rcnn_spatial_mamba_t.yaml", "demo", args)


def demo_seg(args: list[str]) -> None:
    run_demo("tools/train_seg.py", "configs/demo_upernet_spatial_mamba_t.yaml", "demo_seg", args)


def demo_cls(args: list[str]) -> None:
    config = "configs/demo_spatial_mamba_t.yaml"
    run_demo("tools/train_cls.py", config, "demo_cls", args, data="prepare_shape_classes.py")


def run_demo(
    tool: str, config: str, name: str, args: list[str], data: str = "prepare_shapes.py"
) -> None:
    overrides = ["OUTPUT_DIR", f"output/{name}", *args]
    run(PYTHON, f"datasets/{data}")
    run(PYTHON, tool, "--config-file", config, "--resume", *overrides)
    output = dict(zip(overrides[::2], overrides[1::2], strict=True))["OUTPUT_DIR"]
    print(f"Scores, checkpoints and pictures are in {ROOT / output}")


def test(args: list[str]) -> None:
    run(PYTHON, "-m", "pytest", *args)


def lint(args: list[str]) -> None:
    run(PYTHON, "-m", "ruff", "check", *args)
    run(PYTHON, "-m", "ruff", "format", "--check", *args)
    if sources := [*native_sources(), *sorted(ROOT.glob("tests/cuda_emulator/*.*"))]:
        run(PYTHON.with_name("clang-format"), "--dry-run", "--Werror", *sources)
    # ops/ is spatial_mamba_d2.ops once built, so a built copy is what gets its types checked.
    copy = ROOT / "build/lint"
    shutil.rmtree(copy, ignore_errors=True)
    run(PYTHON, "setup.py", "--quiet", "build_py", "--build-lib", copy)
    run(PYTHON, "-m", "mypy", copy / "spatial_mamba_d2", "dev.py")


def cuda_report(args: list[str]) -> None:
    run(PYTHON, "tools/cuda_report.py", *args)


def setup(args: list[str]) -> None:
    install()


COMMANDS = {
    c.__name__.replace("_", "-"): c
    for c in (demo, demo_seg, demo_cls, test, lint, cuda_report, setup)
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("args", nargs=argparse.REMAINDER, help="passed on")
    options = parser.parse_args(argv)
    command = COMMANDS[options.command]
    check_python()
    try:
        if command is not setup and not is_installed():
            install()
        command(options.args)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
