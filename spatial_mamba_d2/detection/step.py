"""One iteration of training: mixed precision on any device, accumulation, clipping."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spatial_mamba_d2.detection.pooling import use_fast_pooling
from spatial_mamba_d2.system.seeding import derive_seed, seed_all
from spatial_mamba_d2.training.guard import IterationGuard, gradient_norm


class AccumulatingTrainer(SimpleTrainer):
    """One iteration: forward and backward of each micro-batch, clipping, and the optimizer's step.

    Unlike Detectron2's ``AMPTrainer`` it runs on any device that has autocast. Losses are means
    over the micro-batches, so that accumulation changes memory, not the recipe.

    Args:
        model: its losses, by name, for a micro-batch. Its RoIAlign poolers become
            :class:`~.pooling.FastPooler`.
        data_loader: endless micro-batches.
        optimizer: of the model.
        device: of the model.
        precision: of mixed precision; None: full precision.
        accumulation_steps: micro-batches per iteration.
        seed: each iteration follows from it and its number; negative: from the past.
        clip: clips the gradients of parameters in place, and returns their norm before.

    Attributes:
        guard: ends a training whose numbers are not finite; to be set before it begins.
    """

    guard: IterationGuard

    def __init__(
        self,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        *,
        device: str,
        precision: torch.dtype | None = None,
        accumulation_steps: int = 1,
        seed: int = -1,
        clip: Callable[[Iterable[torch.Tensor]], torch.Tensor] = gradient_norm,
    ):
        use_fast_pooling(model)
        super().__init__(model, data_loader, optimizer)
        self.device_type = torch.device(device).type
        self.precision, self.accumulation_steps = precision, accumulation_steps
        self.seed, self.clip = seed, clip
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=precision is torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        micro_batches = [next(self._data_loader_iter) for _ in range(self.accumulation_steps)]
        data_time = time.perf_counter() - start
        # Sampling and drop path depend on the iteration, not on the past. Seeded after the images
        # are fetched, because the first fetch of a process draws a random number.
        if self.seed >= 0:
            seed_all(derive_seed(self.seed, "step", self.iter, comm.get_rank()))

        self.optimizer.zero_grad()
        losses: dict[str, torch.Tensor] = {}
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == self.accumulation_steps
            # TorchScript, in which fvcore has the loss of RetinaNet, rounds otherwise once it has
            # optimised itself, so that a resumed training would.
            with (
                contextlib.nullcontext() if is_last else self._no_sync(),
                torch.jit.optimized_execution(False),
            ):
                with torch.autocast(
                    self.device_type, self.precision, enabled=self.precision is not None
                ):
                    outputs = self._compute_losses(micro_batch)
                outputs = {name: value / self.accumulation_steps for name, value in outputs.items()}
                self.scaler.scale(sum(outputs.values())).backward()
            for name, value in outputs.items():
                losses[name] = losses.get(name, 0) + value.detach()
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        norm = self.clip(list(self.model.parameters()))
        self.guard.check(self.iter, losses, norm, self.optimizer.param_groups[0]["lr"])
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _compute_losses(self, micro_batch: Any) -> dict[str, Any]:
        try:
            return self.model(micro_batch)
        except FloatingPointError as error:  # Detectron2's, about boxes and scores of proposals
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(self.guard.explain(self.iter, str(error), rate)) from error

    def _no_sync(self) -> contextlib.AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "scaler": self.scaler.state_dict()}
        if hasattr(network := self._dense_detector(), "loss_normalizer"):
            state["loss_normalizer"] = network.loss_normalizer
        return state

    def _dense_detector(self) -> Any:
        """Of RetinaNet and its kind, which average their number of positive anchors, or None.

        The average is an attribute that Detectron2's checkpoints leave out. With several processes
        each has its own, and resumes with that of the first.
        """
        ddp = isinstance(self.model, DistributedDataParallel)
        network = self.model.module if ddp else self.model
        return network if isinstance(network, DenseDetector) else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])
        if "loss_normalizer" in state_dict:
            self._dense_detector().loss_normalizer = state_dict["loss_normalizer"]

    @property
    def signum(self) -> int:
        """The signal that asked one of the processes to stop, or 0."""
        return self.guard.signum

    def find_scale(self) -> float | None:
        """Of the loss, with float16."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def close_loader(self) -> None:
        """End the processes that load data."""
        self._data_loader_iter_obj = None
