"""The settings of a fine-tuning, each with its reason; they are written to a configuration file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spatial_mamba_d2.finetuning.data_facts import DataFacts

RECIPES = {
    "detection": "mask_rcnn_spatial_mamba_",
    "segmentation": "upernet_spatial_mamba_",
    "classification": "spatial_mamba_",
}
# Recipes of small models with narrow heads that learn from random weights on a CPU.
SMALL_RECIPES = {
    "detection": "demo_mask_rcnn_spatial_mamba_t",
    "segmentation": "demo_upernet_spatial_mamba_t",
    "classification": "demo_spatial_mamba_t",
}
SIZES = {"t": "tiny", "s": "small", "b": "base"}
# Layers with an output for each class, which another set of classes trains from scratch.
CLASS_LAYERS = {
    "detection": ("roi_heads.box_predictor", "roi_heads.mask_head.predictor"),
    "segmentation": ("decode_head.classify", "auxiliary_head.classify"),
    "classification": ("head.",),
}
DEFAULT_EPOCHS = {"detection": 24, "segmentation": 40, "classification": 30}
LEAST_ITERATIONS = 20
MOST_CPU_PX = 512  # short side of images on CPUs
MOST_EVALUATIONS = 10  # in a training
_EMA_ITERATIONS = 1000  # from which on a moving average is used
_PATIENCE = 4  # evaluations without a better score


@dataclass(frozen=True)
class Setting:
    """The value of a configuration key and the reason for it."""

    value: Any
    reason: str = ""


Settings = dict[str, Setting]


@dataclass(frozen=True)
class Situation:
    """What the settings depend on.

    Attributes:
        task: ``detection``, ``segmentation`` or ``classification``.
        facts: of the data.
        start: what the weights are: ``random``, ``backbone`` (also of a classifier) or ``model``.
        on_gpu: whether there is a GPU.
        batch: images of an iteration.
        iterations: of the training.
        num_evaluations: in it, at most; no epoch has two.
    """

    task: str
    facts: DataFacts
    start: str
    on_gpu: bool
    batch: int
    iterations: int
    num_evaluations: int = MOST_EVALUATIONS

    @property
    def is_small(self) -> bool:
        """Whether the model is a small one, from random weights on a CPU."""
        return self.start == "random" and not self.on_gpu

    @property
    def epoch_iterations(self) -> int:
        return max(1, self.facts.num_images // self.batch)


def recipe_of(task: str, size: str, is_small: bool) -> str:
    """The name of the recipe that a configuration inherits from."""
    return SMALL_RECIPES[task] if is_small else f"{RECIPES[task]}{size}"


def default_batch(task: str, on_gpu: bool, start: str, num_images: int) -> int:
    """Images of an iteration to try first; at most a quarter of the training images."""
    batch = {"detection": 8, "segmentation": 8, "classification": 64}[task] if on_gpu else {
        "detection": 4, "segmentation": 4, "classification": 20}[task]  # fmt: skip
    return max(2 if task == "segmentation" else 1, min(batch, num_images // 4))


def choose(situation: Situation) -> Settings:
    """All settings except those of the data's files and the weights."""
    specific: Callable[[Situation], Settings] = {
        "detection": _detection,
        "segmentation": _segmentation,
        "classification": _classification,
    }[situation.task]
    settings: Settings = {"SOLVER.IMS_PER_BATCH": Setting(situation.batch)}
    settings |= specific(situation)
    if situation.start != "random" and situation.batch < 8:
        settings["MODEL.SPATIAL_MAMBA.BN"] = Setting(
            "frozen", f"statistics of {situation.batch} images are noise; the weights have better"
        )
    return settings


def _input_px(situation: Situation, most: int) -> Setting:
    """The short side of images in training and evaluation."""
    facts = situation.facts
    limit = most if situation.on_gpu else min(most, MOST_CPU_PX)
    px = min(limit, facts.short_px)
    reason = f"median short side of the images {facts.short_px}, at most {limit}"
    if facts.object_px and facts.object_px * px / facts.short_px < 12 and px == facts.short_px:
        px = min(limit, 2 * facts.short_px)
        reason += f"; enlarged, because a tenth of the objects are below {facts.object_px:.0f} px"
    return Setting(max(32, px), reason)


def _evaluation_period(situation: Situation) -> int:
    period = max(
        situation.epoch_iterations, math.ceil(situation.iterations / situation.num_evaluations)
    )
    return min(period, situation.iterations)


