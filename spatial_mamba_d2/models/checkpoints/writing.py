"""Writing of checkpoint files: complete or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatial_mamba_d2.system.atomic import replacing


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """``torch.save``, but the file appears under its name only when it is complete and on disk.

    Raises:
        OSError: no room, or no permission: see :func:`~spatial_mamba_d2.system.atomic.replacing`.
    """
    with replacing(path, num_bytes=_num_bytes(content)) as temporary:
        torch.save(content, temporary)


def write_safetensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors as a ``.safetensors`` file, complete or not at all.

    Raises:
        OSError: as for :func:`write_checkpoint`.
    """
    from safetensors.torch import save_file

    with replacing(path, num_bytes=_num_bytes(state)) as temporary:
        save_file({name: x.contiguous() for name, x in state.items()}, temporary, {"format": "pt"})


def _num_bytes(content: Any) -> int:
    """Of the tensors in it."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, Mapping):
        content = content.values()
    elif isinstance(content, str | bytes) or not isinstance(content, Iterable):
        return 0
    return sum(map(_num_bytes, content))
