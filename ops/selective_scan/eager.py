"""Selective scan in plain PyTorch, parallel over chunks of the sequence.

The sequence is cut into chunks of ``CHUNK`` tokens. All chunks advance together, one token at a
time, from a zero state; the carries between chunks are another scan, over a sequence that is
``CHUNK`` times shorter; and one fused multiply-add gives every token its carry. A sequence of L
tokens takes about ``2 CHUNK log L / log CHUNK`` tensor operations instead of L, and the working
memory is a constant number of tensors of the input's size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import accumulation_dtype, precise

# Longer chunks mean more operations one after the other, each on fewer tokens; shorter ones mean
# more levels of carries. On two cores of an AMD EPYC, 24 is fastest for the largest map of the tiny
# backbone (160 x 224 tokens, 128 channels); 8 to 64 take at most a tenth longer.
CHUNK = 24
# Up to this length the plain recursion is used, which has no carries. On the same machine, both
# ways take the same time at about 64 tokens (8 sequences, 512 channels).
SEQUENTIAL = 48
LINEAR_ABOVE = 20.0  # the threshold of PyTorch's softplus


def linear_recurrence_(decay: Tensor, drive: Tensor) -> Tensor:
    """Solve ``h_t = decay_t h_{t-1} + drive_t``, ``h_{-1} = 0``, on ``Tensor[B, L, D]``.

    Both arguments are overwritten: ``drive`` becomes ``h`` and is returned, ``decay`` is scratch.
    """
    batch, length, dim = drive.shape
    chunks = length // CHUNK if length > SEQUENTIAL else 0
    body = chunks * CHUNK
    if chunks:
        a = decay[:, :body].unflatten(1, (chunks, CHUNK))  # [B, K, T, D], views
        h = drive[:, :body].unflatten(1, (chunks, CHUNK))
        for t in range(1, CHUNK):
            h[:, :, t].addcmul_(a[:, :, t], h[:, :, t - 1])
            a[:, :, t].mul_(a[:, :, t - 1])
        carry = linear_recurrence_(a[:, :, -1].clone(), h[:, :, -1].clone())  # [B, K, D]
        h[:, 1:].addcmul_(a[:, 1:], carry[:, :-1].unsqueeze(2))
    for t in range(max(body, 1), length):
        drive[:, t].addcmul_(decay[:, t], drive[:, t - 1])
    return drive


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e)``, ``e = exp(x)``; the identity above 20.

    PyTorch's softplus and log1p are not vectorized on CPUs and take five times as long. Without
    log1p, ``log(fl(1 + e))`` loses the rounding error ``r = e - (fl(1 + e) - 1)`` of the sum;
    adding ``r / fl(1 + e)`` restores it to first order, so that the smallest steps are accurate.
    """
    e = x.clamp(max=LINEAR_ABOVE).exp_()
    one_plus_e = e + 1
    rounding_error = e.sub_(one_plus_e - 1)
    log = rounding_error.div_(one_plus_e).add_(one_plus_e.log_())
    return torch.where(x > LINEAR_ABOVE, x, log)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.selective_scan`."""
    dtype = accumulation_dtype(u)
    step = softplus(delta.to(dtype) + delta_bias.to(dtype))
    drive = (step * u).mul_(B.to(dtype).unsqueeze(-1))
    return linear_recurrence_(step.mul_(A.to(dtype)).exp_(), drive)


def linear_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """:func:`linear_recurrence_` for autograd: ``log2 L`` doublings of the reach, none in place."""
    reach = 1
    while reach < drive.shape[1]:
        far = drive[:, reach:] + decay[:, reach:] * drive[:, :-reach]
        drive = torch.cat((drive[:, :reach], far), dim=1)
        decay = torch.cat((decay[:, :reach], decay[:, reach:] * decay[:, :-reach]), dim=1)
        reach *= 2
    return drive


def differentiable_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor
) -> Tensor:
    """:func:`selective_scan` of operations that all derivatives pass through."""
    u, delta, A, B, delta_bias = precise(u, delta, A, B, delta_bias)
    step = F.softplus(delta + delta_bias)
    return linear_recurrence(torch.exp(step * A), step * u * B.unsqueeze(-1))


def selective_scan_backward(
    grad_h: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``u, delta, A, B, delta_bias``; ``h`` is recomputed unless it is given.

    With ``g_t = grad_h_t + decay_{t+1} g_{t+1}`` (the adjoint recursion, run on the flipped
    sequence): ``d drive_t = g_t`` and ``d decay_t = g_t h_{t-1}``.
    """
    dtype = accumulation_dtype(u)
    u_acc, A_acc, B_acc = u.to(dtype), A.to(dtype), B.to(dtype).unsqueeze(-1)
    biased = delta.to(dtype) + delta_bias.to(dtype)
    step = softplus(biased)
    decay = (step * A_acc).exp_()
    if h is None:
        h = linear_recurrence_(decay.clone(), (step * u_acc).mul_(B_acc))
    adjoint_decay = torch.ones_like(decay)
    adjoint_decay[:, 1:] = decay[:, 1:].flip(1)
    g = linear_recurrence_(adjoint_decay, grad_h.to(dtype).flip(1)).flip(1)

    grad_exponent = torch.zeros_like(g)  # with respect to step * A
    torch.mul(g[:, 1:], h[:, :-1], out=grad_exponent[:, 1:])
    grad_exponent.mul_(decay)
    g_step = g * step
    grad_A = (grad_exponent * step).sum((0, 1))
    grad_B = (g_step * u_acc).sum(-1)
    grad_u = g_step.mul_(B_acc)
    grad_step = g.mul_(u_acc).mul_(B_acc).addcmul_(grad_exponent, A_acc)
    slope = biased.sigmoid().masked_fill_(biased > LINEAR_ABOVE, 1)
    grad_delta = grad_step.mul_(slope)
    return (
        grad_u.to(u.dtype),
        grad_delta.to(delta.dtype),
        grad_A.to(A.dtype),
        grad_B.to(B.dtype),
        grad_delta.sum((0, 1)).to(delta_bias.dtype),
    )
