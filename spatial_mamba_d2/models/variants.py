"""Widths, depths and drop path of the published variants; no other file states them."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 64, "depths": (2, 4, 8, 4), "drop_path_rate": 0.2},
    "small": {"embed_dim": 64, "depths": (2, 4, 21, 5), "drop_path_rate": 0.3},
    "base": {"embed_dim": 96, "depths": (2, 4, 21, 5), "drop_path_rate": 0.5},
}


def variant_kwargs(variant: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of ``variant`` with ``overrides`` on top.

    Raises:
        ValueError: no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return {**VARIANTS[variant], **overrides}
