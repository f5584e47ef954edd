"""The Lightning module that segmentation and classification build on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from fvcore.common.config import CfgNode
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.seeding import derive_seed, seed_all
from spatial_mamba_d2.training.guard import IterationGuard, clip_norm, require_finite_weights
from spatial_mamba_d2.training.resuming import ConfiguredSchedule
from spatial_mamba_d2.training.run_folder import LAST


@dataclass(frozen=True)
class Schedule:
    """When a training ends, evaluates and saves; all in iterations.

    Attributes:
        iterations: length of the training.
        eval_period: from one evaluation to the next; 0: only at the end.
        checkpoint_period: from one ``last.ckpt`` to the next.
    """

    iterations: int
    eval_period: int
    checkpoint_period: int

    def evaluates_after(self, iteration: int) -> bool:
        """Whether an evaluation follows when so many iterations are done."""
        at_period = bool(self.eval_period) and iteration % self.eval_period == 0
        return at_period or iteration == self.iterations


class TrainingModule(lightning.LightningModule):
    """A network, with a moving average of its weights if ``SOLVER.EMA_DECAY`` asks for one.

    Its state dict is that of the network that is evaluated: the average, if there is one. A
    checkpoint then has the network in training under ``training_model``. Dropout, drop path and
    mixing of images depend on the seed and the iteration, not on the past: resuming is exact.

    Args:
        cfg: with ``SEED``, ``OUTPUT_DIR`` and ``SOLVER.{EMA_DECAY, ACCUMULATION_STEPS}``.
        model: the network.
        schedule: of the training.

    Attributes:
        class_names: of the data.
        main_score: name of the score by which ``best.ckpt`` is chosen.
        weights_source: of an evaluation without training, for the report.
        scores: of the last evaluation, ``{name: percent}``.
        evaluated_step: the iteration it took place after; -1 before the first.
        losses: of the last iteration, means over its micro-batches.
        rate: the learning rate of the last iteration.
        iteration_start: time at which the one that runs began to wait for its images.
    """

    main_score: str
    class_names: tuple[str, ...] = ()

    def __init__(self, cfg: CfgNode, model: nn.Module, schedule: Schedule):
        super().__init__()
        self.cfg = cfg
        self.model = model
        self.schedule = schedule
        self.ema: ModelEmaV3 | None = None
        if cfg.SOLVER.EMA_DECAY:
            self.ema = ModelEmaV3(model, cfg.SOLVER.EMA_DECAY).requires_grad_(False)
        self.weights_source = "random weights"
        self.scores: dict[str, float] = {}
        self.evaluated_step = -1
        self.losses: dict[str, Tensor] = {}
        self.rate = 0.0
        self.guard: IterationGuard | None = None  # in training
        self.iteration_start = 0.0
        self.loaded_step = 0  # of the checkpoint that was loaded

    @property
    def iteration(self) -> int:
        """How many are done, also when a checkpoint is evaluated without training."""
        return max(self.trainer.global_step, self.loaded_step)

    @property
    def learning_rate(self) -> float:
        return self.trainer.optimizers[0].param_groups[0]["lr"]

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that evaluation uses and checkpoints hold first."""
        return self.model if self.ema is None else self.ema.module

    @property
    def evaluated_weights(self) -> str:
        """Origin of the weights of the last evaluation, for the report."""
        trained = self.evaluated_step > 0
        return f"iteration {self.evaluated_step}" if trained else self.weights_source

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.evaluated_model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.evaluated_model.load_state_dict(state_dict, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.require_finite_weights()
        checkpoint["config"] = self.cfg.dump()
        if self.ema is not None:
            checkpoint["training_model"] = self.model.state_dict()

    def require_finite_weights(self) -> None:
        """Raises FloatingPointError if a weight, of the moving average too, is not finite."""
        networks = {"network": self.model}
        if self.ema is not None:
            networks["moving average"] = self.ema.module
        for name, network in networks.items():
            what = f"weights of the {name} after iteration {self.iteration}"
            require_finite_weights(network.state_dict(), what)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_step = int(checkpoint.get("global_step", 0))
        in_training = checkpoint.get("training_model", checkpoint["state_dict"])
        self.model.load_state_dict(in_training)
        if self.ema is None:
            # After this hook Lightning calls load_state_dict with what it finds here: without an
            # average it must not be the checkpoint's.
            checkpoint["state_dict"] = in_training
        if "loops" in checkpoint:
            self._count_in_micro_batches_of_now(checkpoint["loops"])

    def _count_in_micro_batches_of_now(self, loops: dict[str, Any]) -> None:
        """Lightning counts micro-batches, and ends iterations and evaluates by their number."""
        done = self.loaded_step * self.cfg.SOLVER.ACCUMULATION_STEPS
        for progress in loops["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(progress, dict):  # "total" and "current"
                # Saved before the last one counts as completed, unless it was in an evaluation.
                open_ones = progress["processed"] - progress["completed"]
                progress.update(dict.fromkeys(("ready", "started", "processed"), done))
                progress["completed"] = done - open_ones

    def on_fit_start(self) -> None:
        """Before the state of a checkpoint is loaded into optimizer and schedule."""
        (scheduler,) = (config.scheduler for config in self.trainer.lr_scheduler_configs)
        self.configured = ConfiguredSchedule(self.trainer.optimizers[0], scheduler)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        last = Path(self.cfg.OUTPUT_DIR, LAST)
        self.guard = IterationGuard(
            last_checkpoint=lambda: last if last.is_file() else None,
            find_scale=lambda: None if scaler is None else scaler.get_scale(),
            device=self.device,
        )

    def on_train_start(self) -> None:
        self.iteration_start = time.perf_counter()
        if self.trainer.global_step:
            self.configured.restore(self.trainer.global_step)
        elif self.ema is not None:
            self.ema.set(self.model)  # the weights may have been loaded after the copy was made

    def report_losses(self, loss: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Log the loss of a micro-batch, its parts and the learning rate; returns ``loss``."""
        parts = {name: part.detach() for name, part in parts.items()}
        self.log("loss", loss.detach(), prog_bar=True)
        self.rate = self.learning_rate
        self.log_dict({**parts, "lr": self.rate})
        for name, value in {"loss": loss.detach(), **parts}.items():
            share = value / self.cfg.SOLVER.ACCUMULATION_STEPS
            self.losses[name] = self.losses[name] + share if name in self.losses else share
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients together; check that the iteration's numbers are finite.

        Raises:
            FloatingPointError: they are not: see :class:`~.guard.IterationGuard`.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_norm(parameters, gradient_clip_val or 0)
        assert self.guard is not None
        self.guard.check(self.trainer.global_step, self.losses, norm, self.rate)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        num_micro_batches = self.cfg.SOLVER.ACCUMULATION_STEPS
        if batch_idx % num_micro_batches == 0:
            self.losses = {}
        micro_batch = self.trainer.global_step * num_micro_batches + batch_idx % num_micro_batches
        seed_all(derive_seed(self.cfg.SEED, "step", micro_batch, self.global_rank))

    def ends_iteration(self, batch_idx: int) -> bool:
        """Whether this micro-batch is the last one of an iteration."""
        return (batch_idx + 1) % self.cfg.SOLVER.ACCUMULATION_STEPS == 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the callbacks, so that the time in which they write checkpoints is not counted."""
        if self.ends_iteration(batch_idx):
            self.iteration_start = time.perf_counter()

    def on_validation_end(self) -> None:
        self.iteration_start = time.perf_counter()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model)

    def on_validation_epoch_start(self) -> None:
        self.require_finite_weights()
        if self.trainer.world_size > 1:  # running statistics of batch norm may differ
            networks = [self.model] if self.ema is None else [self.model, self.evaluated_model]
            for network in networks:  # in the same order in all processes
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, 0)

    def sum_over_processes(self, count: int) -> int:
        tensor = torch.tensor(count, device=self.device)
        return int(self.trainer.strategy.reduce(tensor, reduce_op="sum"))

    def finish_evaluation(self, scores: dict[str, float]) -> None:
        """Keep and log scores, which must be the same in all processes."""
        self.scores = scores
        self.evaluated_step = self.iteration
        # Lightning takes "step" as the iteration of these scores: the last one that is done.
        self.log_dict({**scores, "step": float(max(0, self.iteration - 1))}, sync_dist=True)

    def write_scores(self, name: str, content: dict[str, Any]) -> Path:
        """Write ``OUTPUT_DIR/scores_{name}.json``: origin of the weights, scores, ``content``."""
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
