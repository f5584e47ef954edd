"""How the CUDA operators are built: with which toolkit, and without breaking an installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatial_mamba_d2 import doctor
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.system import cuda_toolkit

ROOT = Path(__file__).parents[2]
OPERATORS = ("selective_scan", "state_fusion", "structure_aware_ssm")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
needs_cuda_torch = pytest.mark.skipif(
    torch.version.cuda is None, reason="PyTorch is built without CUDA"
)

# An nvcc that answers questions and compiles nothing.
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  *--dryrun*) echo "#$ TOP={home}/bin/.." >&2 ;;
  *--list-gpu-arch*) printf "compute_75\ncompute_80\ncompute_87\n" ;;
  *) echo "no license" >&2; exit 1 ;;
esac
"""


def make_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, version: str) -> Path:
    make_script(home / "bin/nvcc", NVCC.format(version=version, home=home))
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    return home


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No toolkit anywhere."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "SMD2_BUILD_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    if shutil.which("nvcc"):
        pytest.skip("nvcc is in /bin")
    monkeypatch.setattr(cuda_toolkit, "DEFAULT_HOME", tmp_path / "nowhere")
    return tmp_path


def test_without_nvcc(clean):
    with pytest.raises(cuda_toolkit.NoToolkitError, match=r"no CUDA toolkit: .*nowhere; install"):
        cuda_toolkit.find_toolkit("13.0")


def test_pytorch_without_cuda(clean):
    with pytest.raises(cuda_toolkit.NoToolkitError, match="built without CUDA"):
        cuda_toolkit.find_toolkit(None)


def test_nvcc_behind_a_script(clean):
    """The folder of the script is not a toolkit."""
    home = make_toolkit(clean / "toolkit", "13.1")
    make_script(clean / "bin/nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    assert cuda_toolkit.find_toolkit("13.0") == (home, "13.1")


def test_nvcc_behind_a_link(clean):
    home = make_toolkit(clean / "toolkit", "13.1")
    (clean / "bin").mkdir()
    (clean / "bin/nvcc").symlink_to(home / "bin/nvcc")
    assert cuda_toolkit.find_toolkit("13.0").home == home


def test_a_prefix_as_cuda_home_is_skipped(clean, monkeypatch):
    """CUDA_HOME may be the prefix of a wrapper script."""
    home = make_toolkit(clean / "toolkit", "13.1")
    make_script(clean / "bin/nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    monkeypatch.setenv("CUDA_HOME", str(clean))
    assert cuda_toolkit.find_toolkit("13.0").home == home


def test_cuda_home_comes_first(clean, monkeypatch):
    make_toolkit(clean / "a", "13.1")
    monkeypatch.setattr(cuda_toolkit, "DEFAULT_HOME", clean / "a")
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(clean / "b", "13.2")))
    assert cuda_toolkit.find_toolkit("13.0") == (clean / "b", "13.2")


def test_another_major_version(clean, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(clean / "old", "12.4")))
    with pytest.raises(cuda_toolkit.NoToolkitError, match=r"old is 12\.4, .* for CUDA 13\.0: set"):
        cuda_toolkit.find_toolkit("13.0")


def test_headers_of_a_target(clean, monkeypatch):
    """Conda's packages have them there."""
    home = make_toolkit(clean / "conda", "13.0")
    (home / "include/cuda_runtime.h").unlink()
    (home / "targets/x86_64-linux/include").mkdir(parents=True)
    (home / "targets/x86_64-linux/include/cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_PATH", str(home))
    assert cuda_toolkit.find_toolkit("13.0").home == home


def test_architectures_are_those_that_the_toolkit_supports(clean):
    toolkit = cuda_toolkit.Toolkit(make_toolkit(clean / "toolkit", "13.0"), "13.0")
    names = cuda_toolkit.architectures(toolkit)
    assert names == ["7.5", "8.0"]
    assert cuda_toolkit.architecture_flags(names) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]


