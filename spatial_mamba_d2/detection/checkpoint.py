"""Detectron2's checkpointer with safe reading, strict loading and atomic writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from spatial_mamba_d2.models.checkpoints.loading import (
    DETECTOR_BACKBONE_PREFIX,
    LoadReport,
    load_weights,
    read_checkpoint,
    translate,
    unwrap,
)
from spatial_mamba_d2.system.atomic import replacing


def load_detector_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    skip: tuple[str, ...] = (),
    source_name: str | None = None,
) -> LoadReport:
    """Load a whole detector, or only its backbone, whichever ``source`` holds.

    Args:
        model: a Detectron2 model around our backbone.
        source: a checkpoint of ours or of the authors (classification, backbone, Mask R-CNN), as a
            file or as the content of one.
        skip, source_name: see :func:`~spatial_mamba_d2.models.load_weights`.

    Raises:
        FileNotFoundError, WeightsError: see :func:`~spatial_mamba_d2.models.load_weights`.
    """
    if isinstance(source, Mapping):
        name, content = source_name or "the given state dict", source
    else:
        name, content = source_name or str(source), read_checkpoint(source)
    state = translate(unwrap(content, name), name)
    if any(key.startswith("backbone.") for key in state):
        return load_weights(model, state, skip=skip, source_name=name)
    backbone = model.get_submodule("backbone")
    has_pyramid = hasattr(backbone, "bottom_up")
    if has_pyramid:
        backbone = backbone.get_submodule("bottom_up")
    report = load_weights(backbone, state, skip=skip, source_name=name)
    prefix = DETECTOR_BACKBONE_PREFIX if has_pyramid else "backbone."
    report.loaded = [prefix + name for name in report.loaded]
    loaded = set(report.loaded)
    report.new = [name for name in model.state_dict() if name not in loaded]
    return report


class SafeCheckpointer(DetectionCheckpointer):
    """Writes checkpoints atomically; reads them without executing code from them.

    Args:
        model: a Detectron2 model around our backbone.
        save_dir: where checkpoints go.
        skip: prefixes of parameters that weights to start from do not set.
        classes: names of the classes, kept in the checkpoint for whoever predicts with it.
        **objects: training state, with ``state_dict`` and ``load_state_dict``.

    A file appears under its name only when it is complete and on disk, and ``last_checkpoint``
    names it only after that: a process killed at any moment leaves the previous one in force.
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
        """Load the weights; without ``checkpointables=[]`` also the training state, to resume.

        Returns:
            what else the file holds.

        Raises:
            FileNotFoundError, WeightsError: see :func:`load_detector_weights`.
        """
        if not path:
            self.logger.warning("MODEL.WEIGHTS is empty: training starts from random weights")
            return {}
        path = self.path_manager.get_local_path(path)
        content = read_checkpoint(path)
        resuming = checkpointables is None
        report = load_detector_weights(
            self.model, content, skip=() if resuming else self.skip, source_name=path
        )
        self.logger.info("%s", report)
        if not resuming:
            return {}
        for key, item in self.checkpointables.items():
            item.load_state_dict(content[key])
        comm.synchronize()
        known = {"model", "classes", *self.checkpointables}
        return {key: value for key, value in content.items() if key not in known}