def _detection(s: Situation) -> Settings:
    short = _input_px(s, 800)
    if s.is_small:
        short = Setting(min(short.value, 112), "small images, as in the demo, on a CPU")
    long_px = round(short.value * max(1333 / 800, s.facts.long_px / s.facts.short_px))
    settings = {
        "INPUT.MIN_SIZE_TRAIN": Setting((short.value,), short.reason),
        "INPUT.MIN_SIZE_TEST": short,
        "INPUT.MAX_SIZE_TRAIN": Setting(long_px),
        "INPUT.MAX_SIZE_TEST": Setting(long_px),
    }
    if s.start != "model" and s.facts.object_px:
        scale = short.value / s.facts.short_px
        smallest = 2 ** round(math.log2(max(8.0, min(32.0, 1.5 * s.facts.object_px * scale))))
        settings["MODEL.ANCHOR_GENERATOR.SIZES"] = Setting(
            [[smallest * 2**level] for level in range(5)],
            f"a tenth of the objects are below {s.facts.object_px * scale:.0f} px in the network",
        )
    rate = 1e-3 * math.sqrt(s.batch / 4) if s.start == "random" else 1e-4 * math.sqrt(s.batch / 16)
    settings |= _rate(s, rate)
    settings["SOLVER.LR_SCHEDULER_NAME"] = Setting("WarmupCosineLR")
    settings["SOLVER.STEPS"] = Setting(())
    settings["SOLVER.CLIP_GRADIENTS.ENABLED"] = Setting(True)
    settings["SOLVER.CLIP_GRADIENTS.CLIP_VALUE"] = Setting(5.0)
    period = _evaluation_period(s)
    settings["TEST.EVAL_PERIOD"] = Setting(period, "the best of them is kept: model_best.pth")
    settings["SOLVER.CHECKPOINT_PERIOD"] = Setting(period)
    return settings | _patience(s, s.iterations // period)


def _patience(s: Situation, num_evaluations: int) -> Settings:
    """From random weights, the first scores may all be 0."""
    if s.start == "random" or num_evaluations <= _PATIENCE:
        return {}
    return {"TEST.PATIENCE": Setting(_PATIENCE, "early stopping, in evaluations")}


def _rate(s: Situation, rate: float) -> Settings:
    reasons = {
        "random": "from random weights",
        "backbone": "the recipe's, times the root of the batch's share",
        "model": "the recipe's, times the root of the batch's share",
    }
    settings = {
        "SOLVER.BASE_LR": Setting(float(f"{rate:.3g}"), f"{reasons[s.start]}, batch {s.batch}"),
        "SOLVER.MAX_ITER": Setting(
            s.iterations, f"{s.iterations / s.epoch_iterations:.1f} epochs of {s.facts.num_images} "
            "images"
        ),
        "SOLVER.WARMUP_ITERS": Setting(min(1000, max(1, s.iterations // 10))),
    }  # fmt: skip
    if s.iterations >= _EMA_ITERATIONS:
        settings["SOLVER.EMA_DECAY"] = Setting(0.999, "a moving average of the weights is saved")
    return settings


def _segmentation(s: Situation) -> Settings:
    short = _input_px(s, 512)
    if s.is_small:
        short = Setting(min(short.value, 128), "small images, as in the demo, on a CPU")
    crop = max(32, short.value * 3 // 4 if s.is_small else short.value)
    settings = {
        "INPUT.SHORT_PX": short,
        "INPUT.LONG_PX": Setting(4 * short.value),
        "INPUT.CROP_PX": Setting(crop),
        "TEST.CROP_PX": Setting(crop),
        "TEST.STRIDE_PX": Setting(max(1, crop * 2 // 3)),
        "MODEL.CLASS_WEIGHTS": Setting(
            ("auto",) if s.facts.largest_share > 0.7 else (),
            f"the largest class has {s.facts.largest_share:.0%} of the pixels",
        ),
    }
    rate = 1e-3 * math.sqrt(s.batch / 4) if s.start == "random" else 6e-5 * math.sqrt(s.batch / 16)
    settings |= _rate(s, rate)
    period = _evaluation_period(s)
    settings["TEST.EVAL_PERIOD"] = Setting(period, "the best of them is kept: best.ckpt")
    settings["SOLVER.CHECKPOINT_PERIOD"] = Setting(period)
    return settings | _patience(s, s.iterations // period)


def _classification(s: Situation) -> Settings:
    crop = min(224, max(32, s.facts.short_px))
    if s.is_small:
        crop = min(crop, 64)
    epochs = max(2, round(s.iterations / s.epoch_iterations))
    # Rates are those of a batch of 512, and are scaled by the batch.
    rate = 0.0128 if s.start == "random" else 5e-4
    warmup = max(1, epochs // 12)
    long_training = epochs >= 100
    eval_epochs = max(1, math.ceil(epochs / s.num_evaluations))
    settings = {
        "INPUT.CROP_PX": Setting(crop, f"median short side of the images {s.facts.short_px}"),
        "TEST.SHORT_PX": Setting(round(crop * 8 / 7)),
        "SOLVER.BASE_LR": Setting(rate, "of a batch of 512; scaled by the batch"),
        "SOLVER.WARMUP_LR": Setting(rate / 64),
        "SOLVER.MIN_LR": Setting(rate / 128),
        "SOLVER.EPOCHS": Setting(epochs),
        "SOLVER.WARMUP_EPOCHS": Setting(warmup),
        "SOLVER.MESA.WEIGHT": Setting(0.0, "of trainings of hundreds of epochs"),
        "SOLVER.EMA_DECAY": Setting(
            float(f"{max(0.9, 1 - 10 / max(20, s.iterations)):.4g}"),
            f"an average over about a tenth of {s.iterations} iterations",
        ),
        "TEST.EVAL_EPOCHS": Setting(eval_epochs, "the best of them is kept: best.ckpt"),
        **_patience(s, epochs // eval_epochs),
    }
    if not long_training:
        settings |= {
            "INPUT.MIXING.MIXUP": Setting(0.0, f"mixing needs more than {epochs} epochs"),
            "INPUT.MIXING.CUTMIX": Setting(0.0),
        }
    return settings
