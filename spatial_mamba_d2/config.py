"""The configuration language, and the rules for the keys that all tasks share.

A configuration is YAML with ``_BASE_``, then ``KEY VALUE`` overrides; typos are explained. This
works on any fvcore / yacs ``CfgNode``; the class of the node that is passed in is used for new
nodes, so that this module needs neither fvcore nor Detectron2.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from spatial_mamba_d2.data.faults import OnError
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.models.spatial_mamba import BN_POLICIES
from spatial_mamba_d2.models.variants import VARIANTS

logger = logging.getLogger(__name__)

# Rules for keys that several tasks have; each configuration is held to those of its own keys.
_SHARED_CHOICES: dict[str, Collection[Any]] = {
    "MODEL.SPATIAL_MAMBA.VARIANT": VARIANTS,
    "MODEL.SPATIAL_MAMBA.BN": BN_POLICIES,
    "DATASETS.ON_ERROR": get_args(OnError),
    "SOLVER.AMP.PRECISION": ("bfloat16", "float16"),
}
_SHARED_MINIMA = {
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.ACCUMULATION_STEPS": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.LOG_PERIOD": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.PICTURES": 0,
}


def add_backbone_config(cfg: Any) -> None:
    """Add the backbone's keys to any fvcore configuration, in place."""
    node = type(cfg)
    mamba = cfg.MODEL.SPATIAL_MAMBA = node()
    mamba.VARIANT = "tiny"  # tiny, small, base: models/variants.py
    mamba.DROP_PATH_RATE = None  # None: that of the variant
    mamba.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    mamba.BN = "train"  # train, frozen, sync
    mamba.GRAD_CHECKPOINTING = False  # less memory in training, about a third more time


LoadConfig = Callable[..., Any]


def config_loader(defaults: Callable[[], Any], check: Callable[[Any], None]) -> LoadConfig:
    """The ``load_config(config_file, overrides=())`` of a task.

    It returns the defaults with a YAML file (or None) and ``KEY VALUE`` pairs merged; checked,
    resolved and frozen. Without a GPU, :func:`resolve_device` changes what needs one. It raises

    * ``FileNotFoundError``: no such file;
    * ``ValueError``: unknown key (with the nearest valid one), or a value out of its range.

    Args:
        defaults: all keys of the task.
        check: of the task's own keys; it may also resolve them, in place.
    """

    def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> Any:
        cfg = defaults()
        merge_config(cfg, config_file, overrides)
        check_shared_keys(cfg)
        check(cfg)
        resolve_device(cfg)
        cfg.freeze()
        return cfg

    return load_config


def merge_config(cfg: Any, config_file: str | Path | None, overrides: Sequence[str]) -> None:
    """Merge a YAML file (with its ``_BASE_``) and then ``KEY VALUE`` pairs into ``cfg``, in place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key (the message names the nearest valid one), a value of the wrong
            type, or an override without a value.
    """
    if config_file:
        if not Path(config_file).is_file():
            raise FileNotFoundError(f"config file: no such file: {config_file}")
        # Detectron2's default reads YAML with tags that run code.
        load = partial(cfg.merge_from_file, str(config_file), allow_unsafe=False)
        _merge(cfg, load, str(config_file))
    if len(overrides) % 2:
        raise ValueError(
            f"overrides must come as KEY VALUE pairs, got {len(overrides)} words: "
            f"{' '.join(overrides)}"
        )
    _merge(cfg, partial(cfg.merge_from_list, list(overrides)), "command line")


def add_shared_config(cfg: Any) -> None:
    """Add the keys that all tasks have and Detectron2 has not, in place.

    Args:
        cfg: with the nodes ``MODEL``, ``DATASETS``, ``INPUT``, ``SOLVER`` and ``SOLVER.AMP``.
    """
    add_backbone_config(cfg)
    # Prefixes of parameters that keep their initial values even if MODEL.WEIGHTS has them. For
    # other classes: ("head.",), ("decode_head.classify", "auxiliary_head.classify"), or
    # ("roi_heads.box_predictor", "roi_heads.mask_head.predictor").
    cfg.MODEL.WEIGHTS_SKIP = ()
    # Broken images, labels and annotations: "raise" an error that names them, or "skip" and count.
    cfg.DATASETS.ON_ERROR = "raise"
    # Images of more than 8 bits: (low, high), the stored values that become 0 and 255. (): the
    # range of the file's type, which 16 bits have; others, and 12 bits in 16, are then refused.
    cfg.INPUT.PIXEL_RANGE = ()
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # micro-batches per iteration
    cfg.SOLVER.AMP.PRECISION = "bfloat16"  # or float16


def add_lightning_config(cfg: Any) -> None:
    """Add the keys that all tasks on Lightning have to an empty configuration, in place."""
    node = type(cfg)
    cfg.SEED = 0  # for initial weights, order and augmentations; runs can be repeated exactly

    cfg.MODEL = node()
    cfg.MODEL.DEVICE = "cuda"  # or cuda:N, or cpu, the fallback if there is no GPU
    cfg.MODEL.WEIGHTS = ""  # checkpoint to start from or to evaluate: ours or the authors'
    cfg.MODEL.PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, ImageNet
    cfg.MODEL.PIXEL_STD = (58.395, 57.12, 57.375)
    cfg.MODEL.BACKBONE = node()
    # What keeps its starting weights, as in Detectron2: 0 nothing, 1 the stem, 2 to 5 the stem and
    # the stages up to res2 .. res5.
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.DATASETS = node()
    cfg.INPUT = node()
    cfg.DATALOADER = node()
    cfg.DATALOADER.NUM_WORKERS = 4  # per process

    cfg.SOLVER = node()
    cfg.SOLVER.EMA_DECAY = 0.0  # above 0: evaluate and save a moving average of the weights
    cfg.SOLVER.AMP = node()
    cfg.SOLVER.AMP.ENABLED = False
    cfg.SOLVER.CLIP_GRADIENTS = node()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # bound on the norm of all gradients together
    cfg.SOLVER.LOG_PERIOD = 50

    add_shared_config(cfg)
    del cfg.MODEL.SPATIAL_MAMBA["OUT_FEATURES"]  # these models know theirs


