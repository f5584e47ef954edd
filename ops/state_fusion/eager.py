"""State fusion in plain PyTorch: three dilated depthwise convolutions on one padded copy.

oneDNN's and cuDNN's depthwise kernels take channels-last tensors without a copy. Neither library
has a fast weight gradient for dilated depthwise convolutions; splitting the map into its ``d x d``
phases (space to batch) makes the convolution an undilated one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from spatial_mamba_d2.ops._precision import accumulation_dtype, without_tf32
from spatial_mamba_d2.ops.state_fusion.taps import DILATIONS, RADIUS, join_taps, split_taps


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _replicate(h: Tensor) -> Tensor:
    """``Tensor[B, H, W, D]`` -> ``Tensor[B, H+10, W+10, D]``, contiguous."""
    for dim in (1, 2):
        size = h.shape[dim]
        index = torch.arange(-RADIUS, size + RADIUS, device=h.device).clamp_(0, size - 1)
        h = h.index_select(dim, index)
    return h


def _phases(x: Tensor, dilation: int) -> Tensor:
    """Space to batch: ``Tensor[B, d*H, d*W, D]`` -> ``Tensor[B*d*d, H, W, D]``."""
    if dilation == 1:
        return x
    x = x.unflatten(1, (-1, dilation)).unflatten(3, (-1, dilation))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def state_fusion(h: Tensor, taps: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.state_fusion`."""
    dtype = accumulation_dtype(h)
    height, width, dim = h.shape[1:]
    padded = _nchw(_replicate(h.to(dtype)))
    kernels = split_taps(taps.to(dtype))
    with without_tf32(h):
        out = conv2d(padded, kernels[-1], dilation=RADIUS, groups=dim)
        for d, kernel in zip(DILATIONS[:-1], kernels[:-1], strict=True):
            part = conv2d(padded, kernel, dilation=d, groups=dim)
            crop = RADIUS - d  # `part` exceeds the map by this much on each side
            out += part[:, :, crop : crop + height, crop : crop + width]
    return out.permute(0, 2, 3, 1).contiguous()


def state_fusion_backward(grad_output: Tensor, h: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``h`` and ``taps``."""
    dtype = accumulation_dtype(h)
    grad_output = grad_output.to(dtype).contiguous()
    padded = _replicate(h.to(dtype))
    kernels = split_taps(taps.to(dtype))
    with without_tf32(h):
        grad_h = _grad_input(grad_output, kernels)
        grad_kernels = [
            _grad_kernel(grad_output, padded, kernel, d)
            for d, kernel in zip(DILATIONS, kernels, strict=True)
        ]
    return grad_h.to(h.dtype), join_taps(grad_kernels).to(taps.dtype)


def _grad_input(grad_output: Tensor, kernels: list[Tensor]) -> Tensor:
    """The adjoint of convolution and padding: transposed convolutions, then the border folded back.

    Replicate padding reads ``padded[i] = h[clamp(i - R, 0, n - 1)]``, along each axis of size n,
    with ``R = RADIUS``. Its adjoint adds up what was read from each position:
    ``grad_h[j] = sum over i with clamp(i - R, 0, n - 1) = j of grad_padded[i]``. So the R positions
    beyond either end add their gradients to the outermost position inside.
    """
    height, width, dim = grad_output.shape[1:]
    grad_padded = None
    for d, kernel in reversed(list(zip(DILATIONS, kernels, strict=True))):
        part = conv2d(
            _nchw(grad_output), kernel.flip(2, 3), padding=2 * d, dilation=d, groups=dim
        ).permute(0, 2, 3, 1)  # [B, H + 2d, W + 2d, D]
        if grad_padded is None:  # the largest dilation, RADIUS, comes first
            grad_padded = part
        else:
            crop = RADIUS - d
            grad_padded[:, crop : crop + part.shape[1], crop : crop + part.shape[2]] += part
    assert grad_padded is not None
    for axis, size in ((1, height), (2, width)):
        first, last, end = RADIUS, RADIUS + size - 1, RADIUS + size
        before = grad_padded.narrow(axis, 0, RADIUS)
        grad_padded.select(axis, first).add_(before.sum(axis))
        after = grad_padded.narrow(axis, end, RADIUS)
        grad_padded.select(axis, last).add_(after.sum(axis))
        grad_padded = grad_padded.narrow(axis, first, size)
    return grad_padded.contiguous()


def _grad_kernel(grad_output: Tensor, padded: Tensor, kernel: Tensor, dilation: int) -> Tensor:
    """Gradient of one dilated kernel, by the undilated convolution of the phases.

    Padding with zeros makes the map's height and width multiples of the dilation.
    """
    height, width, dim = grad_output.shape[1:]
    fill_h, fill_w = -height % dilation, -width % dilation
    crop = RADIUS - dilation
    window = padded[:, crop : crop + height + 2 * dilation, crop : crop + width + 2 * dilation]
    if fill_h or fill_w:
        window = pad(window, (0, 0, 0, fill_w, 0, fill_h))
        grad_output = pad(grad_output, (0, 0, 0, fill_w, 0, fill_h))
    _, grad_kernel, _ = torch.ops.aten.convolution_backward(
        _nchw(_phases(grad_output, dilation)),
        _nchw(_phases(window, dilation)),
        kernel,
        None,
        stride=[1, 1],
        padding=[0, 0],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=dim,
        output_mask=[False, True, False],
    )
    return grad_kernel
