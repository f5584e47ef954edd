"""Resuming with the settings of now: which differ from the run's, and what that means."""

from __future__ import annotations

import copy
import fnmatch
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from spatial_mamba_d2.config import differing_values
from spatial_mamba_d2.training.run_folder import CONFIG

logger = logging.getLogger(__name__)

# Key pattern -> what another value means for a resumed training; the first that fits counts.
_EFFECTS = (
    ("OUTPUT_DIR", None),  # the folder may have been moved
    ("MODEL.WEIGHTS*", "without effect: a resumed training has its own weights"),
    ("SOLVER.IMS_PER_BATCH",
     "counts from here on: the stream of images continues at iteration x batch size of now, so "
     "some images of this pass are repeated or left out; learning rates that scale with it change"),
    ("SOLVER.ACCUMULATION_STEPS", "counts from here on; the same images in other micro-batches"),
    ("SOLVER.EMA_DECAY", "counts from here on; a new average starts at the weights of now"),
    ("SOLVER.*_PERIOD", "counts from here on"),
    ("SOLVER.*_EPOCHS", "counts from here on: warmup, evaluations and checkpoints follow it"),
    ("SOLVER.AMP.*", "counts from here on"),
    ("SOLVER.LOGGERS", "counts from here on"),
    ("SOLVER.UNFREEZE_ITER", "counts from here on"),
    ("SOLVER.CLIP_GRADIENTS.*", "counts from here on"),
    ("SOLVER.*", "counts from here on: the learning rate is that of the new schedule"),
    ("SEED", "counts from here on: other order and augmentations than without the change"),
    ("DATASETS.*", "counts from here on; the network has seen the other data"),
    ("INPUT.*", "counts from here on"),
    ("TEST.*", "counts from here on: scores before and after may not be comparable"),
    ("MODEL.DEVICE", None),
    ("MODEL.*", "counts from here on"),
)  # fmt: skip


def differing_keys(folder: str | Path, cfg: Any) -> dict[str, tuple[Any, Any]]:
    """``{key: (value of the run in folder, value of cfg)}`` by the run's ``config.yaml``.

    Keys that only one of the two has are left out: they are of another version of this package.
    """
    path = Path(folder, CONFIG)
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s cannot be read; settings are not compared: %s", path, error)
        return {}
    old = before if isinstance(before, Mapping) else {}
    return differing_values(old, yaml.safe_load(cfg.dump()))


def tell_differences(differences: Mapping[str, tuple[Any, Any]], folder: str | Path) -> None:
    """Log each differing key with both values and the effect."""
    lines = []
    for key, (old, new) in differences.items():
        effects = (text for pattern, text in _EFFECTS if fnmatch.fnmatch(key, pattern))
        effect = next(effects, "counts from here on")
        if effect is not None:
            lines.append(f"  {key}: {old} -> {new}: {effect}")
    if lines:
        logger.warning(
            "resuming with other settings than in %s:\n%s", Path(folder, CONFIG), "\n".join(lines)
        )


def require_training_state(
    content: Mapping[str, Any], names: Iterable[str], checkpoint: str | Path
) -> None:
    """Raises ValueError if a file has not all that a training needs to go on."""
    if missing := [name for name in names if name not in content]:
        raise ValueError(
            f"{checkpoint} is no checkpoint of a training: {', '.join(missing)} must be in it. To "
            "start from weights, set MODEL.WEIGHTS to them"
        )


def require_same_network(
    state: Mapping[str, Any],
    model: torch.nn.Module,
    differences: Mapping[str, tuple[Any, Any]],
    checkpoint: str | Path,
    *,
    num_trained: tuple[int, int] | None = None,
) -> None:
    """The parameters of a checkpoint have the names and shapes of the model's.

    Args:
        state: of the checkpoint, ``{name: Tensor}``.
        differences: from :func:`differing_keys`; the message names those of the network.
        num_trained: how many parameters the optimizer has in the checkpoint, and in the model.

    Raises:
        ValueError: they differ.
    """
    shapes = {name: tuple(v.shape) for name, v in state.items() if isinstance(v, Tensor)}
    ours = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    wrong = [name for name in {**ours, **shapes} if ours.get(name) != shapes.get(name)]
    if not wrong and (num_trained is None or num_trained[0] == num_trained[1]):
        return
    keys = [key for key in differences if key.startswith("MODEL.") or key.endswith("CLASSES")]
    keys = [key for key in keys if not key.startswith(("MODEL.WEIGHTS", "MODEL.DEVICE"))]
    named = "; ".join(f"{key} was {differences[key][0]}, is {differences[key][1]}" for key in keys)
    if wrong:
        what = f"{len(wrong)} parameters differ, such as {wrong[0]} "
        what += f"({shapes.get(wrong[0], 'absent')} there, {ours.get(wrong[0], 'absent')} now)"
    else:
        what = f"{num_trained[0]} parameters were trained, {num_trained[1]} are now"  # type: ignore[index]
    raise ValueError(
        f"--resume: {checkpoint} is of another network: {what}. "
        f"{named or 'No key of its config.yaml explains it'}. Use the run's settings, or another "
        "OUTPUT_DIR with MODEL.WEIGHTS for a new training; nothing was changed"
    )


def require_same_classes(
    saved: Sequence[str] | None, ours: Sequence[str] | None, checkpoint: str | Path
) -> None:
    """Raises ValueError if a checkpoint has names of classes, and they are not the data's."""
    if saved and list(saved) != list(ours or ()):
        raise ValueError(
            f"--resume: {checkpoint} was trained for the classes {', '.join(saved)}, the data now "
            f"has {', '.join(ours or ())}; nothing was changed"
        )


def count_trained(optimizer_state: Mapping[str, Any]) -> int:
    """How many parameters an optimizer has, by its state dict."""
    return sum(len(group["params"]) for group in optimizer_state["param_groups"])


def require_iterations_left(done: int, iterations: int, key: str, checkpoint: str | Path) -> None:
    """Raises ValueError if a training was resumed that is longer already than ``key`` says."""
    if done > iterations:
        raise ValueError(
            f"{key} must be at least the {done} iterations that {checkpoint} has behind it, "
            f"got {iterations} iterations"
        )


class ConfiguredSchedule:
    """Settings of an optimizer and its schedule that stay when a checkpoint's state is loaded.

    PyTorch, Detectron2 and timm keep learning rates, decay and base rates in their states. Loading
    those would silently go on with the old settings, or mix them with the new ones.

    Args:
        optimizer, scheduler: as they were built from the configuration, at iteration 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any):
        self.optimizer, self.scheduler = optimizer, scheduler
        self.groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self.schedule = copy.copy(scheduler.state_dict())

    def restore(self, iteration: int) -> None:
        """The learning rate becomes that of this configuration for ``iteration``; tell changes."""
        before = self.optimizer.param_groups[0]["lr"]
        for group, settings in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(settings)
        self.scheduler.load_state_dict(self.schedule)
        if isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler):
            self.scheduler.last_epoch = iteration - 1
            with warnings.catch_warnings():  # the optimizer has made no step in this process
                warnings.simplefilter("ignore")
                self.scheduler.step()
        else:
            self.scheduler.step_update(iteration)
        now = self.optimizer.param_groups[0]["lr"]
        if abs(now - before) > 1e-6 * max(abs(now), abs(before)):
            logger.warning(
                "learning rate at iteration %d: %.6g by the run so far, "
                "%.6g by the settings of now",
                iteration, before, now,
            )  # fmt: skip
        else:
            logger.info("learning rate at iteration %d: %.6g", iteration, now)
