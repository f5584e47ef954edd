"""``spatial_mamba::depthwise_conv3x3``: definition, documentation, argument checks.

Also of ``spatial_mamba::depthwise_conv3x3_gradients_``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor, check_written
from spatial_mamba_d2.ops._precision import empty_output
from spatial_mamba_d2.ops.depthwise_conv3x3 import cuda, eager, reference

_NAME = "depthwise_conv3x3"
_GRADIENTS = f"{_NAME}_gradients_"
_extension.define(
    _NAME,
    fake=lambda x, *_: empty_output(x),
    eager=eager.depthwise_conv3x3,
    reference=reference.depthwise_conv3x3,
    eager_backward=eager.depthwise_conv3x3_backward,
    differentiable=eager.differentiable_depthwise_conv3x3,
    cuda=cuda.depthwise_conv3x3,
    cuda_backward=cuda.depthwise_conv3x3_backward,
)
_extension.define(
    _GRADIENTS,
    fake=lambda _, grad_output, x, weight, bias, *__: (empty_output(weight), empty_output(bias)),
    eager=eager.depthwise_conv3x3_gradients_,
    reference=reference.depthwise_conv3x3_gradients_,
    cuda=cuda.depthwise_conv3x3_gradients_,
)
_extension.forbid_gradients(_GRADIENTS, _NAME)


def check_convolution(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ``ValueError`` unless these fit together as in :func:`depthwise_conv3x3`."""
    check_activation(op, "x", x, "B H W D")
    dim = x.shape[-1]
    check_tensor(op, "weight", weight, (dim, 1, 3, 3), "[D, 1, 3, 3]")
    check_tensor(op, "bias", bias, (dim,), "[D]")


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """Depthwise 3x3 convolution with zero padding, and what follows it in Spatial-Mamba's block.

    ``conv = bias[d] + sum_ij weight[d, 0, i, j] x[y + i - 1, x + j - 1, d]``; then ``x + conv``
    with ``residual`` (the block's position encodings), else ``SiLU(conv)`` (before the scan).
    ``SpatialMambaBlock.cpe1``, ``cpe2`` and ``StructureAwareSSM.conv2d`` of the authors' code.

    Args:
        x: ``Tensor[B, H, W, D]``; the compiled kernels copy it unless its channels are dense and
            its tokens evenly spaced, as in a slice of the channels of a contiguous map.
        weight: ``Tensor[D, 1, 3, 3]``.
        bias: ``Tensor[D]``.
        residual: see above.

    Returns:
        ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``x``. Sums are float32 (float64 for
        float64 ``x``). The backward pass keeps nothing but the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if not torch.jit.is_scripting():
        check_convolution(_NAME, x, weight, bias)
    return torch.ops.spatial_mamba.depthwise_conv3x3(x, weight, bias, residual)


def depthwise_conv3x3_gradients_(
    grad_x: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`depthwise_conv3x3`, that of ``x`` written where it belongs.

    For backward passes in which ``x`` is a slice of the channels of a map, such as a half of the
    output of a linear layer: the slices' gradients are written into one map, without a copy.

    Args:
        grad_x: written: ``Tensor[B, H, W, D]`` in the dtype of ``x``, which shares no memory with
            the other arguments. The compiled kernels write it directly if its channels are dense
            and its tokens evenly spaced, as in a slice of the channels of a contiguous map; values
            between its tokens stay. Otherwise, and in float16 on CPUs, they make a copy.
        grad_output: gradient of the output, ``Tensor[B, H, W, D]``.
        x, weight, bias, residual: see :func:`depthwise_conv3x3`.

    Returns:
        ``grad_weight``, ``Tensor[D, 1, 3, 3]``, and ``grad_bias``, ``Tensor[D]``, in the dtypes of
        ``weight`` and ``bias``. Sums are float32 (float64 for float64 ``x``).

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: gradients are enabled and an input requires them.
    """
    check_convolution(_GRADIENTS, x, weight, bias)
    check_tensor(_GRADIENTS, "grad_output", grad_output, tuple(x.shape), "[B, H, W, D]")
    check_written(_GRADIENTS, "grad_x", grad_x, "x", x)
    return torch.ops.spatial_mamba.depthwise_conv3x3_gradients_(
        grad_x, grad_output, x, weight, bias, residual
    )
