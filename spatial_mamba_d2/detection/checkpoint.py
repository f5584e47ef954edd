"""Detectron2's checkpointer with safe reading, strict loading and atomic writing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from spatial_mamba_d2.data.class_file import compare_class_names
from spatial_mamba_d2.detection.training_hooks import WeightAverage
from spatial_mamba_d2.models import load_weights, read_checkpoint
from spatial_mamba_d2.models.checkpoints.writing import write_checkpoint
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.training.guard import require_finite_weights
from spatial_mamba_d2.training.resuming import require_training_state
from spatial_mamba_d2.training.run_folder import BEST_SCORE, DETECTION_BEST, LAST_MARK


class SafeCheckpointer(DetectionCheckpointer):
    """Writes checkpoints atomically; reads them without executing code from them.

    Args:
        model: a Detectron2 model around our backbone.
        save_dir: where checkpoints go.
        skip: prefixes of parameters that keep their initial values when a training starts.
        classes: names of the classes, which are kept in the checkpoint for prediction.
        config: the configuration as YAML, which is kept for the same reason.
        **objects: training state, with ``state_dict`` and ``load_state_dict``.

    A file appears under its name only when it is complete and on disk, and ``last_checkpoint``
    names it only after that: a process killed at any moment leaves the previous one valid.

    Attributes:
        average: of the weights, if there is one. It is saved as the model, and the weights in
            training as the state of the average.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        skip: tuple[str, ...] = (),
        classes: list[str] | None = None,
        config: str | None = None,
        **objects: Any,
    ):
        super().__init__(model, save_dir, **objects)
        self.skip = skip
        self.classes = classes
        self.config = config
        self.average: WeightAverage | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Raises OSError if there is no room, FloatingPointError if weights are not finite."""
        if not self.save_dir or not self.save_to_disk:
            return
        require_finite_weights(self.model.state_dict(), f"weights for {name}")
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        with self._evaluated_weights(name) as content:
            content.update({key: item.state_dict() for key, item in self.checkpointables.items()})
            content.update(kwargs)
            write_checkpoint(content, path)
        self.tag_last_checkpoint(path.name)

    def save_best(self, score: float, iteration: int) -> None:
        """Write the weights as ``model_best.pth``, with the score that made them the best."""
        if self.save_dir and self.save_to_disk:
            with self._evaluated_weights(DETECTION_BEST) as content:
                content.update({BEST_SCORE: score, "iteration": iteration})
                write_checkpoint(content, Path(self.save_dir) / DETECTION_BEST)

    @contextmanager
    def _evaluated_weights(self, name: str) -> Iterator[dict[str, Any]]:
        """What evaluation and prediction need; within it, the average has the other weights."""
        with self.average.applied() if self.average else nullcontext():
            state = self.model.state_dict()
            require_finite_weights(state, f"weights for {name}")
            yield {"model": state, "classes": self.classes, "config": self.config}

    def read_best_score(self) -> float:
        """Of ``model_best.pth``; minus infinity if there is none.

        Raises:
            ValueError: the file is not of a training.
        """
        path = Path(self.save_dir) / DETECTION_BEST
        if not path.is_file():
            return -math.inf
        content = read_checkpoint(path)
        require_training_state(content, [BEST_SCORE], path)
        return float(content[BEST_SCORE])

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(Path(self.save_dir) / LAST_MARK) as temporary:
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
            names = content.get("classes") if report.has_class_layers else None
            if difference := compare_class_names(
                names, self.classes, path, where="the data", order_counts=False
            ):
                self.logger.warning("%s", difference)
            return {}
        for key, item in self.checkpointables.items():
            item.load_state_dict(content[key])
        comm.synchronize()
        known = {"model", "classes", "config", *self.checkpointables}
        return {key: value for key, value in content.items() if key not in known}
