"""The contents of a built sdist and wheel, and installations whose compilation fails."""

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from spatial_mamba_d2.ops import _extension

ROOT = Path(__file__).parents[1]
SHIPPED = (".ci", "configs", "docs", "examples", "ops", "spatial_mamba_d2", "tests", "tools")


def files(folder: str, *patterns: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
    }


REPOSITORY = "https://example.org/owner/name"


def set_repository(folder: Path) -> None:
    path = folder / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    assert text.count('repository = ""') == 1
    path.write_text(text.replace('repository = ""', f'repository = "{REPOSITORY}"'))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with an sdist, and a wheel built from that sdist."""
    for module in ("build", "setuptools", "wheel"):
        pytest.importorskip(module, reason="python3 dev.py setup installs the build tools")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    set_repository(source)
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, source / folder)
    (source / "datasets").mkdir()
    for path in (ROOT / "datasets").glob("*.*"):  # without data
        shutil.copy(path, source / "datasets")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    env = {**os.environ, "SMD2_BUILD_NATIVE": "0"}  # other tests compile
    run = subprocess.run(build, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return output


@pytest.fixture(scope="module")
def dev():
    """dev.py, as a module."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def in_wheel(distributions) -> set[str]:
    (wheel,) = distributions.glob("spatial_mamba_d2-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_contains_the_package(in_wheel):
    assert files("spatial_mamba_d2", "*.py", "py.typed") <= in_wheel


def test_wheel_contains_the_folders_beside_the_package_inside_it(in_wheel):
    expected = files("ops", "*.py", "schemas.h") | files("configs", "*.yaml")
    expected |= files("tools", "*.py") | {f"datasets/{p.name}" for p in ROOT.glob("datasets/*.py")}
    assert {f"spatial_mamba_d2/{name}" for name in expected} <= in_wheel


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_packages_page_has_no_dead_links(distributions):
    """Relative ones, which only the repository has, are made absolute."""
    (wheel,) = distributions.glob("spatial_mamba_d2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        page = email.message_from_bytes(archive.read(name))
    found, original = links(page.get_payload()), links((ROOT / "README.md").read_text())
    assert len(found) == len(original) and all(link.startswith("https://") for link in found)
    assert f"{REPOSITORY}/blob/main/docs/speed.md" in found
    assert f"{REPOSITORY}/raw/main/docs/demo.jpg" in found
    assert f"Repository, {REPOSITORY}" in page.get_all("Project-URL")


def test_without_an_address_the_page_has_no_relative_links(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    script = (
        "import sys, setuptools, runpy\n"
        "setuptools.setup = lambda **arguments: print(arguments['long_description'])\n"
        "runpy.run_path('setup.py')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "SMD2_BUILD_NATIVE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(link.startswith("https://") for link in links(done.stdout))
    assert "(docs/speed.md)" not in done.stdout and "docs/speed.md has other sizes" in done.stdout


def test_wheel_contains_nothing_else(in_wheel):
    assert {name.split("/")[0].split("-")[0] for name in in_wheel} == {"spatial_mamba_d2"}
    assert not any(name.endswith(".cpp") for name in in_wheel)


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """A folder with the wheel's contents."""
    (wheel,) = distributions.glob("spatial_mamba_d2-*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def command(installed, tmp_path):
    """``command(*words)``: ``spatial-mamba-d2 WORDS`` of the wheel, in an empty folder."""
    env = {**os.environ, "PYTHONPATH": str(installed), "SMD2_BACKEND": "eager"}

    def run(*words: object) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "spatial_mamba_d2", *map(str, words)]
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def test_the_command_lists_the_tools(command):
    done = command("--help")
    assert done.returncode == 0, done.stderr
    listed = done.stdout.partition("tools:")[2]
    for path in (*ROOT.glob("tools/*.py"), *ROOT.glob("datasets/*.py")):
        assert f"  {path.stem} " in listed, path
    done = command("train_sge")
    assert done.returncode == 2 and "invalid choice: 'train_sge'" in done.stderr


@pytest.mark.slow
def test_the_command_trains_in_an_empty_folder(command, tmp_path):
    done = command("prepare_shapes", "--num-train", 4, "--num-val", 2, "--image-px", 64, 64)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "datasets/shapes/objectInfo.txt").is_file()
    done = command(
        "train_seg", "--config-file", "configs/demo_upernet_spatial_mamba_t.yaml", "--num-gpus", 2,
        "SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 4, "INPUT.CROP_PX", 48, "INPUT.SHORT_PX", 48,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "output/demo_seg").glob("scores_*.json"))


def test_wheel_contains_the_sources_of_cuda_kernels(installed):
    """They are compiled where the wheel is installed: here, as one text without includes."""
    script = (
        "from spatial_mamba_d2.ops.cuda.kernels import KernelSet\n"
        "from spatial_mamba_d2.ops.cuda import source\n"
        "print(source.OPS, {len(source.bundle(s.source)) > 5000 for s in KernelSet.ALL})\n"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *sys.path])},
        cwd=installed,
        capture_output=True,
        text=True,
    )
    assert run.stdout == f"{installed / 'spatial_mamba_d2/ops'} {{True}}\n", run.stderr


# A comparison of all gradients with the reference, in a process that finds no compiler
USE_OF_THE_LIBRARY = """
import shutil
assert not any(map(shutil.which, ("c++", "g++", "gcc", "clang++")))
import torch
from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.structure_aware_ssm.reference import structure_aware_ssm as reference
assert _extension.WHY_NOT_COMPILED is None and _extension.CPU_LIBRARY.name == "_C.so"
torch.manual_seed(0)
u, delta = torch.randn(2, 2, 6, 7, 21)
B, C = torch.randn(2, 2, 6, 7)
A, D, bias = -torch.rand(21), torch.randn(21), torch.randn(21)
inputs = [x.requires_grad_() for x in (u, delta, A, B, C, D, bias, torch.randn(25, 21))]
expected = reference(*[x.double() for x in inputs])
output = ops.structure_aware_ssm(*inputs)
torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
pairs = (torch.autograd.grad(y.square().sum(), inputs) for y in (output, expected))
for ours, truth in zip(*pairs, strict=True):
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item())
print(_extension.__file__)
"""


def use_library(installed: Path) -> None:
    """Use the compiled operators of a folder where the package is installed."""
    path = os.pathsep.join([str(installed), *sys.path])
    env = {"PATH": "/nonexistent", "PYTHONPATH": path, "SMD2_BACKEND": "native"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE_OF_THE_LIBRARY],
        env=env, cwd=installed, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(installed)), done.stderr


