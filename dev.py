#!/usr/bin/env python3
"""Set up this checkout in .venv, and work in it.

    python3 dev.py demo [KEY VALUE ...]       train and evaluate a detector on generated sample data
    python3 dev.py demo-seg [KEY VALUE ...]   the same for semantic segmentation
    python3 dev.py demo-cls [KEY VALUE ...]   the same for classification
    python3 dev.py test [pytest args]         run all tests, in several processes, or those given
    python3 dev.py lint [paths]               check style and types
    python3 dev.py docs                       build the documentation site in build/site
    python3 dev.py wheels [--output dist]     build and check the sdist and a wheel
    python3 dev.py cuda-report                registers, occupancy, DRAM bytes of the CUDA kernels
    python3 dev.py setup                      install again, for example after adding a compiler

Requires Python 3.10 to 3.13 and nothing else; uses git, a C++ compiler and a GPU if present. The
first call installs; later calls install again only if the sources that the installation depends on
have changed. Any call can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
WINDOWS = os.name == "nt"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
# pip compiles all modules, so that environments which keep Python from writing (many containers
# set PYTHONDONTWRITEBYTECODE) do not compile them in every process.
PIP_INSTALL = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check")
STAMP = VENV / "installed.sha256"
# In addition to ops/, which is compiled
INSTALLED_FROM = (
    "dev.py",
    "pyproject.toml",
    "setup.py",
    "spatial_mamba_d2/__init__.py",  # the version
    "spatial_mamba_d2/system/install_detectron2.py",
)


def call(*command: object) -> int:
    """Print a command, run it in the checkout, and return its exit code as a shell would."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    code = subprocess.run(words, cwd=ROOT).returncode
    return code if code >= 0 else 128 - code


def run(*command: object) -> None:
    """Like `call`, but exit with the command's exit code if it fails."""
    if code := call(*command):
        sys.exit(code)


def from_pyproject(pattern: str) -> tuple[str, ...]:
    """The groups of a regular expression that matches a line of pyproject.toml.

    tomllib would parse the file, but is part of Python from 3.11 only.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(f"^{pattern}$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"pyproject.toml: no line matches {pattern}")
    return match.groups()


def check_python() -> None:
    """Exit with the fix if this interpreter cannot create the environment."""
    oldest, excluded = from_pyproject(r'requires-python = ">=3\.(\d+),<3\.(\d+)"')
    here, newest = sys.version_info[:2], int(excluded) - 1
    if not (3, int(oldest)) <= here <= (3, newest):
        sys.exit(
            f"Python 3.{oldest} to 3.{newest} is required, but this is {here[0]}.{here[1]}: "
            f"run this file with another interpreter, for example python3.{newest} dev.py"
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        sys.exit(
            "This Python has no venv or no ensurepip module. "
            f"On Debian and Ubuntu: sudo apt install python{here[0]}.{here[1]}-venv"
        )


def native_sources() -> list[Path]:
    """The C++ and CUDA sources of the operators."""
    suffixes = {".cpp", ".cuh", ".h"}
    return sorted(path for path in ROOT.glob("ops/**/*") if path.suffix in suffixes)


def other_native_sources() -> list[Path]:
    return sorted([*ROOT.glob("tests/cuda_emulator/*.*"), *ROOT.glob("examples/cpp/*.cpp")])


def fingerprint() -> str:
    """A hash of everything that the installation depends on: the checkout's place and sources."""
    digest = hashlib.sha256(str(ROOT).encode())  # an installation knows where its sources are
    for path in (*(ROOT / name for name in INSTALLED_FROM), *native_sources()):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_installed() -> bool:
    return PYTHON.exists() and STAMP.is_file() and STAMP.read_text() == fingerprint()


def site_packages() -> Path:
    return next(VENV.glob("Lib/site-packages" if WINDOWS else "lib/python3*/site-packages"))


