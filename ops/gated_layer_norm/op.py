"""``spatial_mamba::gated_layer_norm``: definition, documentation, argument checks.

Also of ``spatial_mamba::gated_layer_norm_gradients_``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor, check_written
from spatial_mamba_d2.ops._precision import empty_output
from spatial_mamba_d2.ops.gated_layer_norm import cuda, eager, reference

_NAME = "gated_layer_norm"
_GRADIENTS = f"{_NAME}_gradients_"
_extension.define(
    _NAME,
    fake=lambda y, *_: empty_output(y),
    eager=eager.gated_layer_norm,
    reference=reference.gated_layer_norm,
    eager_backward=eager.gated_layer_norm_backward,
    differentiable=eager.differentiable_gated_layer_norm,
    cuda=cuda.gated_layer_norm,
    cuda_backward=cuda.gated_layer_norm_backward,
)


def _fake_gradients(
    grad_z: Tensor,
    grad_output: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    return tuple(empty_output(x) for x in (y, y, weight, bias))


_extension.define(
    _GRADIENTS,
    fake=_fake_gradients,
    eager=eager.gated_layer_norm_gradients_,
    reference=reference.gated_layer_norm_gradients_,
    cuda=cuda.gated_layer_norm_gradients_,
)
_extension.forbid_gradients(_GRADIENTS, _NAME)


def _check(op: str, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_activation(op, "y", y, "B H W D")
    dim = y.shape[-1]
    check_tensor(op, "z", z, tuple(y.shape), "[B, H, W, D]")
    check_tensor(op, "weight", weight, (dim,), "[D]")
    check_tensor(op, "bias", bias, (dim,), "[D]")


def gated_layer_norm(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """``LayerNorm(y) * SiLU(z)``: the gate after the state space model.

    ``StructureAwareSSM.forward`` of the authors' code (``out_norm(y) * act(z)``); figure 4 of
    Spatial-Mamba (arXiv 2410.15091).

    Args:
        y: ``Tensor[B, H, W, D]``, normalized over D.
        z: the gate, ``Tensor[B, H, W, D]``; the compiled kernels copy it unless its channels are
            dense and its tokens evenly spaced.
        weight, bias: of the norm, ``Tensor[D]``.
        eps: added to the variance.

    Returns:
        ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``y``; computed in float32 (float64 for
        float64 ``y``). The backward pass keeps nothing but the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if not torch.jit.is_scripting():
        _check(_NAME, y, z, weight, bias)
    return torch.ops.spatial_mamba.gated_layer_norm(y, z, weight, bias, eps)


def gated_layer_norm_gradients_(
    grad_z: Tensor,
    grad_output: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a backward pass needs of ``output = gated_layer_norm(y, z)``, in one pass over memory.

    The gradient of ``z`` is written where it belongs: for gates that are a slice of the channels of
    a map, such as a half of the output of a linear layer. The output is computed again, because the
    gradient of the next layer's weight needs it.

    Args:
        grad_z: written: ``Tensor[B, H, W, D]`` in the dtype of ``z``, which shares no memory with
            the other arguments. The compiled kernels write it directly if its channels are dense
            and its tokens evenly spaced, as in a slice of the channels of a contiguous map; values
            between its tokens stay. Otherwise, where ``y`` has more bits, and in float16 on CPUs,
            they make a copy.
        grad_output: gradient of the output, ``Tensor[B, H, W, D]``.
        y, z, weight, bias, eps: see :func:`gated_layer_norm`.

    Returns:
        ``grad_y`` and ``output``, two ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``y``;
        ``grad_weight`` and ``grad_bias``, two ``Tensor[D]``, in the dtypes of ``weight`` and
        ``bias``. Sums are float32 (float64 if ``y`` or ``z`` is).

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: gradients are enabled and an input requires them.
    """
    _check(_GRADIENTS, y, z, weight, bias)
    check_tensor(_GRADIENTS, "grad_output", grad_output, tuple(y.shape), "[B, H, W, D]")
    check_written(_GRADIENTS, "grad_z", grad_z, "z", z)
    return torch.ops.spatial_mamba.gated_layer_norm_gradients_(
        grad_z, grad_output, y, z, weight, bias, eps
    )