needs_library = pytest.mark.skipif(
    not _extension.CPU_LIBRARY.exists()
    or tuple(map(int, torch.__version__.split(".")[:2])) < _extension.oldest_torch(),
    reason="the operators are not compiled, or for newer versions of PyTorch",
)


@needs_library
def test_the_library_works_where_nothing_can_be_compiled(installed, tmp_path):
    copy = shutil.copytree(installed, tmp_path / "installed")
    shutil.copy(_extension.CPU_LIBRARY, copy / "spatial_mamba_d2/ops")
    use_library(copy)


@needs_library
@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")
def test_the_library_needs_the_stable_abi_alone(dev):
    """So it works with other versions of Python and PyTorch than those it was compiled with."""
    assert dev.foreign_symbols(_extension.CPU_LIBRARY) == []
    libraries = Path(torch.__file__).parent / "lib"
    (other,) = (p for p in libraries.glob("libtorch_python.*") if p.suffix in (".so", ".dylib"))
    found = dev.foreign_symbols(other)
    assert any("3c10" in name for name in found) and any("Py" in name for name in found)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
def test_a_compiled_wheel_is_for_every_python(dev, distributions, tmp_path):
    (sdist,) = distributions.glob("spatial_mamba_d2-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path]
    done = subprocess.run(
        [*build, source],
        env={**os.environ, "SMD2_BUILD_NATIVE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.stem.endswith("-any")
    dev.check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    use_library(tmp_path / "installed")


def test_sdist_contains_what_building_and_testing_need(distributions):
    (sdist,) = distributions.glob("spatial_mamba_d2-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {"ops/selective_scan/cpu.cpp", "ops/selective_scan/scan.cuh"}
    assert native | {"dev.py", ".ci/run", "LICENSE", "NOTICE"} <= names
    assert files("tests", "*.py") | files("tools", "*.py") | files("configs", "*.yaml") <= names
    assert files("docs", "*.md", "*.jpg", "*.png", "*.py") <= names
    assert files("examples", "*.py", "*.cpp", "*.ipynb") <= names


@pytest.fixture
def build_ext(tmp_path):
    """``build_ext(**environment)``: run the compilation in a copy of the sources."""
    for folder in ("ops", "configs", "spatial_mamba_d2"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)

    def build(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", "built"],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    return build


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C++ compiler no-such-compiler"), ("false", "compiling failed")],
)
def test_a_compiler_that_fails_does_not_fail_the_installation(compiler, reason, build_ext):
    if compiler == "false" and "need PyTorch" in (_extension.WHY_NOT_COMPILED or ""):
        pytest.skip(f"{_extension.WHY_NOT_COMPILED}")
    done = build_ext(CXX=compiler, SMD2_BUILD_NATIVE="")
    assert done.returncode == 0, done.stderr
    assert f"spatial_mamba_d2: operators are not compiled: {reason}" in done.stderr
    required = build_ext(CXX=compiler, SMD2_BUILD_NATIVE="1")
    assert required.returncode != 0
    assert reason in required.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
def test_a_pytorch_that_is_too_old_is_named(build_ext, tmp_path):
    """A stand-in for the installed one has only the version that setup.py asks."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "torch.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = build_ext(SMD2_BUILD_NATIVE="", PYTHONPATH=str(old))
    assert done.returncode == 0, done.stderr
    assert "not compiled: they need PyTorch 2.10 or newer, but this is 2.9.1+cpu" in done.stderr


def test_compiling_can_be_disabled(build_ext):
    done = build_ext(SMD2_BUILD_NATIVE="0")
    assert done.returncode == 0
    assert "operators are not compiled: SMD2_BUILD_NATIVE is 0" in done.stderr


def test_an_old_setuptools_is_named(tmp_path):
    """Older ones cannot read pyproject.toml. A stand-in has only the version that setup.py asks."""
    (tmp_path / "setuptools.py").write_text(
        "__version__ = '65.5.0'\ndef find_packages(): ...\ndef setup(): ...\n"
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "needs setuptools>=77" in line and "this is setuptools 65.5.0" in line
    assert f"{sys.executable} -m pip install 'setuptools>=77" in line
