"""What plain PyTorch computes in which precision, on CPUs and on CUDA devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._precision import precise_inside, without_tf32
from spatial_mamba_d2.ops.depthwise_conv3x3 import eager as conv
from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import eager as conv_norm
from spatial_mamba_d2.ops.gated_layer_norm import eager as norm
from spatial_mamba_d2.ops.gelu_gradients import eager as gelu_gradients
from spatial_mamba_d2.ops.layer_norm_gradients import eager as norm_gradients

SHAPE = (2, 9, 7, 48)


class Maps(TorchDispatchMode):
    """The dtypes of all tensors as large as a map that operations return."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for x in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(x, torch.Tensor) and x.numel() >= torch.Size(SHAPE).numel():
                self.dtypes.add(x.dtype)
        return outputs


def convolve(x, grad, weight, channels):
    for residual in (True, False):
        conv.depthwise_conv3x3(x, weight, channels, residual)
        conv.depthwise_conv3x3_backward(grad, x, weight, channels, residual)
        written = torch.empty_like(x)
        conv.depthwise_conv3x3_gradients_(written, grad, x, weight, channels, residual)


def convolve_and_norm(x, grad, weight, channels):
    conv_norm.depthwise_conv3x3_layer_norm(x, weight, channels, channels, channels, 1e-5)


def gate(x, grad, weight, channels):
    norm.gated_layer_norm(x, grad, channels, channels, 1e-5)
    norm.gated_layer_norm_backward(grad, x, grad, channels, channels, 1e-5)
    written = torch.empty_like(x)
    norm.gated_layer_norm_gradients_(written, grad, x, grad, channels, channels, 1e-5)


def recompute(x, grad, weight, channels):
    gelu_gradients.gelu_gradients(grad, x)
    norm_gradients.layer_norm_gradients(grad, grad, x, channels, channels, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [convolve, convolve_and_norm, gate, recompute])
def test_no_map_changes_its_dtype_on_cuda(function, dtype):
    """Weights are float32, as under autocast. No GPU is needed to see what would be allocated."""
    needs_gpu = (
        dtype is torch.bfloat16 and "convolve" in function.__name__ and torch.__version__ < (2, 9)
    )
    if needs_gpu and not torch.cuda.is_available():
        pytest.skip("PyTorch 2.8 asks the GPU how it convolves bfloat16")
    with FakeTensorMode(), Maps() as maps:
        x, grad = (torch.empty(SHAPE, dtype=dtype, device="cuda") for _ in range(2))
        weight = torch.empty(SHAPE[-1], 1, 3, 3, device="cuda")
        function(x, grad, weight, torch.empty(SHAPE[-1], device="cuda"))
    assert maps.dtypes == {dtype}


def test_on_cpus_it_is_the_accumulation_dtype():
    x, weight = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3)
    assert [t.dtype for t in precise_inside(x, weight)] == [torch.float32] * 2
    assert [t.dtype for t in precise_inside(weight, x.double())] == [torch.float32] * 2


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="before PyTorch 2.9")
@pytest.mark.parametrize("before", ["tf32", "ieee"])  # the older name can be read in the first
def test_tf32_is_off_inside_and_as_before_outside(before, monkeypatch):
    settings = torch.backends.cudnn.conv
    initial = settings.fp32_precision
    settings.fp32_precision = before
    try:
        with pytest.raises(KeyError), without_tf32(SimpleNamespace(is_cuda=True)):
            assert settings.fp32_precision == "ieee"
            raise KeyError
        assert settings.fp32_precision == before
        first, second = (without_tf32(SimpleNamespace(is_cuda=True)) for _ in range(2))
        first.__enter__()  # as of two threads: neither ends within the other
        second.__enter__()
        first.__exit__(None, None, None)
        assert settings.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert settings.fp32_precision == before
        with without_tf32(torch.zeros(1)):  # not on CUDA: nothing to do with cuDNN
            assert settings.fp32_precision == before
    finally:
        settings.fp32_precision = initial


def test_models_can_be_exported_where_tf32_is_off():
    """``torch.export`` reads the older name of the setting."""
    with without_tf32(SimpleNamespace(is_cuda=True)):
        torch.export.export(torch.nn.ReLU(), (torch.ones(1),)).run_decompositions()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [7, 64])
def test_float32_keeps_all_bits_on_a_gpu(size):
    """By default, PyTorch lets cuDNN round the inputs of convolutions to 10 bits."""
    from spatial_mamba_d2 import ops

    torch.manual_seed(0)
    h, taps = torch.randn(1, size, size, 64), torch.randn(25, 64)
    expected = ops.state_fusion(h.double(), taps.double())
    with _extension.without_compiled_kernels():
        actual = ops.state_fusion(h.cuda(), taps.cuda()).cpu().double()
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
