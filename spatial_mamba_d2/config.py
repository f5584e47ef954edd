"""The configuration language: YAML with ``_BASE_`` and ``KEY VALUE`` overrides, typos explained.

Works on any fvcore / yacs ``CfgNode``; the class of the node that is passed in is used for new
nodes, so that this module needs neither fvcore nor Detectron2.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)


def add_spatial_mamba_config(cfg: Any) -> None:
    """Add the backbone's keys to a Detectron2 (or any other fvcore) configuration, in place."""
    node = type(cfg)
    mamba = cfg.MODEL.SPATIAL_MAMBA = node()
    mamba.VARIANT = "tiny"  # tiny, small, base: models/variants.py
    mamba.DROP_PATH_RATE = None  # None: the variant's
    mamba.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    mamba.BN = "train"  # train, frozen, sync
    mamba.GRAD_CHECKPOINTING = False  # less memory in training, about a third more time


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


def require_one_of(cfg: Any, choices: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError where the value of a key is none of those it may have."""
    for key, valid in choices.items():
        if (value := _value(cfg, key)) not in valid:
            raise ValueError(f"{key} must be one of {', '.join(map(str, valid))}, got {value!r}")


def require_at_least(cfg: Any, bounds: Mapping[str, float]) -> None:
    """Raises ValueError where the value of a key is below its bound."""
    for key, least in bounds.items():
        if (value := _value(cfg, key)) < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")


def require_low_high(cfg: Any, keys: Sequence[str]) -> None:
    """Raises ValueError where the value of a key is not (low, high) above 0."""
    for key in keys:
        value = _value(cfg, key)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise ValueError(f"{key} must be (low, high) above 0, got {value}")


def _value(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def use_cpu_without_gpu(cfg: Any) -> None:
    """``MODEL.DEVICE`` becomes cpu where there is no GPU, and what a CPU cannot do is changed."""
    import torch  # only now, for `import spatial_mamba_d2.config` is cheap

    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logger.info("no CUDA device: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.MODEL.SPATIAL_MAMBA.BN == "sync":
        logger.info("PyTorch has no SyncBN on a CPU: MODEL.SPATIAL_MAMBA.BN is train")
        cfg.MODEL.SPATIAL_MAMBA.BN = "train"


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