@pytest.fixture
def build(tmp_path):
    """``build(**environment)``: compile small sources instead of the operators."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    pytest.importorskip("setuptools")
    checkout = tmp_path / "checkout"
    for folder in ("configs", "spatial_mamba_d2"):
        shutil.copytree(ROOT / folder, checkout / folder)
    (checkout / "ops/cuda").mkdir(parents=True)
    (checkout / "ops/sum").mkdir()
    (checkout / "ops/sum/cpu.cpp").write_text("int sum;\n")
    (checkout / "ops/sum/cuda.cu").write_text("__global__ void sum(int* x) { ++*x; }\n")
    shutil.copy(ROOT / "ops/cuda/build.cpp", checkout / "ops/cuda")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, checkout)

    def run(**environment: str) -> tuple[subprocess.CompletedProcess, dict[str, Path]]:
        base = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "TORCH_CUDA"))}
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", "built"],
            cwd=checkout,
            env={**base, "SMD2_BUILD_CUDA": "", **environment},
            capture_output=True,
            text=True,
        )
        libraries = checkout.glob("built/spatial_mamba_d2/ops/*.so")
        return done, {path.name.split(".")[0]: path for path in libraries}

    return run


@needs_cuda_torch
@pytest.mark.parametrize("flaw", ["other version", "failing nvcc", "disabled"])
def test_cpu_operators_are_built_nevertheless(build, tmp_path, flaw):
    version = "99.0" if flaw == "other version" else torch.version.cuda
    environment = {"CUDA_HOME": str(make_toolkit(tmp_path / "toolkit", version))}
    if flaw == "disabled":
        environment["SMD2_BUILD_CUDA"] = "0"
    reason = {
        "other version": f"{tmp_path}/toolkit is 99.0, but PyTorch was built for CUDA",
        "failing nvcc": "compiling failed",
        "disabled": "SMD2_BUILD_CUDA is 0",
    }[flaw]
    done, libraries = build(**environment)
    assert done.returncode == 0, done.stderr
    assert list(libraries) == ["_C"]
    (line,) = [x for x in done.stderr.splitlines() if "CUDA operators are not compiled" in x]
    assert reason in line

    if flaw != "disabled":
        required, _ = build(**environment, SMD2_BUILD_CUDA="1")
        assert required.returncode != 0
        assert reason in required.stderr


def real_nvcc() -> str:
    """The nvcc of a toolkit that matches PyTorch, or a skip with the reason."""
    try:
        return str(cuda_toolkit.find_toolkit(torch.version.cuda).home / "bin/nvcc")
    except cuda_toolkit.NoToolkitError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_real_build_without_gpu_or_list_of_architectures(build, tmp_path):
    """nvcc is called by a script, and no variable names its toolkit."""
    nvcc = real_nvcc()
    make_script(tmp_path / "bin/nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done, libraries = build(PATH=path, SMD2_BUILD_CUDA="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    script = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "print(torch.ops.spatial_mamba.cuda_architectures())"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script, libraries["_cuda"]],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.endswith("+PTX\n") and "9.0" in loaded.stdout


def test_the_dispatcher_knows_the_cuda_kernels():
    """This needs no GPU, because the library registers its kernels when loaded."""
    if _extension.WHY_NO_CUDA:
        pytest.skip(f"no compiled CUDA kernels: {_extension.WHY_NO_CUDA}")
    for name in OPERATORS:
        for kernel in (name, f"{name}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(
                f"spatial_mamba::{kernel}", "CUDA"
            )


def test_the_library_exists_where_it_can_be_built():
    """Otherwise all other tests of the kernels would be skipped unnoticed."""
    real_nvcc()
    if os.environ.get("SMD2_BUILD_CUDA") == "0":
        pytest.skip("SMD2_BUILD_CUDA is 0")
    assert _extension.WHY_NO_CUDA is None


@needs_cuda_torch
def test_the_doctor_says_why_there_are_no_cuda_kernels(clean, monkeypatch):
    monkeypatch.setattr(_extension, "WHY_NO_CUDA", "they were not compiled")
    finding = doctor.check_cuda_kernels()
    assert finding.status == "note"
    assert "they were not compiled (no CUDA toolkit" in finding.text

    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(clean / "toolkit", torch.version.cuda)))
    finding = doctor.check_cuda_kernels()
    assert f"CUDA {torch.version.cuda} is installed in {clean / 'toolkit'}" in finding.text
    assert finding.fix.startswith("SMD2_BUILD_CUDA=1 ")
