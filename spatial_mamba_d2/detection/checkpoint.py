"""Detectron2's checkpointer with safe reading, strict loading and atomic writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from spatial_mamba_d2.models import load_weights, read_checkpoint
from spatial_mamba_d2.system.atomic import replacing


class SafeCheckpointer(DetectionCheckpointer):
    """Writes checkpoints atomically; reads them without executing code from them.

    Args:
        model: a Detectron2 model around our backbone.
        save_dir: where checkpoints go.
        skip: prefixes of parameters that keep their initial values when a training starts.
        classes: names of the classes, which are kept in the checkpoint for prediction.
        **objects: training state, with ``state_dict`` and ``load_state_dict``.

    A file appears under its name only when it is complete and on disk, and ``last_checkpoint``
    names it only after that: a process killed at any moment leaves the previous one valid.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        skip: tuple[str, ...] = (),
        classes: list[str] | None = None,
        **objects: Any,
    ):
        super().__init__(model, save_dir, **objects)
        self.skip = skip
        self.classes = classes

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict(), "classes": self.classes}
        content.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        content.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        with replacing(path) as temporary:
            torch.save(content, temporary)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(Path(self.save_dir) / "last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights to start from, or without ``checkpointables=[]`` all training state.

        Returns:
            what else the file holds.

        Raises:
            FileNotFoundError, ValueError: see :func:`~spatial_mamba_d2.models.load_weights`.
        """
        if not path:
            self.logger.warning("MODEL.WEIGHTS is empty: training starts from random weights")
            return {}
        path = self.path_manager.get_local_path(path)
        content = read_checkpoint(path)
        resuming = checkpointables is None
        skip = () if resuming else self.skip
        report = load_weights(
            self.model, content, skip=skip, partial=not resuming, source_name=path
        )
        self.logger.info("%s", report)
        if not resuming:
            return {}
        for key, item in self.checkpointables.items():
            item.load_state_dict(content[key])
        comm.synchronize()
        known = {"model", "classes", *self.checkpointables}
        return {key: value for key, value in content.items() if key not in known}
