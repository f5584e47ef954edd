"""What is decided once per iteration, in all processes alike: go on, stop, or give up."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spatial_mamba_d2.system import stopping

logger = logging.getLogger(__name__)


class IterationGuard:
    """Checks the numbers of an iteration before the optimizer's step, and asks for signals.

    With several processes that is one reduction of three integers per iteration, so that all of
    them stop at the same one.

    Args:
        last_checkpoint: returns the path of the last good one, or None.
        find_scale: returns the scale of the loss in mixed precision with float16, or None.
        device: of the network.
    """

    def __init__(
        self,
        last_checkpoint: Callable[[], Path | None],
        find_scale: Callable[[], float | None],
        device: torch.device,
    ):
        self.last_checkpoint, self.find_scale, self.device = last_checkpoint, find_scale, device
        self.signum = 0

    def check(
        self, iteration: int, losses: Mapping[str, Tensor], norm: Tensor, rate: float
    ) -> None:
        """Call once per iteration, in all processes, before the weights change.

        Args:
            iteration: counted from 0.
            losses: of this process, by name, scalars.
            norm: of all gradients together, before clipping; a scalar.
            rate: the learning rate.

        Raises:
            FloatingPointError: a number is not finite. With float16, gradients overflow when the
                scale of the loss is too high, which then falls; it is an error at a scale of 1.
        """
        # Of all numbers and all processes one transfer from the device
        values = torch.stack([value.detach().float() for value in (*losses.values(), norm)])
        wrong = ~values.isfinite()
        flags = torch.stack([wrong[:-1].any(), wrong[-1]]).int().to(self.device)
        self.signum, bad_loss, bad_norm = reduce_max(stopping.requested(), flags)
        scale = self.find_scale() if bad_norm else None
        if not bad_loss and not (bad_norm and (scale is None or scale <= 1)):
            return
        *numbers, norm_value = values.tolist()
        bad = [name for name, x in zip(losses, numbers, strict=True) if not math.isfinite(x)]
        if not math.isfinite(norm_value) and (scale is None or scale <= 1):
            bad.append("the norm of the gradients")
        shown = ", ".join(f"{n} {x:.4g}" for n, x in zip(losses, numbers, strict=True))
        what = f"not finite: {', '.join(bad) or 'numbers of another process'}; losses: {shown}; "
        what += f"norm of the gradients {norm_value:.4g}"
        if scale is not None:
            what += f"; scale of the loss {scale:.4g}"
        raise FloatingPointError(self.explain(iteration, what, rate))

    def explain(self, iteration: int, what: str, rate: float) -> str:
        """Why the training ended, and what a user can do."""
        return (
            f"training diverged at iteration {iteration}: {what}; learning rate {rate:.4g}. Last "
            f"good checkpoint: {self.last_checkpoint() or 'none'}. A lower SOLVER.BASE_LR, a "
            "longer warmup, or SOLVER.CLIP_GRADIENTS.ENABLED may help"
        )


def reduce_max(signum: int, flags: Tensor) -> list[int]:
    """The maxima over all processes: of ``signum``, then of ``flags`` int[N], on their device."""
    tensor = torch.cat([torch.tensor([signum]).to(flags, non_blocking=True), flags])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


def gradient_norm(parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """Of all gradients together, a scalar on the parameters' device."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        return nn.utils.get_total_norm(gradients, norm_type)
    return torch.zeros((), device=parameters[0].device if parameters else None)


def clip_norm(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients in place so that their norm together is at most ``max_norm``.

    Args:
        max_norm: 0 leaves them as they are.

    Returns:
        the norm before, as :func:`gradient_norm`.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters, norm_type)
    # On a CPU, multiplying all gradients by 1 takes as long as a third of the optimizer's step; on
    # other devices, reading the norm would synchronize with them.
    if max_norm and not (norm.device.type == "cpu" and norm <= max_norm):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def require_finite_weights(state: Mapping[str, Tensor], what: str) -> None:
    """All floating point values of a state dict are finite.

    Raises:
        FloatingPointError: they are not; names ``what`` and the first such tensor.
    """
    tensors = {n: t.detach() for n, t in state.items() if t.is_floating_point()}
    if torch.isfinite(nn.utils.get_total_norm([*tensors.values()])):
        return
    # finite values can have a norm that is not
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise FloatingPointError(
            f"{what}: {len(bad)} tensors have values that are not finite, such as {bad[0]}"
        )


def is_child_of_lightning() -> bool:
    """Whether Lightning in the first process of this machine has started this one.

    It kills the first one when such a process ends with an error, which then cannot say its own.
    """
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ
