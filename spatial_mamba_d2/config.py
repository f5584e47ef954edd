"""The configuration language, and the rules for the keys that all tasks share.

A configuration is YAML with ``_BASE_``, then ``KEY VALUE`` overrides; typos are explained. This
works on any fvcore / yacs ``CfgNode``; the class of the node that is passed in is used for new
nodes, so that this module needs neither fvcore nor Detectron2. A value has the type of its default:
what can only be meant in one way is converted, anything else is an error.
"""

from __future__ import annotations

import ast
import difflib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from spatial_mamba_d2.data.faults import OnError
from spatial_mamba_d2.data.pixels import MAX_CHANNELS, build_pixel_range
from spatial_mamba_d2.models.spatial_mamba import BN_POLICIES
from spatial_mamba_d2.models.variants import VARIANTS
from spatial_mamba_d2.system.data_folder import find_data
from spatial_mamba_d2.system.devices import check_device, check_device_name
from spatial_mamba_d2.system.package_files import find_recipe
from spatial_mamba_d2.system.value_types import convert_value
from spatial_mamba_d2.system.yaml_file import read_yaml

logger = logging.getLogger(__name__)

# Rules for keys that several tasks have; each configuration is held to those of its own keys.
_SHARED_CHOICES: dict[str, Collection[Any]] = {
    "MODEL.SPATIAL_MAMBA.VARIANT": VARIANTS,
    "MODEL.SPATIAL_MAMBA.BN": BN_POLICIES,
    "DATASETS.ON_ERROR": get_args(OnError),
    "SOLVER.AMP.PRECISION": ("bfloat16", "float16"),
}
_SHARED_MINIMA = {
    "MODEL.NUM_CLASSES": 1,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.ACCUMULATION_STEPS": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.LOG_PERIOD": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.PICTURES": 0,
    "TEST.PATIENCE": 0,
}
_SHARED_ABOVE_0 = ("SOLVER.BASE_LR", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "MODEL.PIXEL_STD")
_SHARED_FRACTIONS = ("SOLVER.WARMUP_FACTOR",)  # 1 included
_SHARED_SHARES = (  # 1 excluded
    "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE",
    "SOLVER.BETAS",
    "SOLVER.EMA_DECAY",
)
# Of detection: each is one file or folder, or a list.
DETECTION_PATHS = (
    *(
        f"DATASETS.{split}_{what}"
        for split in ("TRAIN", "TEST")
        for what in ("JSON", "IMAGES", "SEM_SEG")
    ),
    "DATASETS.TRAIN_NEGATIVES",
)
_DATA_PATHS = ("DATASETS.ROOT", *DETECTION_PATHS)
_MAX_SEED = 2**32 - 1  # of NumPy's global generator
_MAY_BE_INFINITE = ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",)  # the largest element
_SHARED_TYPES: dict[str, Sequence[type]] = {"MODEL.SPATIAL_MAMBA.DROP_PATH_RATE": (float,)}


def add_backbone_config(cfg: Any) -> None:
    """Add the backbone's keys to any fvcore configuration, in place."""
    node = type(cfg)
    mamba = cfg.MODEL.SPATIAL_MAMBA = node()
    mamba.VARIANT = "tiny"  # tiny, small, base: models/variants.py
    mamba.DROP_PATH_RATE = None  # None: that of the variant, or timm's default
    mamba.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    mamba.BN = "train"  # train, frozen, sync
    mamba.GRAD_CHECKPOINTING = False  # less memory in training, about a third more time


LoadConfig = Callable[..., Any]