def backbone_kwargs(cfg: Any) -> dict[str, Any]:
    """Arguments of a model's constructor from ``cfg.MODEL``, except the variant."""
    mamba = cfg.MODEL.SPATIAL_MAMBA
    drop_path = {} if mamba.DROP_PATH_RATE is None else {"drop_path_rate": mamba.DROP_PATH_RATE}
    return {
        "bn_policy": mamba.BN,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        "grad_checkpointing": mamba.GRAD_CHECKPOINTING,
        **drop_path,
    }


def check_shared_keys(cfg: Any) -> None:
    """Raises ValueError if a key that several tasks have is out of its range."""
    require_one_of(cfg, {k: v for k, v in _SHARED_CHOICES.items() if _has(cfg, k)})
    require_at_least(cfg, {k: v for k, v in _SHARED_MINIMA.items() if _has(cfg, k)})
    if _has(cfg, "MODEL.BACKBONE.FREEZE_AT"):
        require_between(cfg, ("MODEL.BACKBONE.FREEZE_AT",), 0, 5)
    if _has(cfg, "SOLVER.EMA_DECAY"):
        require_between(cfg, ("SOLVER.EMA_DECAY",), 0, 1, include_high=False)
    build_pixel_range(cfg.INPUT.PIXEL_RANGE)


def resolve_device(cfg: Any) -> None:
    """Without a GPU, ``MODEL.DEVICE`` becomes ``cpu``, and what a CPU cannot do well is changed.

    On a CPU, ``MODEL.SPATIAL_MAMBA.BN sync`` becomes ``train``, and mixed precision with float16
    is switched off.

    Raises:
        ValueError: ``MODEL.DEVICE`` is not cpu, cuda or cuda:N, or there is no such GPU.
    """
    device = cfg.MODEL.DEVICE
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        logger.info("no CUDA device: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    elif ":" in device and int(device[5:]) >= torch.cuda.device_count():
        raise ValueError(
            f"MODEL.DEVICE must name one of the {torch.cuda.device_count()} GPUs, got {device!r}"
        )
    if cfg.MODEL.DEVICE != "cpu":
        return
    if cfg.MODEL.SPATIAL_MAMBA.BN == "sync":
        logger.info("PyTorch has no SyncBN on a CPU: MODEL.SPATIAL_MAMBA.BN is train")
        cfg.MODEL.SPATIAL_MAMBA.BN = "train"
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "float16":
        logger.info("float16 is slow on a CPU: SOLVER.AMP.ENABLED is False")
        cfg.SOLVER.AMP.ENABLED = False


def check_processes(cfg: Any, num_processes: int) -> None:
    """Raises ValueError if ``MODEL.DEVICE`` cannot have that many processes on this machine."""
    num_gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and num_processes > num_gpus:
        raise ValueError(
            f"--num-gpus must be at most {num_gpus}, the GPUs here, got {num_processes}"
        )
    if ":" in cfg.MODEL.DEVICE and num_processes > 1:
        raise ValueError(
            f"MODEL.DEVICE must be cuda or cpu for {num_processes} processes, "
            f"got {cfg.MODEL.DEVICE!r}"
        )


def require_one_of(cfg: Any, choices: Mapping[str, Collection[Any]]) -> None:
    """Raises ValueError if the value of a key is none of those it may have."""
    for key, valid in choices.items():
        if (value := _value(cfg, key)) not in valid:
            raise ValueError(f"{key} must be one of {', '.join(map(str, valid))}, got {value!r}")


def require_at_least(cfg: Any, minima: Mapping[str, float]) -> None:
    """Raises ValueError if the value of a key is below its minimum."""
    for key, least in minima.items():
        if (value := _value(cfg, key)) < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")


def require_between(
    cfg: Any, keys: Iterable[str], low: float, high: float, *, include_high: bool = True
) -> None:
    """Raises ValueError if the value of a key is not in ``[low, high]``, or ``[low, high)``."""
    for key in keys:
        value = _value(cfg, key)
        if not (low <= value <= high and (include_high or value < high)):
            bracket = "]" if include_high else ")"
            raise ValueError(f"{key} must be in [{low}, {high}{bracket}, got {value}")


def require_low_high(cfg: Any, keys: Iterable[str]) -> None:
    """Raises ValueError if the value of a key is not (low, high), both above 0."""
    for key in keys:
        value = _value(cfg, key)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise ValueError(f"{key} must be (low, high), both above 0, got {value}")


def _value(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _has(cfg: Any, key: str) -> bool:
    for part in key.split("."):
        if part not in cfg:
            return False
        cfg = cfg[part]
    return True


def _merge(cfg: Any, merge: Callable[[], None], source: str) -> None:
    try:
        merge()
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not plain YAML: {error}") from None
    except (KeyError, AssertionError) as error:  # merge_from_list asserts that a key exists
        text = str(error.args[0]) if error.args else repr(error)
        key = text.rsplit(":", 1)[-1].strip()
        raise ValueError(f"{source}: unknown config key {key}{_suggestion(key, cfg)}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _suggestion(key: str, cfg: Any) -> str:
    keys = list(_flat_keys(cfg))
    nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    best = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0) or nearest
    return f"; the nearest valid one is {best[0]}" if best else ""


def _flat_keys(cfg: Any, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, type(cfg)):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key
