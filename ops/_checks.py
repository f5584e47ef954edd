"""Argument checks shared by the public operator functions."""

from __future__ import annotations

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_floating_point(op: str, name: str, x: torch.Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")


def check_finite(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ``RuntimeError`` if there is NaN or infinity."""
    if not x.isfinite().all():
        raise RuntimeError(f"{op}: {name} must be finite")


def check_tensor(op: str, name: str, x: torch.Tensor, shape: tuple[int, ...], like: str) -> None:
    """Raise ``ValueError`` unless ``x`` is floating point and has ``shape``.

    ``like`` is the shape in symbols, for the message.
    """
    _check_floating_point(op, name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must be {like} = {list(shape)}, got {list(x.shape)}")


def check_written(op: str, name: str, written: torch.Tensor, of: str, x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``written`` has the shape and dtype of ``x``, called ``of``."""
    for what in ("shape", "dtype"):
        expected, found = getattr(x, what), getattr(written, what)
        if found != expected:
            expected, found = (list(v) if what == "shape" else v for v in (expected, found))
            raise ValueError(f"{op}: {name} must have the {what} of {of}, {expected}, got {found}")


def check_activation(op: str, name: str, x: torch.Tensor, dims: str) -> None:
    """Raise ``ValueError`` unless ``x`` is floating point, with one axis per word of ``dims``."""
    axes = dims.split()
    _check_floating_point(op, name, x)
    if x.dim() != len(axes) or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: {name} must be [{', '.join(axes)}] with no empty axis except the batch, "
            f"got {list(x.shape)}"
        )
