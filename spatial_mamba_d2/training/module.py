"""The Lightning module that segmentation and classification build on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from fvcore.common.config import CfgNode
from timm.utils import ModelEmaV3
from torch import nn

from spatial_mamba_d2.system.atomic import replacing


class TrainingModule(lightning.LightningModule):
    """A network, with the moving average of its weights where ``SOLVER.EMA_DECAY`` asks for one.

    Its state dict is that of the network that is evaluated: the average, if there is one. A
    checkpoint then has the network in training under ``training_model``. Dropout, drop path and
    mixing of images depend on the seed and the iteration, not on the past: resuming is exact.

    Args:
        cfg: with ``SEED``, ``OUTPUT_DIR`` and ``SOLVER.{EMA_DECAY, ACCUMULATION_STEPS}``.
        model: the network.

    Attributes:
        weights_source: of an evaluation without training, for the report.
        scores: of the last evaluation, ``{name: percent}``.
        evaluated_step: the iteration it took place after; -1 before the first.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        super().__init__()
        self.cfg = cfg
        self.model = model
        self.average: ModelEmaV3 | None = None
        if cfg.SOLVER.EMA_DECAY:
            self.average = ModelEmaV3(model, cfg.SOLVER.EMA_DECAY).requires_grad_(False)
        self.weights_source = "random weights"
        self.scores: dict[str, float] = {}
        self.evaluated_step = -1

    @property
    def evaluated(self) -> nn.Module:
        """The network that evaluation uses and checkpoints hold first."""
        return self.model if self.average is None else self.average.module

    @property
    def evaluated_weights(self) -> str:
        """Where those of the last evaluation came from, for the report."""
        trained = self.evaluated_step > 0
        return f"iteration {self.evaluated_step}" if trained else self.weights_source

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.evaluated.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.evaluated.load_state_dict(state_dict, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.average is not None:
            checkpoint["training_model"] = self.model.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        in_training = checkpoint.get("training_model", checkpoint["state_dict"])
        self.model.load_state_dict(in_training)
        if self.average is None:
            checkpoint["state_dict"] = in_training

    def on_train_start(self) -> None:
        if self.average is not None and self.trainer.global_step == 0:
            self.average.set(self.model)  # which may have got its weights after the copy was made

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        parts = self.cfg.SOLVER.ACCUMULATION_STEPS
        turn = self.trainer.global_step * parts + batch_idx % parts
        seed = self.cfg.SEED * 1_000_003 + turn * 1009 + self.global_rank
        torch.manual_seed(seed % 2**63)
        np.random.seed(seed % 2**32)  # timm mixes images by it

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.model)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:  # running statistics of batch norm may differ
            networks = [self.model] if self.average is None else [self.model, self.evaluated]
            for network in networks:  # in the same order everywhere
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, 0)

    def sum_over_processes(self, number: int) -> int:
        tensor = torch.tensor(number, device=self.device)
        return int(self.trainer.strategy.reduce(tensor, reduce_op="sum"))

    def finish_evaluation(self, scores: dict[str, float]) -> None:
        """Keep and log scores that are the same in all processes."""
        self.scores = scores
        self.evaluated_step = self.trainer.global_step
        self.log_dict(scores, sync_dist=True)

    def write_scores(self, name: str, content: dict[str, Any]) -> Path:
        """Write ``OUTPUT_DIR/scores_{name}.json``: which weights they are of, scores, content."""
        content = {
            "weights": self.evaluated_weights,
            "data": f"{self.cfg.DATASETS.ROOT} {self.cfg.DATASETS.TEST}",
            **self.scores,
            **content,
        }
        path = Path(self.cfg.OUTPUT_DIR, f"scores_{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return path