def config_loader(
    defaults: Callable[[], Any],
    check: Callable[[Any], None],
    types: Mapping[str, Sequence[type]] | None = None,
) -> LoadConfig:
    """The ``load_config(config_file, overrides=())`` of a task.

    It returns the defaults with a YAML file (or None) and ``KEY VALUE`` pairs merged; checked,
    resolved and frozen. Without a GPU, :func:`resolve_device` changes what needs one. It raises

    * ``FileNotFoundError``: no such file;
    * ``ValueError``: not a configuration file, an unknown key (with the nearest valid one), or a
      value of another type or out of its range.

    Args:
        defaults: all keys of the task.
        check: of the task's own keys; it may also resolve them, in place.
        types: of keys that accept more types than that of their default, such as
            ``{"DATASETS.TRAIN_JSON": (tuple,)}``: one file, or a list.
    """

    def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> Any:
        cfg = defaults()
        merge_config(cfg, config_file, overrides, {**_SHARED_TYPES, **(types or {})})
        check_shared_keys(cfg)
        _find_data_sets(cfg)
        check(cfg)
        if _has(cfg, "TEST.PATIENCE") and cfg.TEST.PATIENCE:
            require_evaluations(cfg, f"TEST.PATIENCE {cfg.TEST.PATIENCE}")
        resolve_device(cfg)
        cfg.freeze()
        return cfg

    return load_config


def merge_config(
    cfg: Any,
    config_file: str | Path | None,
    overrides: Sequence[str],
    types: Mapping[str, Sequence[type]] | None = None,
) -> None:
    """Merge a YAML file (with its ``_BASE_``) and then ``KEY VALUE`` pairs into ``cfg``, in place.

    Args:
        config_file: a file, or the name of a recipe, see :func:`~.package_files.find_recipe`.
        types: of keys that accept more types than that of their default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that :func:`~spatial_mamba_d2.system.yaml_file.read_yaml` refuses, an
            unknown key (the message names the nearest valid one), a value of the wrong type, or an
            override without a value.
    """
    if len(overrides) % 2:
        raise ValueError(
            f"overrides must come as KEY VALUE pairs, got {len(overrides)} words: "
            f"{' '.join(overrides)}"
        )
    defaults = dict(flat_items(cfg))
    for path, content in read_yaml(find_recipe(config_file)) if config_file else []:
        _merge(cfg, flat_items(content), str(path), defaults, types or {})
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    _merge(cfg, pairs, "command line", defaults, types or {})


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
    # Where the numbers of metrics.json go besides: tensorboard, csv, wandb, mlflow
    cfg.SOLVER.LOGGERS = ("tensorboard",)


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
    """Raises ValueError if a key that several tasks have is out of its range.

    So is, in every key, a number that is not finite, because nothing can be compared with NaN.
    """
    require_finite(cfg, (k for k, _ in flat_items(cfg) if k not in _MAY_BE_INFINITE))
    require_one_of(cfg, {k: v for k, v in _SHARED_CHOICES.items() if _has(cfg, k)})
    require_at_least(cfg, {k: v for k, v in _SHARED_MINIMA.items() if _has(cfg, k)})
    require_above_0(cfg, (k for k in _SHARED_ABOVE_0 if _has(cfg, k)))
    require_between(cfg, (k for k in _SHARED_FRACTIONS if _has(cfg, k)), 0, 1)
    shares = (k for k in _SHARED_SHARES if _has(cfg, k))
    require_between(cfg, shares, 0, 1, include_high=False)
    channels = 3
    if _has(cfg, "INPUT.CHANNELS"):
        require_between(cfg, ("INPUT.CHANNELS",), 1, MAX_CHANNELS)
        channels = cfg.INPUT.CHANNELS
        _check_band_names(cfg)
    require_length(cfg, {"MODEL.PIXEL_MEAN": channels, "MODEL.PIXEL_STD": channels})
    require_length(cfg, {"SOLVER.BETAS": 2})
    if _has(cfg, "MODEL.BACKBONE.FREEZE_AT"):
        require_between(cfg, ("MODEL.BACKBONE.FREEZE_AT",), 0, 5)
    require_between(cfg, ("SEED",), min(0, cfg.SEED), _MAX_SEED)
    solver = cfg.SOLVER
    if _has(cfg, "SOLVER.WARMUP_ITERS") and solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %s is not below SOLVER.MAX_ITER %s: the learning rate never "
            "reaches SOLVER.BASE_LR", solver.WARMUP_ITERS, solver.MAX_ITER,
        )  # fmt: skip
    build_pixel_range(cfg.INPUT.PIXEL_RANGE)
    _check_output_dir(cfg.OUTPUT_DIR)


def _check_band_names(cfg: Any) -> None:
    names, channels = list(cfg.INPUT.BAND_NAMES), cfg.INPUT.CHANNELS
    if names and len(set(names)) != channels:
        raise ValueError(
            f"INPUT.BAND_NAMES must be () or {channels} different names, one for each of "
            f"INPUT.CHANNELS, got {names}"
        )


def _check_output_dir(name: str) -> None:
    if not name.strip():
        raise ValueError(f"OUTPUT_DIR must be a folder, got {name!r}")
    for path in (Path(name), *Path(name).parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"OUTPUT_DIR must be a folder, got {name!r}: {path} is a file")


def _find_data_sets(cfg: Any) -> None:
    """Paths to data become those at which :func:`~.data_folder.find_data` finds them, in place."""
    for key in filter(partial(_has, cfg), _DATA_PATHS):
        paths = _value(cfg, key)
        several = isinstance(paths, (tuple, list))
        found = [str(find_data(p)) if p else p for p in (paths if several else [paths])]
        section, name = key.split(".")
        cfg[section][name] = type(paths)(found) if several else found[0]
        if found != list(paths if several else [paths]):
            logger.info("%s: %s", key, ", ".join(found))


def resolve_device(cfg: Any) -> None:
    """Without a GPU, ``MODEL.DEVICE`` becomes ``cpu``, and what a CPU cannot do well is changed.

    On a CPU, ``MODEL.SPATIAL_MAMBA.BN sync`` becomes ``train``, and mixed precision with float16
    is switched off.

    Raises:
        ValueError: ``MODEL.DEVICE`` is not cpu, cuda or cuda:N, or there is no such GPU.
    """
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda") and not torch.cuda.is_available():
        check_device_name(device, "MODEL.DEVICE")
        logger.info("no CUDA device: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    else:
        check_device(device, "MODEL.DEVICE")
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


def require_evaluations(cfg: Any, what: str) -> None:
    """Raises ValueError if no evaluation takes place in the training, and ``what`` needs some."""
    key = "TEST.EVAL_EPOCHS" if _has(cfg, "TEST.EVAL_EPOCHS") else "TEST.EVAL_PERIOD"
    if not (_value(cfg, key) and cfg.DATASETS.TEST):
        raise ValueError(
            f"{what} needs evaluations in the training, got {key} {_value(cfg, key)}, "
            f"DATASETS.TEST {cfg.DATASETS.TEST!r}"
        )


def require_one_of(cfg: Any, choices: Mapping[str, Collection[Any]]) -> None:
    """Raises ValueError if the value of a key is none of those it may have."""
    for key, valid in choices.items():
        if (value := _value(cfg, key)) not in valid:
            raise ValueError(f"{key} must be one of {', '.join(map(str, valid))}, got {value!r}")


def require_at_least(cfg: Any, minima: Mapping[str, float]) -> None:
    """Raises ValueError if a number, or one of a list of numbers, is below its minimum."""
    for key, least in minima.items():
        if not all(number >= least for number in _numbers(cfg, key)):
            raise ValueError(f"{key} must be at least {least}, got {_value(cfg, key)}")


def require_above_0(cfg: Any, keys: Iterable[str]) -> None:
    """Raises ValueError if a number, or one of a list of numbers, is not above 0."""
    for key in keys:
        if not all(number > 0 for number in _numbers(cfg, key)):
            raise ValueError(f"{key} must be above 0, got {_value(cfg, key)}")


def require_between(
    cfg: Any,
    keys: Iterable[str],
    low: float,
    high: float,
    *,
    include_low: bool = True,
    include_high: bool = True,
) -> None:
    """Raises ValueError if a number, or one of a list, is not between ``low`` and ``high``."""
    for key in keys:
        if not all(
            low <= number <= high
            and (include_low or number > low)
            and (include_high or number < high)
            for number in _numbers(cfg, key)
        ):
            brackets = "[" if include_low else "(", "]" if include_high else ")"
            raise ValueError(
                f"{key} must be in {brackets[0]}{low}, {high}{brackets[1]}, got {_value(cfg, key)}"
            )


def require_finite(cfg: Any, keys: Iterable[str]) -> None:
    """Raises ValueError if a number, or one of a list, is not finite."""
    for key in keys:
        if not all(map(math.isfinite, _numbers(cfg, key))):
            raise ValueError(f"{key} must be finite, got {_value(cfg, key)}")


def require_length(cfg: Any, lengths: Mapping[str, int]) -> None:
    """Raises ValueError if a list has another number of elements."""
    for key, length in lengths.items():
        if len(value := _value(cfg, key)) != length:
            raise ValueError(f"{key} must have {length} elements, got {value}")


def require_whole(cfg: Any, keys: Iterable[str]) -> None:
    """Raises ValueError if an element of a list is not a whole number."""
    for key in keys:
        if not all(isinstance(element, int) for element in _value(cfg, key)):
            raise ValueError(f"{key} must be whole numbers, got {_value(cfg, key)}")


def require_low_high(cfg: Any, keys: Iterable[str]) -> None:
    """Raises ValueError if the value of a key is not (low, high), both above 0."""
    for key in keys:
        value = _value(cfg, key)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise ValueError(f"{key} must be (low, high), both above 0, got {value}")


def _numbers(cfg: Any, key: str) -> Iterator[float]:
    """The number that a key has, or all of a list, which may be nested."""
    waiting = [_value(cfg, key)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (tuple, list)):
            waiting += value
        elif isinstance(value, (int, float)):
            yield value


def _value(cfg: Any, key: str) -> Any:
    for part in filter(None, key.split(".")):
        cfg = cfg[part]
    return cfg


def _has(cfg: Any, key: str) -> bool:
    for part in key.split("."):
        if part not in cfg:
            return False
        cfg = cfg[part]
    return True


def _merge(
    cfg: Any,
    items: Iterable[tuple[str, Any]],
    source: str,
    defaults: Mapping[str, Any],
    types: Mapping[str, Sequence[type]],
) -> None:
    for key, value in items:
        *sections, name = key.split(".")
        if key in defaults:
            try:
                value = convert_value(key, value, defaults[key], types.get(key, ()))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
            _value(cfg, ".".join(sections))[name] = value
            continue
        if section := next((k for k in defaults if key.startswith(f"{k}.")), None):
            raise ValueError(f"{source}: {section} must be a value, got a section with {key}")
        if keys := [k.removeprefix(f"{key}.") for k in defaults if k.startswith(f"{key}.")]:
            if value == {}:
                continue
            raise ValueError(
                f"{source}: {key} must be a section with keys such as {', '.join(keys[:3])}, "
                f"got {value!r}"
            )
        hint = "; write KEY VALUE, not KEY=VALUE" if "=" in key else _suggestion(key, cfg)
        raise ValueError(f"{source}: unknown config key {key}{hint}")


def _suggestion(key: str, cfg: Any) -> str:
    keys = [k for k, _ in flat_items(cfg)]
    nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    best = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0) or nearest
    return f"; the nearest valid one is {best[0]}" if best else ""


def flat_items(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, and their values; an empty section is a value."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``{key: (old value, new value)}`` of the keys that both have."""
    before = dict(flat_items(old))
    return {
        key: (before[key], value)
        for key, value in flat_items(new)
        if key in before and _plain(before[key]) != _plain(value)
    }


def _plain(value: Any) -> Any:
    """Tuples, lists and their text are the same value."""
    if isinstance(value, str) and value[:1] in "([":
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
