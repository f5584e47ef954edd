"""Models in folders as the Hugging Face Hub has them: weights, configuration, model card.

>>> from spatial_mamba_d2 import hub
>>> hub.save_pretrained(segmentor, "my-upernet", label_names=["sky", "road"], scores={"mIoU": 71.2})
>>> segmentor = hub.from_pretrained("my-upernet")  # or a repository, "me/my-upernet"
>>> hub.push_to_hub(segmentor, "me/my-upernet", label_names=["sky", "road"])

The folder of a classifier is in timm's format: ``timm.create_model("local-dir:FOLDER",
pretrained=True)``. Only these functions use the network, and only for a repository.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spatial_mamba_d2 import model_card
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.models import SpatialMambaClassifier, UPerNet, load_weights, read_checkpoint
from spatial_mamba_d2.models.checkpoints.convert import (
    backbone_arguments,
    find_variant,
    segmentor_arguments,
)
from spatial_mamba_d2.models.checkpoints.names import backbone_prefix, model_kind
from spatial_mamba_d2.models.checkpoints.reading import unwrap
from spatial_mamba_d2.models.checkpoints.writing import write_safetensors
from spatial_mamba_d2.models.timm_backbone import TimmBackbone, check_timm_name
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.missing import no_such
from spatial_mamba_d2.training.run_folder import checkpoints_and_metrics

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, RECIPE, CARD = "model.safetensors", "config.json", "config.yaml", "README.md"
# What a configuration says about a network and its images, and not about data or machines.
_SECTIONS = ("VERSION", "MODEL", "INPUT", "TEST")
_LOCAL_KEYS = {"MODEL": ("WEIGHTS", "WEIGHTS_SKIP", "DEVICE"), "TEST": ("SAVE_LABELS",)}


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    cfg: Any = None,
    label_names: Sequence[str] | None = None,
    zoo_name: str | None = None,
    scores: Mapping[str, float] | None = None,
) -> Path:
    """Write ``model.safetensors``, ``config.json``, a model card and, with ``cfg``, a recipe.

    A model card that exists is kept. Of a model that was trained, pass the configuration as
    ``cfg``; paths of this machine are left out. ``OUTPUT_DIR`` is no folder for this, because it
    holds the ``config.yaml`` of the training.

    Args:
        model: a classifier, a UPerNet, or a detector.
        folder: is created; each file in it is complete or not written.
        cfg: the model's configuration, which a detector needs.
        label_names: of the classes.
        zoo_name: the published model that this is, with the authors' weights; its card states the
            published scores.
        scores: ``{name: value}`` of these weights, for a new card.

    Returns:
        the folder.

    Raises:
        ValueError: another kind of model, a detector without ``cfg``, another number of names than
            classes, a ``zoo_name`` of another architecture, sizes that the files cannot state, or a
            ``folder`` that holds a training.
        WeightsError: the model has weights that are not finite.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if found := checkpoints_and_metrics(folder):
        raise ValueError(f"folder must not hold a training, got {folder} with {found}")
    facts = _facts(model, cfg, label_names)
    card = model_card.write(facts, zoo_name, scores)
    state = unwrap(model.state_dict(), "the model")
    config = _configuration(model, facts, cfg)
    _check_sizes(state, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(state, folder / WEIGHTS)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
    if cfg is not None:
        texts[RECIPE] = _recipe(cfg)
    else:
        (folder / RECIPE).unlink(missing_ok=True)  # of the model that was here before
    if not (folder / CARD).exists():
        texts[CARD] = card
    elif scores or zoo_name or label_names:
        logger.warning("%s is kept: what it says of scores and classes may be old", folder / CARD)
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder


def from_pretrained(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """The model in a folder or repository, on the CPU, in eval mode.

    Args:
        source: a folder of :func:`save_pretrained`, or of timm for a classifier of ours; or the
            name of a repository on the Hugging Face Hub, which is downloaded.
        revision: of the repository.
        local_files_only: use what was downloaded earlier.
        **options: arguments of the classifier, or of UPerNet and its backbone, that do not change
            the parameters, such as ``drop_path_rate``. A detector has none.

    Raises:
        FileNotFoundError: no such folder or repository, or a file is missing.
        OSError: the repository cannot be downloaded.
        ValueError: an option is unknown, a file is broken, the files do not belong together, or a
            ``revision`` of a folder.
        ImportError: the model is a detector, and Detectron2 is not installed.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source), revision, local_files_only)
    elif revision is not None:
        raise ValueError(f"revision must be None for the folder {folder}, got {revision!r}")
    weights = folder / WEIGHTS
    state = unwrap(read_checkpoint(weights), str(weights))
    config = read_config(folder)
    model = _build(state, config, folder, options)
    load_weights(model, state, partial=False, source_name=str(weights))
    return model.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of ``config.json``, such as ``label_names``.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is broken.
    """
    path = Path(folder, CONFIG)
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def push_to_hub(
    model: nn.Module, repo_id: str, *, private: bool = False, token: str | None = None,
    commit_message: str = "Add model", **content: Any,
) -> str:  # fmt: skip
    """Upload what :func:`save_pretrained` writes; returns the address of the commit.

    A model card that the repository has is kept.

    Args:
        model: see :func:`save_pretrained`.
        repo_id: the repository, which is created if it does not exist.
        private: whether a new repository is private.
        token: for the Hub; by default the one that ``hf auth login`` has stored.
        **content: other arguments of :func:`save_pretrained`.

    Raises:
        ValueError: see :func:`save_pretrained`.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **content)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if api.file_exists(repo_id, CARD):
            Path(folder, CARD).unlink()
        stale = None if Path(folder, RECIPE).exists() else RECIPE
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            delete_patterns=stale,
        ).commit_url


def _download(repo_id: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    files = [WEIGHTS, CONFIG, RECIPE]
    try:
        folder = snapshot_download(
            repo_id, revision=revision, local_files_only=local_files_only, allow_patterns=files
        )
    except errors.HFValidationError:
        raise no_such("source", repo_id, "folder") from None
    except (errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError) as error:
        raise no_such("source", repo_id, "folder, nor is it a repository at hand") from error
    except (errors.HfHubHTTPError, ConnectionError) as error:
        raise OSError(f"source {repo_id} cannot be downloaded: {error}") from error
    return Path(folder)


def _facts(model: nn.Module, cfg: Any, label_names: Sequence[str] | None) -> model_card.Facts:
    names = tuple(label_names) if label_names is not None else None
    num_parameters = sum(p.numel() for p in model.parameters())
    state = model.state_dict()
    if isinstance(model, SpatialMambaClassifier):
        task, num_classes = "classification", model.num_classes
        backbone = _spatial_mamba_name(state)
    elif isinstance(model, UPerNet):
        task, num_classes = "segmentation", len(state["decode_head.classify.weight"])
        if isinstance(model.backbone, TimmBackbone):
            backbone = model.backbone.name
        else:
            backbone = _spatial_mamba_name(state)
    elif model_kind(state) == "detector":
        if cfg is None:
            raise ValueError("cfg must be given for a detector, which is built from it")
        from spatial_mamba_d2.detection.classes import num_classes as classes_of

        task, num_classes, backbone = "detection", classes_of(cfg), _spatial_mamba_name(state)
    else:
        raise ValueError(
            f"model must be a classifier, a UPerNet or a detector, got {type(model).__name__}"
        )
    if names is not None and len(names) != num_classes:
        raise ValueError(f"label_names must be {num_classes}, one for each class, got {len(names)}")
    return model_card.Facts(task, backbone, num_parameters, num_classes, names)


def _spatial_mamba_name(state: Mapping[str, Tensor]) -> str:
    variant = find_variant(backbone_arguments(_backbone_state(state), "the model"))
    return f"spatial_mamba_{variant}" if variant else "spatial_mamba"


def _backbone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = backbone_prefix(state)
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}


def _configuration(model: nn.Module, facts: model_card.Facts, cfg: Any) -> dict[str, Any]:
    """The content of ``config.json``; that of a classifier is what timm reads."""
    content: dict[str, Any] = {
        "library_name": "spatial_mamba_d2", "task": facts.task, "num_classes": facts.num_classes,
    }  # fmt: skip
    if facts.label_names is not None:
        content["label_names"] = list(facts.label_names)
    if isinstance(model, SpatialMambaClassifier):
        content.update(_for_timm(model, facts, cfg))
    elif isinstance(model, UPerNet) and isinstance(model.backbone, TimmBackbone):
        backbone = model.backbone
        content["model_args"] = {"timm_name": backbone.name, "in_chans": backbone.in_chans}
    return content


def _for_timm(model: SpatialMambaClassifier, facts: model_card.Facts, cfg: Any) -> dict[str, Any]:
    import timm

    arguments = backbone_arguments(model.state_dict(), "the model")
    name = facts.backbone if timm.is_model(facts.backbone) else "spatial_mamba_tiny"
    known: Any = timm.get_pretrained_cfg(name)
    pretrained = known.to_dict(remove_source=True, remove_null=True)
    pretrained.pop("architecture", None)
    in_chans, crop_px = arguments["in_chans"], pretrained["input_size"][-1]
    if cfg is None and in_chans != len(pretrained["mean"]):
        del pretrained["mean"], pretrained["std"]  # nothing is known of these channels
    if cfg is not None:
        crop_px = cfg.INPUT.CROP_PX
        pretrained["crop_pct"] = crop_px / cfg.TEST.SHORT_PX
        pretrained["mean"] = [value / 255 for value in cfg.MODEL.PIXEL_MEAN]
        pretrained["std"] = [value / 255 for value in cfg.MODEL.PIXEL_STD]
    pretrained.update(input_size=(in_chans, crop_px, crop_px), num_classes=facts.num_classes)
    pool = model.global_pool.pool_type
    return {
        "architecture": name,
        "num_features": model.num_features,
        "global_pool": pool,
        "model_args": {**arguments, "num_classes": facts.num_classes, "global_pool": pool},
        "pretrained_cfg": pretrained,
    }


def _check_sizes(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raises ValueError if a model of the arguments that the files state has other sizes."""
    if model_kind(state) == "detector" or "timm_name" in config.get("model_args", {}):
        return  # built from its cfg, or from a name
    with torch.device("meta"):
        rebuilt = _build(state, config, Path("."), {}).state_dict()
    for name, value in state.items():
        if rebuilt[name].shape != value.shape:
            raise ValueError(
                f"model must have the same ssm_ratio and mlp_ratio in all stages, and whole widths "
                f"in the first: {name} would be {list(rebuilt[name].shape)}, got "
                f"{list(value.shape)}"
            )


def _recipe(cfg: Any) -> str:
    kept = cfg.clone()
    kept.defrost()
    for section in [name for name in kept if name not in _SECTIONS]:
        del kept[section]
    for section, keys in _LOCAL_KEYS.items():
        for key in set(keys) & set(kept[section]):
            del kept[section][key]
    return kept.dump()


def _build(
    state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, options: dict[str, Any]
) -> nn.Module:
    kind, weights = model_kind(state), str(folder / WEIGHTS)
    if kind == "detector":
        if options:
            raise ValueError(f"options must be none for a detector, got {', '.join(options)}")
        from spatial_mamba_d2.detection import build_model
        from spatial_mamba_d2.detection.config import load_config

        return build_model(load_config(folder / RECIPE, ["MODEL.DEVICE", "cpu"]))
    saved = config.get("model_args", {})
    if not isinstance(saved, dict):
        raise ValueError(f"{folder / CONFIG}: model_args must be an object, got {saved!r}")
    if kind == "segmentor":
        arguments = segmentor_arguments(state, weights)
        if "timm_name" in saved:
            arguments.update(timm_name=saved["timm_name"], in_chans=saved.get("in_chans", 3))
            check_timm_name(saved["timm_name"], f"{folder / CONFIG}: timm_name")
        else:
            arguments.update(backbone_arguments(_backbone_state(state), weights))
        return _construct(UPerNet, arguments, options)
    arguments = backbone_arguments(state, weights)
    arguments["num_classes"] = len(state["head.weight"]) if "head.weight" in state else 0
    arguments["global_pool"] = saved.get("global_pool", "avg")
    return _construct(SpatialMambaClassifier, arguments, options)


def _construct(
    model_class: type[nn.Module], arguments: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    if fixed := sorted(set(arguments) & set(options)):
        raise ValueError(f"options must not change the saved model, got {', '.join(fixed)}")
    try:
        return model_class(**arguments, **options)
    except TypeError as error:
        raise ValueError(f"options must be arguments of {model_class.__name__}: {error}") from None
