"""Layers of optimised models: matrix products and convolutions, with what follows them.

On CPUs, oneDNN computes a layer, with its weight in a layout of oneDNN's own; 3x3 convolutions of
many channels are computed by Winograd's algorithm, which oneDNN no longer has. On other devices,
PyTorch's library does, and our kernel adds bias, residual and ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.models.inference_only import InferenceOnly, refuse_gradients
from spatial_mamba_d2.models.layers import nchw, nhwc
from spatial_mamba_d2.ops import _extension, add_bias_, winograd_conv3x3, winograd_weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu_,
    "gelu": F.gelu,
}
# oneDNN's name and slope of each activation. Its ReLU makes 0 of NaN, which would hide a broken
# image or weight. A leaky one does not; the slope is too small for any other difference.
_ONEDNN_ACTIVATIONS: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("leaky_relu", [1e-30]),
    "gelu": ("gelu", []),
}


class Part(InferenceOnly):
    """Layer or group of layers in optimised form.

    Attributes:
        stays_exact: whether it remains in float32 when other layers are quantised.
    """

    stays_exact = False

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(refuse_gradients)


class _Packed(Part):
    """Layer whose weight is in oneDNN's own layout if oneDNN supports its dtype and device."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, act: str):
        super().__init__()
        self.dtype = dtype or weight.dtype
        self.out_dim = len(weight)
        self.act = act
        self.packed = _onednn_supports(weight, self.dtype)
        self.register_buffer("bias", None if bias is None else bias.to(self.dtype))
        self._set_weight(weight.to(self.dtype))

    def _pack(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _set_weight(self, weight: Tensor) -> None:
        if self.packed:  # not a buffer: code that iterates over buffers cannot read its layout
            self.weight = self._pack(weight)
        else:
            self.register_buffer("weight", weight)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        return {**state, "weight": self.weight.to_dense()} if self.packed else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.packed:
            self._set_weight(self.weight)


def is_on_cpu(x: Tensor) -> bool:
    """Whether this is computed by oneDNN, in tiles for the cache, in place."""
    return x.device.type == "cpu"


def _onednn_supports(weight: Tensor, dtype: torch.dtype) -> bool:
    if not is_on_cpu(weight) or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class PackedLinear(_Packed):
    """``act(x W^T + b)``: ``Tensor[..., I]`` -> ``Tensor[..., O]``, both in the weight's dtype."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        act: str = "none",
    ):
        super().__init__(weight, bias, dtype, act)

    def _pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            gelu = "none"  # no approximation
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(x, self.weight, self.bias, *_ONEDNN_ACTIVATIONS[self.act], gelu)
        if (
            self.act == "gelu"
            and self.bias is not None
            and self.dtype == torch.bfloat16
            and not is_on_cpu(x)
        ):
            return self._linear_gelu(x)
        return ACTIVATIONS[self.act](F.linear(x, self.weight, self.bias))

    def _linear_gelu(self, x: Tensor) -> Tensor:
        """One kernel, which has the tanh form of GELU only.

        That differs from GELU by 5e-4 at most; rounding to bfloat16 changes 1 by up to 4e-3.
        """
        assert self.bias is not None
        tokens = x.reshape(-1, x.shape[-1])
        y = torch._addmm_activation(self.bias, tokens, self.weight.t(), use_gelu=True)
        return y.view(*x.shape[:-1], self.out_dim)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """``out += act(x W^T + b)``: ``Tensor[tokens, I]`` to ``Tensor[tokens, O]``."""
        is_product = self.bias is None and self.act == "none" and out.dtype == self.weight.dtype
        if is_product and not is_on_cpu(out):
            out.addmm_(x, self.weight.t())  # without a pass of its own for the sum
        else:
            out.add_(self(x))


class PackedConv(_Packed):
    """``act(convolution)``: ``Tensor[B, C, H, W]`` of any dtype -> ``out_dtype``.

    Args:
        out_dtype: dtype of the output, by default the weight's.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        dtype: torch.dtype | None = None,
        act: str = "none",
        out_dtype: torch.dtype | None = None,
    ):
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        super().__init__(conv.weight, conv.bias, dtype, act)
        self.out_dtype = out_dtype or self.dtype

    def _pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.packed:
            convolution = torch.ops.mkldnn._convolution_pointwise
            act = _ONEDNN_ACTIVATIONS[self.act]
            y = convolution(x, self.weight, self.bias, *self.geometry, *act, "")
        elif is_on_cpu(x):
            y = ACTIVATIONS[self.act](self._convolve(x, self.bias))
        else:
            y = self._convolve(x, None)
            if self.bias is not None:
                add_bias_(nhwc(y), self.bias, relu=self.act == "relu")
        return y.to(self.out_dtype)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        padding, stride, dilation, groups = self.geometry
        return F.conv2d(x, self.weight, bias, stride, padding, dilation, groups)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + convolution``, a new ``Tensor[B, C, H, W]``."""
        if is_on_cpu(x):
            return self(x).add_(residual)
        assert self.bias is not None
        y = self._convolve(x, None)
        add_bias_(nhwc(y), self.bias, nhwc(residual))
        return y


#: Channels from which on Winograd's algorithm is faster. At 32 it takes as long as oneDNN, on two
#: cores of an AMD EPYC (Zen 3).
WINOGRAD_CHANNELS = 64


def packed_conv(
    conv: nn.Conv2d,
    dtype: torch.dtype | None = None,
    act: str = "none",
    out_dtype: torch.dtype | None = None,
) -> PackedConv | WinogradConv:
    """The fastest form of a convolution where its weight is; see :class:`PackedConv`."""
    is_3x3 = conv.kernel_size == (3, 3) and conv.padding in ((1, 1), "same")
    is_dense = conv.groups == 1 and conv.padding_mode == "zeros"
    is_simple = is_3x3 and is_dense and conv.stride == conv.dilation == (1, 1)
    is_wide = min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
    if is_simple and is_wide and _uses_winograd(conv.weight, dtype or conv.weight.dtype):
        return WinogradConv(conv, dtype, act, out_dtype)
    return PackedConv(conv, dtype, act, out_dtype)


def _uses_winograd(weight: Tensor, dtype: torch.dtype) -> bool:
    """With compiled kernels, in float32, or where oneDNN has no instructions for 16 bits."""
    if _extension.WHY_NOT_COMPILED or not is_on_cpu(weight) or weight.dtype != torch.float32:
        return False
    is_half = dtype in (torch.bfloat16, torch.float16)
    return dtype == torch.float32 or (is_half and not _onednn_supports(weight, dtype))


#: Tokens up to which the direct convolution is faster, on one thread of an Intel Xeon with AVX-512:
#: a weight of 36 values takes longer to read than one of 9, and tiles of 4x4 exceed a small map.
DIRECT_TOKENS = 64


class WinogradConv(Part):
    """:class:`PackedConv` of a 3x3 convolution with padding 1, by Winograd's algorithm.

    The smallest maps are convolved directly, if oneDNN can.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, conv: nn.Conv2d, dtype: torch.dtype | None, act: str, out_dtype: torch.dtype | None
    ):
        super().__init__()
        self.dtype = dtype or conv.weight.dtype
        self.out_dtype = out_dtype or self.dtype
        self.out_dim = conv.out_channels
        self.act = act
        bias = conv.weight.new_zeros(self.out_dim) if conv.bias is None else conv.bias
        self.register_buffer("weight", winograd_weight(conv.weight))
        self.register_buffer("bias", bias.detach().clone())
        self.direct: PackedConv | None = None
        if _onednn_supports(conv.weight, self.dtype):
            self.direct = PackedConv(conv, dtype, act, out_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.direct is not None and len(x) * x.shape[2] * x.shape[3] <= DIRECT_TOKENS:
            return self.direct(x)
        y = winograd_conv3x3(nhwc(x.to(self.dtype)), self.weight, self.bias, self.act == "relu")
        return nchw(y).to(self.out_dtype)