def runs(interpreter: Path) -> bool:
    try:
        return subprocess.run([interpreter, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def activates() -> bool:
    """Whether the environment's scripts name this folder, which they do not after a move."""
    script = PYTHON.with_name("activate")
    return not script.exists() or str(VENV) in script.read_text(encoding="utf-8")


def correct_scripts() -> None:
    """Let the commands that packages have installed start this environment's Python."""
    for script in PYTHON.parent.iterdir():
        if script.is_file() and not script.is_symlink():
            first, newline, rest = script.read_bytes().partition(b"\n")
            if re.fullmatch(rb"#!.*/\.venv/bin/python[\d.]*", first):
                script.write_bytes(b"#!" + os.fsencode(PYTHON) + newline + rest)


def use_writable_cache() -> None:
    """Let pip do without its cache if that cannot be written, which stops it on some disks."""
    default = {"darwin": "Library/Caches", "win32": "AppData/Local"}.get(sys.platform, ".cache")
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / default)
    except RuntimeError:  # no home
        base = Path("/nonexistent")
    folder = Path(os.environ.get("PIP_CACHE_DIR") or base / "pip")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if "PIP_NO_CACHE_DIR" not in os.environ and not os.access(existing, os.W_OK):
        print(f"{folder} cannot be written: pip works without a cache", flush=True)
        os.environ["PIP_NO_CACHE_DIR"] = "1"  # also for install_detectron2


def prepare_venv() -> None:
    """Create the environment, or repair one whose installation was interrupted."""
    if not runs(PYTHON):
        run(sys.executable, "-m", "venv", "--clear", VENV)
    elif not activates():
        run(sys.executable, "-m", "venv", VENV)
        correct_scripts()
    # pip writes RECORD last. A distribution without it is incomplete, but pip would keep it.
    for info in site_packages().glob("*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)
    if not any(site_packages().glob("pip-*.dist-info")):
        run(PYTHON, "-m", "ensurepip", "--upgrade", "--default-pip")


def install() -> None:
    before = fingerprint()
    STAMP.unlink(missing_ok=True)
    use_writable_cache()
    prepare_venv()
    # Without build isolation, because the operators are compiled against the installed PyTorch.
    (setuptools,) = from_pyproject(r'requires = \["(setuptools.*)"\]')
    run(*PIP_INSTALL, setuptools, "wheel", "ninja", "torch", "torchvision")
    run(*PIP_INSTALL, "--no-build-isolation", "--editable", ".[dev]")
    run(PYTHON, "-m", "spatial_mamba_d2.system.install_detectron2")
    STAMP.write_text(before)


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
    print(f"Scores, checkpoints and images are in {ROOT / output}")


def test(args: list[str]) -> None:
    """All tests run in several processes, each file in one of them; chosen tests in one process."""
    everything = ["--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    everything.append("--no-loadscope-reorder")  # tests/conftest.py orders the files
    run(PYTHON, "-m", "pytest", *(args or everything))


def lint(args: list[str]) -> None:
    run(PYTHON, "-m", "ruff", "check", *args)
    run(PYTHON, "-m", "ruff", "format", "--check", *args)
    if sources := [*native_sources(), *other_native_sources()]:
        run(PYTHON.with_name("clang-format"), "--dry-run", "--Werror", *sources)
    # mypy checks a built copy, in which ops/ is spatial_mamba_d2.ops.
    copy = ROOT / "build/lint"
    shutil.rmtree(copy, ignore_errors=True)
    run(PYTHON, "setup.py", "--quiet", "build_py", "--build-lib", copy)
    run(PYTHON, "-m", "mypy", copy / "spatial_mamba_d2", "dev.py")


def docs(args: list[str]) -> None:
    """Its generator is installed by the first call; after that, no network is needed."""
    if not any(site_packages().glob("zensical-*.dist-info")):
        run(*PIP_INSTALL, *from_pyproject(r'docs = \["(.*)"\]'))
    run(PYTHON, "docs/build_site.py", *args)
    run(PYTHON, "-m", "zensical", "build")
    print(f"The site is {ROOT / 'build/site/index.html'}")


def wheels(args: list[str]) -> None:
    """One wheel for all versions of Python, and of PyTorch from that of ops/stable.h on.

    On Linux its tag says which glibc it needs, which is that of the machine it is built on:
    .github/workflows/release.yml builds in manylinux containers.
    """
    parser = argparse.ArgumentParser(prog="dev.py wheels")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of both files")
    output = parser.parse_args(args).output.resolve()
    linux = sys.platform == "linux"
    if linux and not any(site_packages().glob("auditwheel-*.dist-info")):
        run(*PIP_INSTALL, *from_pyproject(r'wheels = \["(.*)", "(.*)"\]'))
    os.environ["SMD2_BUILD_NATIVE"] = "1"  # or an error that says why not
    with tempfile.TemporaryDirectory() as folder:
        run(PYTHON, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
        (sdist,), (wheel,) = Path(folder).glob("*.tar.gz"), Path(folder).glob("*.whl")
        check_wheel(wheel)
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(sdist, output)
        if linux:
            audit = [PYTHON, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so"]
            run(*audit, "--wheel-dir", output, wheel)
        else:
            shutil.copy(wheel, output)
    for path in sorted(output.glob(f"{sdist.name.removesuffix('.tar.gz')}[-.]*")):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def check_wheel(wheel: Path) -> None:
    """Exit unless the library in a wheel depends on PyTorch by its stable ABI alone."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/_C.so"))
        if foreign := foreign_symbols(Path(archive.extract(name, folder))):
            sys.exit(f"{wheel.name}: {name} needs symbols that may change: {', '.join(foreign)}")


def foreign_symbols(library: Path) -> list[str]:
    """What a library needs in addition to LibTorch's stable ABI and the system's libraries.

    Python's C API would be among it, and C++ functions of PyTorch, which change with each version.
    """
    command = ("nm", "-D", "--undefined-only") if sys.platform == "linux" else ("nm", "-u")
    listed = subprocess.run([*command, library], check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    if sys.platform == "linux":  # names of the system's libraries have a version
        stable = re.compile("(aoti_)?torch_|_ITM_|__gmon_start__|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_")
        return [name for name in names if not stable.match(name)]
    return [name for name in names if re.match(r"_Py|__ZN?K?(3c10|2at|5torch)", name)]


def cuda_report(args: list[str]) -> None:
    run(PYTHON, "tools/cuda_report.py", *args)


def setup(args: list[str]) -> None:
    install()


COMMANDS = {
    c.__name__.replace("_", "-"): c
    for c in (demo, demo_seg, demo_cls, test, lint, docs, wheels, cuda_report, setup)
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the command")
    options = parser.parse_args(argv)
    command = COMMANDS[options.command]
    check_python()
    try:
        # A wheel needs little of what install() installs: release.yml has an environment for it.
        ready = is_installed() or (command is wheels and PYTHON.exists())
        if command is not setup and not ready:
            install()
        command(options.args)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
