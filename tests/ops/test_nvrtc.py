"""Compiling CUDA kernels without a GPU, and the cache of what was compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spatial_mamba_d2.ops.cuda import cache, kernels, nvrtc, source
from spatial_mamba_d2.ops.cuda.kernels import CPP_TYPES, KernelSet
from spatial_mamba_d2.ops.state_fusion import cuda as fusion
from spatial_mamba_d2.system import once

TEXT = "template <typename T> __global__ void fill(T* x) { x[threadIdx.x] = 1; }"


@pytest.fixture
def compiler():
    """NVRTC, or a skip with the reason."""
    try:
        nvrtc.version()
    except nvrtc.UnavailableError as error:
        pytest.skip(str(error))


def test_the_source_includes_everything_once():
    text = source.bundle("structure_aware_ssm/ssm.cuh")
    assert '#include "' not in text
    assert text.count("struct Accumulate {") == text.count("struct TilePlace {") == 1
    assert '#line 1 "state_fusion/fusion.cuh"' in text


def test_constants_are_those_of_the_sources():
    found = source.constants("state_fusion/cuda.h")
    assert {found["TileShape.kRows"], found["TileShape<double>.kRows"]} == {8, 4}
    assert source.constants("cuda/types.h") == {"kLanes": 32}


@pytest.mark.parametrize("dtype", CPP_TYPES, ids=str)
def test_kernels_compile(dtype, compiler):
    names = fusion.FORWARD.cpp_names(dtype)
    image = nvrtc.compile_kernels(source.bundle(fusion.FORWARD.source), names, 90)
    assert image.code.startswith(b"\x7fELF")
    assert list(image.symbols) == names and all(
        x.encode() in image.code for x in image.symbols.values()
    )


def test_an_error_names_the_line(compiler):
    with pytest.raises(nvrtc.CompilationError, match=r'cannot compile x: .*"y" is undefined'):
        nvrtc.compile_kernels(f"{TEXT}\nint x = y;", ["fill<float>"], 90, title="x")


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 6), 86), ((8, 9), 89), ((12, 3), 120), ((9, 1), 90)]
)
def test_the_architecture_is_one_that_the_gpu_runs(capability, architecture, monkeypatch):
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 86, 89, 90, 120))
    assert nvrtc.architecture_for(*capability) == architecture


@pytest.mark.parametrize("capability", [(7, 0), (10, 3), (13, 0)])
def test_a_gpu_of_another_generation_runs_plain_pytorch(capability, monkeypatch):
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 90, 120))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    name = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(nvrtc.UnavailableError, match=f"NVRTC 13.0 does not compile for {name}, "):
        nvrtc.architecture_for(*capability)


def test_an_old_gpu_runs_plain_pytorch():
    with pytest.raises(
        nvrtc.UnavailableError, match="has compute capability 6.1, and kernels need"
    ):
        nvrtc.architecture_for(6, 1)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setenv("SMD2_NVRTC", "/nowhere/libnvrtc.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvrtc.library.cache_clear()
    try:
        with pytest.raises(
            nvrtc.UnavailableError, match=r"not found \(tried /nowhere/libnvrtc.so\)"
        ):
            nvrtc.library()
    finally:
        nvrtc.library.cache_clear()


def test_pytorch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    nvrtc.library.cache_clear()
    try:
        with pytest.raises(nvrtc.UnavailableError, match="PyTorch is built without CUDA"):
            nvrtc.library()
    finally:
        nvrtc.library.cache_clear()


@pytest.mark.long
def test_another_library_compiles_the_same_sources():
    """``SMD2_NVRTC``, with NVRTC of CUDA 12, which is what other builds of PyTorch bring."""
    files = (Path(x, "nvidia/cuda_nvrtc/lib/libnvrtc.so.12") for x in sys.path)
    other = next((str(path) for path in files if path.is_file()), None)
    if not other:
        pytest.skip("the package nvidia-cuda-nvrtc-cu12 is not installed")
    script = (
        "import torch\n"
        "from spatial_mamba_d2.profiling.kernel_resources import compile_all, over_budget\n"
        "from spatial_mamba_d2.ops.cuda import nvrtc\n"
        "found = compile_all([75], [torch.float32]) + compile_all([90], [torch.bfloat16])\n"
        "print(nvrtc.version()[0], len(found) > 40, over_budget(found))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "SMD2_NVRTC": other},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "12 True []\n", run.stderr


@pytest.fixture
def counted(monkeypatch):
    """The compilations that take place."""
    calls = []

    def compile_kernels(text, names, architecture, *options, title):
        calls.append((text, tuple(names), architecture))
        return nvrtc.Image(f"code of {text}".encode(), {name: "_Z" + name for name in names}, "log")

    monkeypatch.setattr(nvrtc, "compile_kernels", compile_kernels)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return calls


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/cuda"


def test_what_was_compiled_is_kept(counted, folder, monkeypatch):
    image = cache.compiled("a", ["f"], 90, "op/a.cuh")
    again = cache.compiled("a", ["f"], 90, "op/a.cuh")
    assert (
        (again.code, again.symbols) == (image.code, image.symbols) == (b"code of a", {"f": "_Zf"})
    )
    assert len(counted) == 1
    (path,) = folder.iterdir()
    assert path.name.startswith("op-a.cuh-sm_90-")
    # Everything else that goes into it
    cache.compiled("b", ["f"], 90, "op/a.cuh")
    cache.compiled("a", ["g"], 90, "op/a.cuh")
    cache.compiled("a", ["f"], 80, "op/a.cuh")
    monkeypatch.setattr(nvrtc, "OPTIONS", ("--other",))
    cache.compiled("a", ["f"], 90, "op/a.cuh")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    cache.compiled("a", ["f"], 90, "op/a.cuh")
    assert len(counted) == len(list(folder.iterdir())) == 6


@pytest.mark.parametrize("damage", [lambda x: b"", lambda x: x[:-1], lambda x: b"{}\n" + x])
def test_a_damaged_file_is_compiled_anew(damage, counted, folder):
    cache.compiled("a", ["f"], 90, "a")
    (path,) = folder.iterdir()
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert cache.compiled("a", ["f"], 90, "a").code == b"code of a"
    assert path.read_bytes() == intact and len(counted) == 2


def test_a_folder_that_cannot_be_written_does_no_harm(counted, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert cache.compiled("a", ["f"], 90, "a").code == b"code of a"
    assert len(counted) == 2
    with pytest.raises(OSError):
        cache.check_writable()


def test_many_processes_may_compile_at_once(counted, folder):
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda _: cache.compiled("a", ["f"], 90, "a"), range(40)))
    assert {image.code for image in images} == {b"code of a"}
    assert len(list(folder.iterdir())) == 1


def test_the_folder_is_in_that_of_other_results(monkeypatch, tmp_path):
    """Operators do not import ``system``, which has the same rule."""
    for variables in ({"SMD2_CACHE": "~/x"}, {"XDG_CACHE_HOME": str(tmp_path)}, {}):
        for name in ("SMD2_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cache.folder() == once.cache_folder() / "cuda"


def test_compiling_ahead_fills_the_cache(counted, folder, monkeypatch):
    monkeypatch.setattr(nvrtc, "architectures", lambda: (80, 90))
    done = list(kernels.compile_ahead([80, 90]))
    assert len(done) == len(counted) == len(list(folder.iterdir())) == 2 * 3 * len(KernelSet.ALL)
    with pytest.raises(nvrtc.UnavailableError, match="NVRTC compiles for 80, 90, not for 61"):
        list(kernels.compile_ahead([90, 61]))


class Broken:
    """A device on which nothing can be loaded."""

    multiprocessors = 1
    shared_bytes = 227 * 1024
    opened = 0

    def __init__(self, device):
        Broken.opened += 1
        raise nvrtc.UnavailableError("no")


def test_an_impossible_device_is_tried_once(monkeypatch):
    kernels._open.cache_clear()
    monkeypatch.setitem(kernels.OPENERS, "meta", Broken)
    kernel_set = KernelSet("state_fusion/fusion.cuh", fuse="f<{T}>")
    KernelSet.ALL.remove(kernel_set)
    for _ in range(3):
        with pytest.raises(nvrtc.UnavailableError, match="no"):
            kernel_set.on(torch.device("meta"), torch.float32)
    assert Broken.opened == 1


def test_an_impossible_device_keeps_no_tensor(monkeypatch):
    """An error that is raised again would keep the frames of each call, and their tensors."""
    kernels._open.cache_clear()
    monkeypatch.setitem(kernels.OPENERS, "meta", Broken)
    kernel_set = KernelSet("state_fusion/fusion.cuh", fuse="f<{T}>")
    KernelSet.ALL.remove(kernel_set)

    def call(x):
        try:
            kernel_set.on(x.device, x.dtype)
        except nvrtc.UnavailableError:
            pass

    for _ in range(2):
        x = torch.zeros(1, device="meta")
        alive = weakref.ref(x)
        call(x)
        del x
        assert alive() is None


def test_a_dtype_without_kernels_is_refused():
    with pytest.raises(
        ValueError, match="the dtype must be one of torch.float64, .*got torch.int8"
    ):
        fusion.FORWARD.on(torch.device("cpu"), torch.int8)
