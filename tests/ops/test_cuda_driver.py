"""Loading and starting CUDA kernels, with a library in place of NVIDIA's driver."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from spatial_mamba_d2.ops.cuda import driver, nvrtc
from spatial_mamba_d2.ops.cuda.source import bundle
from spatial_mamba_d2.ops.state_fusion import cuda as fusion

from . import emulator

STREAM = 0x4000
OURS = 0x1000  # the context that the library gives out


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The library in place of the driver; PyTorch's part is an H100."""
    try:
        nvrtc.version()
    except nvrtc.UnavailableError as error:
        pytest.skip(str(error))
    objects = emulator.compile_all([emulator.EMULATOR / "fake_driver.cpp"], "-O1")
    path = tmp_path / "libcuda.so"  # a new file, because libraries keep their state
    path.write_bytes(emulator.link(objects, "-shared", suffix=".so").read_bytes())
    library = ctypes.CDLL(str(path))
    library.last_launch.restype = ctypes.c_int64
    loaded = ctypes.CDLL
    monkeypatch.setattr(
        driver.ctypes, "CDLL", lambda name: library if name == "libcuda.so.1" else loaded(name)
    )
    driver.library.cache_clear()
    h100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False
    )
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path))
    yield library
    driver.library.cache_clear()


def load(device):
    names = fusion.FORWARD.cpp_names(torch.float32)
    (launch,) = device.load(bundle(fusion.FORWARD.source), names, "state_fusion")
    return launch


def launch_fields(library) -> list[int]:
    return [library.last_launch(number) for number in range(6 + 11)]


def test_a_kernel_is_compiled_loaded_and_started(fake):
    device = driver.CudaDevice(torch.device("cuda", 1))
    assert (device.multiprocessors, device.architecture) == (132, 90)
    launch = load(device)
    x = torch.zeros(3)
    launch(2**31 - 1, 8, 64512, x, *range(10))
    members = [x.data_ptr(), *range(10)]
    assert launch_fields(fake) == [0x3000, 2**31 - 1, 32, 8, 64512, STREAM + 1, *members]


@pytest.mark.parametrize("before", [None, OURS, 0x9000], ids=["none", "ours", "another"])
def test_the_devices_context_is_current_at_a_launch_and_the_threads_after_it(fake, before):
    """A thread of autograd may have none, and with several GPUs it may be another one's."""
    launch = load(driver.CudaDevice(torch.device("cuda", 0)))
    if before:
        fake.cuCtxPushCurrent_v2(ctypes.c_void_p(before))
    launch(1, 8, 0, *range(11))  # the library refuses it in another context
    assert fake.context_depth() == (1 if before else 0)


def test_attributes_are_set_once(fake):
    launch = load(driver.CudaDevice(torch.device("cuda", 0)))
    for _ in range(3):
        launch(1, 8, 64512, *range(11))
    assert fake.num_attributes_set() == 1


def test_a_failed_launch_is_named(fake):
    launch = load(driver.CudaDevice(torch.device("cuda", 0)))
    fake.fail_next(700)
    message = r"fuse_tiles<.*> cannot be started, or an operation before it has failed: something"
    with pytest.raises(RuntimeError, match=message):
        launch(1, 8, 0, *range(11))
    assert fake.context_depth() == 0


def test_code_that_the_gpu_cannot_run_is_no_error(fake):
    """Plain PyTorch is used then, which is what this exception means."""
    device = driver.CudaDevice(torch.device("cuda", 0))
    fake.fail_next(209)
    with pytest.raises(nvrtc.UnavailableError, match=r"no kernel image \(CUDA_ERROR_NO_BINARY"):
        load(device)
    fake.fail_next(2)
    with pytest.raises(RuntimeError) as caught:
        load(device)
    assert not isinstance(caught.value, nvrtc.UnavailableError)


def test_a_gpu_that_nvrtc_does_not_know(fake, monkeypatch):
    new = SimpleNamespace(major=99, minor=1, multi_processor_count=20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: new)
    with pytest.raises(
        nvrtc.UnavailableError, match="does not compile for sm_991, the architecture"
    ):
        driver.CudaDevice(torch.device("cuda", 0))


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    driver.library.cache_clear()
    with pytest.raises(nvrtc.UnavailableError, match="NVIDIA's driver cannot be loaded: "):
        driver.library()
