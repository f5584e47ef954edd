"""Lightning's checkpoints, written atomically and read without executing code from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.system.atomic import replacing

LAST, BEST = "last.ckpt", "best.ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """A file appears under its name only when it is complete and on disk.

    Lightning's own writes a file in the system's temporary folder and moves it, which is a copy
    where that is another file system, and may be half done when the process is killed.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises FileNotFoundError or WeightsError: see :func:`read_checkpoint`."""
        return read_checkpoint(path)


def build_checkpointing(folder: str | Path, period: int, metric: str) -> list[ModelCheckpoint]:
    """Callbacks that keep ``last.ckpt``, every ``period`` iterations, and ``best.ckpt``.

    Args:
        metric: the score that the best checkpoint has most of.
    """
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_top_k": 1}
    return [
        ModelCheckpoint(filename=Path(LAST).stem, every_n_train_steps=period, **common),
        ModelCheckpoint(
            filename=Path(BEST).stem,
            monitor=metric,
            mode="max",
            save_on_train_epoch_end=False,
            **common,
        ),
    ]
