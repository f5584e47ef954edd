"""A training in small: four of the user's images, with the user's own configuration.

It reads, trains, evaluates, saves, resumes and predicts, as the real training will, says what that
will take, and names the reason when it does not learn.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from spatial_mamba_d2.data.ade20k import check_split
from spatial_mamba_d2.data.ade20k import load_classes as load_label_classes
from spatial_mamba_d2.data.coco import load_coco
from spatial_mamba_d2.data.formats import Instances, LabelledData, write_training_files
from spatial_mamba_d2.data.imagenet import check_split as check_class_split
from spatial_mamba_d2.data.imagenet import load_classes
from spatial_mamba_d2.data.images import read_image, write_image
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.label_format import LabelFormat, build_label_format
from spatial_mamba_d2.data.label_maps import read_pair
from spatial_mamba_d2.data.pair_files import Layout
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.finetuning.probing import TOOLS, logged_seconds
from spatial_mamba_d2.finetuning.training_images import draw_training_images
from spatial_mamba_d2.prediction import load_predictor
from spatial_mamba_d2.system.launching import under_torchrun
from spatial_mamba_d2.system.package_files import top_level_folder

logger = logging.getLogger(__name__)

NUM_IMAGES = 4
PICTURES = "rehearsal.jpg"  # in OUTPUT_DIR
ITERATIONS = 16  # of the rehearsal, in two parts
_CPU_PX = 128  # short side on CPUs, so that it takes a minute
_LEARNED = 0.9  # the last losses over the first ones, at most
_RISEN = 1.2  # the same of a rate that is too high
_LEAST_PX = 32  # short side of images below which little is left of them


@dataclass
class Rehearsal:
    """What a rehearsal found.

    Attributes:
        task: of the configuration.
        reasons: why the training would fail or learn nothing; empty if it is fine.
        losses: of the iterations.
        iteration_s: of the real batch, on this machine, in seconds; None if it did not run.
        estimates: what the real training takes, in words.
        pictures: drawings of training images, as they were augmented, with their labels.
    """

    task: str
    reasons: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    iteration_s: float | None = None
    estimates: list[str] = field(default_factory=list)
    pictures: Path | None = None

    def text(self) -> str:
        lines = [f"rehearsal of {self.task}: {'fails' if self.reasons else 'passes'}"]
        if self.losses:
            lines.append(f"loss: {self.losses[0]:.3f} to {self.losses[-1]:.3f} "
                         f"in {len(self.losses)} iterations on {NUM_IMAGES} images")  # fmt: skip
        lines += [f"reason: {reason}" for reason in self.reasons]
        if self.pictures:
            lines.append(f"training images: {self.pictures}")
        return "\n".join([*lines, *self.estimates])


def rehearse(
    config_file: str | Path | None, overrides: Sequence[str] = (), task: str | None = None
) -> Rehearsal:
    """Rehearse the training that a configuration describes.

    Drawings of its training images are ``OUTPUT_DIR/rehearsal.jpg``; nothing else is left behind.

    Args:
        config_file, overrides: as of the training.
        task: None: the one whose keys the configuration has.

    Raises:
        FileNotFoundError, ValueError: configuration or data are not usable; the message says why.
    """
    task, cfg = load_any(config_file, overrides, task)
    result = Rehearsal(task)
    data = _four_images(task, cfg)
    result.reasons += _inspect(task, cfg, data)
    with TemporaryDirectory(prefix="rehearsal-") as folder:
        keys = _write_data(data, Path(folder))
        _draw(result, cfg, config_file, [*overrides, *chain.from_iterable(keys.items())])
        _train(result, cfg, config_file, overrides, data, keys, Path(folder))
    return result


def _draw(
    result: Rehearsal, cfg: Any, config_file: str | Path | None, overrides: Sequence[Any]
) -> None:
    """What cannot be drawn cannot be trained with either, which then says why."""
    words = [*map(str, overrides), "DATALOADER.NUM_WORKERS", "0"]
    try:
        sheet = draw_training_images(result.task, load_any(config_file, words, result.task)[1])
    except ValueError as error:
        logger.info("training images are not drawn: %s", error)
        return
    result.pictures = Path(cfg.OUTPUT_DIR, PICTURES)
    result.pictures.parent.mkdir(parents=True, exist_ok=True)
    write_image(result.pictures, sheet)


def require_rehearsal(task: str, config_file: str | Path | None, overrides: Sequence[str]) -> None:
    """Raises ValueError if a rehearsal, which is logged, finds that the training would fail."""
    result = rehearse(config_file, overrides, task)
    logger.info("%s", result.text())
    if result.reasons:
        raise ValueError(f"the rehearsal fails: {result.reasons[0]}")


def rehearse_first(task: str, args: argparse.Namespace) -> None:
    """What ``--rehearse`` of the training tools does.

    Raises:
        ValueError: the rehearsal fails, or it is not the start of a training in one call.
    """
    if args.resume or args.eval_only or args.num_machines > 1 or under_torchrun():
        raise ValueError(
            "--rehearse is for a new training that this call starts: not with --resume, "
            "--eval-only, --num-machines or torchrun; tools/rehearse.py rehearses by itself"
        )
    require_rehearsal(task, args.config_file or None, args.opts)


def _write_data(data: LabelledData, folder: Path) -> dict[str, Any]:
    """Files of the four images in ``folder``, and the keys that name them."""
    keys = write_training_files(data, folder / "data")
    return {k: v for k, v in keys.items() if k.startswith("DATASETS.")}


def load_any(
    config_file: str | Path | None, overrides: Sequence[str], task: str | None
) -> tuple[str, Any]:
    """The task whose keys a configuration has, and the configuration.

    Raises:
        ValueError: as the task's own ``load_config``.
    """
    unknown: Exception | None = None
    for name in (task,) if task else tuple(TOOLS):
        load = importlib.import_module(f"spatial_mamba_d2.{name}.config").load_config
        try:
            return name, load(config_file, overrides)
        except ValueError as error:
            if task or "unknown config key" not in str(error):
                raise
            unknown = error
    raise ValueError(f"no task has all keys of the configuration: {unknown}")


def _four_images(task: str, cfg: Any) -> LabelledData:
    """As training and as test images; with as many classes as there can be."""
    data = cfg.DATASETS
    labels: LabelFormat | None = None
    names: tuple[str, ...]
    if task == "detection":
        if not data.TRAIN_JSON or not isinstance(data.TRAIN_JSON, str):
            raise ValueError(
                f"DATASETS.TRAIN_JSON must be one file for a rehearsal, got {data.TRAIN_JSON!r}"
            )
        coco = load_coco(data.TRAIN_JSON, data.TRAIN_IMAGES, on_error=data.ON_ERROR)
        records = [r for r in coco.records if any(not a["iscrowd"] for a in r["annotations"])]
        if not records:
            raise ValueError(f"{data.TRAIN_JSON}: no image has an object that is no crowd")
        records = records[:: max(1, len(records) // NUM_IMAGES)][:NUM_IMAGES]
        content = {
            "images": [{"id": r["image_id"], "file_name": r["file_name"], "height": r["height"],
                        "width": r["width"]} for r in records],
            "annotations": [a for r in records for a in r["annotations"]],
            "categories": [{"id": id_, "name": name} for id_, name in coco.categories],
        }  # fmt: skip
        part: Any = Instances(content, Path("/"))
        names = tuple(name for _, name in coco.categories)
    elif task == "segmentation":
        classes = load_label_classes(data.CLASSES, data.ROOT, cfg.MODEL.NUM_CLASSES)
        names = classes.names
        labels = build_label_format(names, data.LABEL_OFFSET, data.IGNORE_LABELS,
                                    data.LABEL_MAP, data.ROOT)  # fmt: skip
        layout = Layout(data.IMAGE_FOLDER, data.LABEL_FOLDER, data.IMAGE_SUFFIX, data.LABEL_SUFFIX)
        items = check_split(data.ROOT, data.TRAIN, labels, layout=layout, on_error=data.ON_ERROR,
                            num_channels=cfg.INPUT.CHANNELS).pairs  # fmt: skip
        part = items[:: max(1, len(items) // NUM_IMAGES)][:NUM_IMAGES]
    else:
        names = load_classes(data.CLASSES, data.ROOT, data.TRAIN, cfg.MODEL.NUM_CLASSES)
        samples = check_class_split(data.ROOT, data.TRAIN, names, on_error=data.ON_ERROR).samples
        first = {sample.target: sample for sample in reversed(samples)}
        part = [first[target] for target in sorted(first)][:NUM_IMAGES]
    splits = {"train": part, "val": part}
    return LabelledData(Path(str(data.get("ROOT", "."))), "coco", task, tuple(names), splits,
                        labels=labels)  # fmt: skip


def _inspect(task: str, cfg: Any, data: LabelledData) -> list[str]:
    """What is wrong with configuration and labels, before anything runs."""
    reasons = []
    solver, model = cfg.SOLVER, cfg.MODEL
    num_channels = cfg.INPUT.get("CHANNELS", 3)
    value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)
    pixels = [read_image(f, num_channels, value_range) for f in data.image_files("train")]
    mean, std = np.array(model.PIXEL_MEAN), np.array(model.PIXEL_STD)
    values = np.concatenate([((image - mean) / std).ravel()[::97] for image in pixels])
    if abs(values.mean()) > 5 or not 0.05 < values.std() < 20:
        reasons.append(
            f"normalisation: MODEL.PIXEL_MEAN {tuple(mean.tolist())} and PIXEL_STD "
            f"{tuple(std.tolist())} make pixels with mean {values.mean():.3g} and standard "
            f"deviation {values.std():.3g}; they are for pixels of 0 to 255"
        )
    iterations = solver.get("MAX_ITER", 0)
    if iterations and solver.WARMUP_ITERS >= iterations:
        reasons.append(
            f"learning rate: SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is not below MAX_ITER "
            f"{iterations}: the rate never reaches BASE_LR"
        )
    frozen = model.BACKBONE.FREEZE_AT or len(model.get("FREEZE", ()))
    if frozen and not model.WEIGHTS:
        reasons.append(
            "frozen parts: MODEL.BACKBONE.FREEZE_AT or MODEL.FREEZE keeps layers at random "
            "weights, because MODEL.WEIGHTS is empty"
        )
    average = 1 / (1 - solver.EMA_DECAY) if solver.EMA_DECAY else 0
    if iterations and average > iterations / 2:
        reasons.append(
            f"moving average: SOLVER.EMA_DECAY {solver.EMA_DECAY} is over {average:.0f} "
            f"iterations, and the training has {iterations}: what is evaluated has hardly moved"
        )
    short_px = _short_px(task, cfg)
    if short_px < _LEAST_PX:
        reasons.append(f"image size: a short side of {short_px} px leaves nothing to see")
    return reasons + _inspect_labels(task, data, num_channels, value_range)


def _short_px(task: str, cfg: Any) -> int:
    size = {
        "detection": lambda: max(cfg.INPUT.MIN_SIZE_TRAIN),
        "segmentation": lambda: min(cfg.INPUT.SHORT_PX, cfg.INPUT.CROP_PX),
        "classification": lambda: cfg.INPUT.CROP_PX,
    }[task]
    return int(size())


def _inspect_labels(
    task: str, data: LabelledData, num_channels: int, value_range: Any
) -> list[str]:
    part: Any = data.splits["train"]
    if task == "segmentation":
        assert data.labels is not None
        ignore = data.labels.ignore
        counts = np.zeros(ignore + 1, np.int64)
        for pair in part:
            indices = read_pair(pair, data.labels, num_channels, value_range)[1]
            counts += np.bincount(indices.ravel(), minlength=ignore + 1)
        if np.count_nonzero(counts[:ignore]) < 2:
            share = counts[ignore] / counts.sum()
            return [f"labels: less than two classes have a pixel in {len(part)} images, and "
                    f"{share:.0%} of the pixels are ignored"]  # fmt: skip
    elif task == "classification":
        if len({sample.target for sample in part}) < 2:
            return ["labels: the training images are of one class"]
    else:
        annotations = part.content["annotations"]
        crowds = sum(a["iscrowd"] for a in annotations)
        if crowds > len(annotations) / 2:
            return [
                f"labels: {crowds} of {len(annotations)} objects are crowds, which do not train"
            ]
    return []


def _train(
    result: Rehearsal,
    cfg: Any,
    config_file: str | Path | None,
    overrides: Sequence[str],
    data: LabelledData,
    keys: dict[str, Any],
    folder: Path,
) -> None:
    task, output = result.task, folder / "output"
    batch = min(cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATION_STEPS, NUM_IMAGES)
    on_cpu = not torch.cuda.is_available()
    if task == "classification":
        keys = {**keys, "DATASETS.TRAIN": _repeated(folder / "data", batch * ITERATIONS // 2)}
    words = [*map(str, overrides), *_small(task, cfg, batch, on_cpu)]
    words += [str(word) for pair in keys.items() for word in pair]
    words += ["OUTPUT_DIR", str(output)]
    first, second = _lengths(task)
    start = time.perf_counter()
    error = _run(task, config_file, [*words, *first], resume=False)
    if error is None:
        middle = time.perf_counter()
        error = _run(task, config_file, [*words, *second], resume=True)
        logger.info("trained in %.0f s and resumed in %.0f s", middle - start,
                    time.perf_counter() - middle)  # fmt: skip
    result.losses = _losses(output)
    if error is not None:
        result.reasons.append(_explain(error, cfg, result.losses))
        return
    _judge(result, cfg)
    _estimate(result, cfg, output, batch, on_cpu)
    checkpoint = next(
        output / n for n in ("model_final.pth", "last.ckpt") if (output / n).is_file()
    )
    predictor = load_predictor(checkpoint, task=task)
    image = read_image(data.image_files("train")[0], predictor.model.num_channels,
                       predictor.model.value_range)  # fmt: skip
    predictor.model(image)


def _lengths(task: str) -> tuple[list[str], list[str]]:
    """Overrides for the first half, and for all of the training."""
    if task == "classification":
        both = [["SOLVER.EPOCHS", str(epochs)] for epochs in (1, 2)]
    else:
        both = [["SOLVER.MAX_ITER", str(n)] for n in (ITERATIONS // 2, ITERATIONS)]
    return both[0], both[1]


def _small(task: str, cfg: Any, batch: int, on_cpu: bool) -> list[str]:
    """Overrides that make the training small, and images look the same each time.

    Everything else is the user's.
    """
    pairs: dict[str, Any] = {
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.ACCUMULATION_STEPS": 1,
        "SOLVER.EMA_DECAY": 0.0,
        "SOLVER.LOGGERS": (),
        "TEST.PATIENCE": 0,
        "DATALOADER.NUM_WORKERS": 0,
    }
    factor = min(1.0, _CPU_PX / _short_px(task, cfg)) if on_cpu else 1.0

    def smaller(px: int) -> int:
        return max(8, round(px * factor))

    if task == "detection":
        pairs |= {
            "INPUT.MIN_SIZE_TRAIN": tuple(smaller(px) for px in cfg.INPUT.MIN_SIZE_TRAIN),
            "INPUT.MAX_SIZE_TRAIN": smaller(cfg.INPUT.MAX_SIZE_TRAIN),
            "INPUT.MIN_SIZE_TEST": smaller(cfg.INPUT.MIN_SIZE_TEST),
            "INPUT.MAX_SIZE_TEST": smaller(cfg.INPUT.MAX_SIZE_TEST),
            "INPUT.RANDOM_FLIP": "none",
            "SOLVER.STEPS": (),
        }
    elif task == "segmentation":
        pairs |= {
            "INPUT.SHORT_PX": smaller(cfg.INPUT.SHORT_PX),
            "INPUT.LONG_PX": smaller(cfg.INPUT.LONG_PX),
            "INPUT.CROP_PX": smaller(cfg.INPUT.CROP_PX),
            "INPUT.RATIO_RANGE": (1.0, 1.0),
            "INPUT.FLIP": False,
            "INPUT.PHOTOMETRIC": False,
        }
    else:
        pairs |= {
            # It is scaled by the batch, which is smaller here.
            "SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * cfg.SOLVER.IMS_PER_BATCH / batch,
            "INPUT.SCALE_RANGE": (1.0, 1.0),
            "INPUT.RATIO_RANGE": (1.0, 1.0),
            "INPUT.AUTO_AUGMENT": "",
            "INPUT.COLOR_JITTER": 0.0,
            "INPUT.ERASE_PROB": 0.0,
            "SOLVER.WARMUP_EPOCHS": 0,
            "SOLVER.MESA.WEIGHT": 0.0,
            "INPUT.MIXING.MIXUP": 0.0,
            "INPUT.MIXING.CUTMIX": 0.0,
            "INPUT.CROP_PX": smaller(cfg.INPUT.CROP_PX),
            "TEST.SHORT_PX": smaller(cfg.TEST.SHORT_PX),
        }
    if task != "classification":
        pairs |= {
            "SOLVER.WARMUP_ITERS": 1,
            "SOLVER.CHECKPOINT_PERIOD": ITERATIONS,
            "TEST.EVAL_PERIOD": 0,
            "TEST.PICTURES": 0,
        }
    if task != "detection":
        pairs["SOLVER.LOG_PERIOD"] = 1
    return [str(word) for pair in pairs.items() for word in pair]


def _repeated(folder: Path, num_lines: int) -> str:
    """The name of a list that repeats the training images."""
    lines = (folder / "train.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join((lines * num_lines)[:num_lines]) + "\n"
    (folder / "rehearsal.txt").write_text(text, encoding="utf-8")
    return "rehearsal.txt"


def _run(
    task: str, config_file: str | Path | None, words: Sequence[str], *, resume: bool
) -> str | None:
    """What the training's tool says when it fails; None if it does not."""
    command = [sys.executable, str(top_level_folder("tools") / TOOLS[task])]
    command += ["--config-file", str(config_file)] if config_file else []
    done = subprocess.run(
        [*command, *(["--resume"] if resume else []), *words], capture_output=True, text=True
    )
    if not done.returncode:
        return None
    return done.stderr.strip()[-2000:] or f"exit code {done.returncode}"


def _losses(output: Path) -> list[float]:
    """Of the iterations, from metrics.json."""
    file = output / "metrics.json"
    if not file.is_file():
        return []
    text = f"[{','.join(file.read_text(encoding='utf-8').splitlines())}]"
    (output / "all.json").write_text(text, encoding="utf-8")
    found = {
        line["iteration"]: line.get("total_loss", line.get("loss"))
        for line in read_json(output / "all.json")
        if "total_loss" in line or "loss" in line
    }
    return [float(found[iteration]) for iteration in sorted(found)]


def _explain(error: str, cfg: Any, losses: Sequence[float]) -> str:
    """The reason in what a training said as it failed."""
    last = next((x for x in reversed(error.splitlines()) if x.startswith("error:")), "")
    text = last.removeprefix("error:").strip() or error.splitlines()[-1]
    if re.search(r"not finite|diverged|\bnan\b", text, re.IGNORECASE):
        return f"learning rate: SOLVER.BASE_LR {cfg.SOLVER.BASE_LR:g} is too high: {text}"
    if "out of memory" in error:
        return f"memory: SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not fit: {text}"
    return text


def _judge(result: Rehearsal, cfg: Any) -> None:
    """Whether the losses fell; if not, the learning rate is the reason if nothing else is."""
    losses = result.losses
    if len(losses) < 2:
        return
    quarter = max(1, len(losses) // 4)
    first, last = np.mean(losses[:quarter]), np.mean(losses[-quarter:])
    if last <= _LEARNED * first or result.reasons:
        return
    rate = cfg.SOLVER.BASE_LR
    what = "too high" if last > _RISEN * first else "too low"
    result.reasons.append(
        f"learning rate: the loss goes from {first:.3f} to {last:.3f} on {NUM_IMAGES} images that "
        f"it sees again and again: SOLVER.BASE_LR {rate:g} is {what}"
    )


def _estimate(result: Rehearsal, cfg: Any, output: Path, batch: int, on_cpu: bool) -> None:
    """Time, memory and disk of the real training, from the rehearsal's."""
    seconds = logged_seconds(output)
    if seconds is not None:
        factor = 1.0
        if on_cpu:
            factor = max(1.0, _short_px(result.task, cfg) / _CPU_PX) ** 2
        result.iteration_s = seconds * factor * cfg.SOLVER.IMS_PER_BATCH / batch
        text = f"time: about {result.iteration_s:.2f} s an iteration"
        if iterations := cfg.SOLVER.get("MAX_ITER", 0):
            text += f", {result.iteration_s * iterations / 3600:.1f} h for {iterations} iterations"
        result.estimates.append(text)
    if on_cpu:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        result.estimates.append(
            f"memory: {peak:.1f} GB with {batch} images in the rehearsal's size"
        )
    size = sum(f.stat().st_size for f in output.glob("*.pth")) + sum(
        f.stat().st_size for f in output.glob("*.ckpt")
    )
    free = shutil.disk_usage(output).free
    result.estimates.append(
        f"disk: {size / 1e9:.2f} GB of checkpoints, {free / 1e9:.0f} GB are free"
    )
