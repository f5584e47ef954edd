"""The models that the authors published: scores, sizes and recipes, and the models themselves.

>>> from spatial_mamba_d2 import model_zoo
>>> model_zoo.list_models("detection")
>>> model = model_zoo.get("mask_rcnn_spatial_mamba_t", weights="downloads/mask_rcnn_tiny.pth")

Nothing is ever downloaded: the authors' README links their files on Google Drive.
``python -m spatial_mamba_d2.model_zoo`` prints the tables of our README.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_mamba_d2.system.package_files import recipe_file
from spatial_mamba_d2.system.tables import markdown_table

SOURCE = "https://github.com/EdwardChasel/Spatial-Mamba"
LICENSE = "Apache-2.0"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
BEGIN, END = "<!-- model zoo -->", "<!-- /model zoo -->"


@dataclass(frozen=True)
class Task:
    """What the models of one task have in common.

    Attributes:
        title: heading of its table.
        protocol: how the scores were measured.
        metrics: names of the scores, in the order of :attr:`Entry.scores`.
        input_shape: ``[B, 3, H, W]`` for which FLOPs were published.
    """

    title: str
    protocol: str
    metrics: tuple[str, ...]
    input_shape: tuple[int, int, int, int]


TASKS = {
    "classification": Task(
        "ImageNet-1k classification",
        "validation set, one centre crop of 224 x 224",
        ("top-1 %",),
        (1, 3, 224, 224),
    ),
    "detection": Task(
        "COCO detection and instance segmentation, Mask R-CNN",
        "val2017, one scale, short side 800, long side at most 1333; 1x: 12 epochs, 3x: 36 epochs "
        "with multi-scale training",
        ("box AP", "mask AP"),
        (1, 3, 800, 1280),
    ),
    "segmentation": Task(
        "ADE20K semantic segmentation, UPerNet",
        "validation set, whole images, short side 512, long side at most 2048; multi-scale: 0.75, "
        "1, 1.25 of the image, with flip; 160k iterations",
        ("mIoU", "mIoU, multi-scale"),
        (1, 3, 512, 2048),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A model on our backbone.

    Attributes:
        name: its recipe is ``configs/<name>.yaml``.
        task: a key of :data:`TASKS`.
        variant: ``"tiny"``, ``"small"`` or ``"base"``.
    """

    name: str
    task: str
    variant: str

    @property
    def config_file(self) -> Path:
        """The recipe."""
        return recipe_file(self.name)


@dataclass(frozen=True)
class CountedRecipe(Recipe):
    """A model that the authors did not publish, so that it has no scores.

    Attributes:
        title: what it is.
        parameters: exact number.
        gflops: by the authors' formula, at :attr:`Task.input_shape`, rounded.
    """

    title: str
    parameters: int
    gflops: float


@dataclass(frozen=True)
class Entry(Recipe):
    """A published model.

    Attributes:
        scores: published values of :attr:`Task.metrics`.
        parameters: exact number, including UPerNet's auxiliary head.
        published_parameters_m: millions, as the authors round them.
        published_gflops: by the authors' formula, at :attr:`Task.input_shape`.
        file_name: name of the authors' checkpoint, if known for certain.
        sha256: SHA-256 of that file, if known.
    """

    scores: tuple[float, ...]
    parameters: int
    published_parameters_m: int
    published_gflops: float
    file_name: str | None = None
    sha256: str | None = None
    source: str = SOURCE
    license: str = LICENSE


_CLASSIFIER = (26_748_862, 27, 4.5), (43_074_280, 43, 7.1), (95_745_592, 96, 15.8)
_MASK_RCNN = (46_387_782, 46, 261), (62_713_200, 63, 315), (115_251_840, 115, 494)
_UPERNET = (56_544_386, 57, 936), (72_869_804, 73, 992), (127_399_100, 127, 1176)
_ENTRIES = (
    Entry("spatial_mamba_t", "classification", "tiny", (83.5,), *_CLASSIFIER[0]),
    Entry("spatial_mamba_s", "classification", "small", (84.6,), *_CLASSIFIER[1]),
    Entry("spatial_mamba_b", "classification", "base", (85.3,), *_CLASSIFIER[2]),
    Entry("mask_rcnn_spatial_mamba_t", "detection", "tiny", (47.6, 42.9), *_MASK_RCNN[0]),
    Entry("mask_rcnn_spatial_mamba_s", "detection", "small", (49.2, 44.0), *_MASK_RCNN[1]),
    Entry("mask_rcnn_spatial_mamba_b", "detection", "base", (50.4, 45.1), *_MASK_RCNN[2]),
    Entry("mask_rcnn_spatial_mamba_t_3x", "detection", "tiny", (49.3, 43.8), *_MASK_RCNN[0]),
    Entry("mask_rcnn_spatial_mamba_s_3x", "detection", "small", (50.5, 44.6), *_MASK_RCNN[1]),
    Entry("upernet_spatial_mamba_t", "segmentation", "tiny", (48.6, 49.4), *_UPERNET[0]),
    Entry("upernet_spatial_mamba_s", "segmentation", "small", (50.6, 51.4), *_UPERNET[1]),
    Entry("upernet_spatial_mamba_b", "segmentation", "base", (51.8, 52.6), *_UPERNET[2]),
)
ENTRIES = {entry.name: entry for entry in _ENTRIES}
_CASCADE, _DETECTOR = (74_029_492, 289), ("detection", "tiny")
_COUNTED = (
    CountedRecipe("faster_rcnn_spatial_mamba_t", *_DETECTOR, "Faster R-CNN", 43_744_502, 208),
    CountedRecipe(
        "cascade_mask_rcnn_spatial_mamba_t", *_DETECTOR, "Cascade Mask R-CNN, 1x", *_CASCADE
    ),
    CountedRecipe(
        "cascade_mask_rcnn_spatial_mamba_t_3x", *_DETECTOR, "Cascade Mask R-CNN, 3x", *_CASCADE
    ),
    CountedRecipe("retinanet_spatial_mamba_t", *_DETECTOR, "RetinaNet", 36_470_218, 242),
    CountedRecipe("panoptic_fpn_spatial_mamba_t", *_DETECTOR, "Panoptic FPN", 48_018_556, 292),
    CountedRecipe(
        "panoptic_point_rend_spatial_mamba_t", *_DETECTOR, "Panoptic FPN with PointRend",
        48_243_634, 296,
    ),
    CountedRecipe("point_rend_spatial_mamba_t", *_DETECTOR, "PointRend", 62_206_358, 301),
    CountedRecipe("keypoint_rcnn_spatial_mamba_t", *_DETECTOR, "Keypoint R-CNN", 61_177_724, 557),
    CountedRecipe(
        "mask_rcnn_spatial_mamba_t_lsj", *_DETECTOR, "Mask R-CNN, large-scale jitter", 46_387_782,
        261,
    ),
)  # fmt: skip
#: Recipes of Detectron2's other architectures.
COUNTED = {recipe.name: recipe for recipe in _COUNTED}


def list_models(task: str | None = None) -> list[str]:
    """Names of the published models, of one task or all.

    Raises:
        ValueError: no such task.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return [name for name, entry in ENTRIES.items() if task in (None, entry.task)]


def get_entry(name: str) -> Entry:
    """What is known about a published model.

    Raises:
        ValueError: no such model.
    """
    if name not in ENTRIES:
        raise ValueError(f"name must be one of {', '.join(ENTRIES)}, got {name!r}")
    return ENTRIES[name]


def get_recipe(name: str) -> Entry | CountedRecipe:
    """A published model, or a recipe of :data:`COUNTED`.

    Raises:
        ValueError: no such recipe.
    """
    return COUNTED[name] if name in COUNTED else get_entry(name)


def get_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """A recipe, as the tools load it.

    Args:
        name: see :func:`list_models`; or of :data:`COUNTED`.
        overrides: ``KEY VALUE`` pairs.

    Raises:
        ValueError: no such model, or a wrong override.
    """
    entry = get_recipe(name)
    # Imported here because detection needs Detectron2.
    subpackage = importlib.import_module(f"spatial_mamba_d2.{entry.task}.config")
    return subpackage.load_config(entry.config_file, overrides)


def get_lazy_config(name: str) -> Any:
    """A detector's recipe in Python, as :func:`detectron2.model_zoo.get_config` gives its own.

    >>> cfg = get_lazy_config("cascade_mask_rcnn_spatial_mamba_t")
    >>> model = detectron2.config.instantiate(cfg.model)

    Raises:
        ValueError: no such recipe, or not of a detector.
        ImportError: Detectron2 is not installed.
    """
    if get_recipe(name).task != "detection":
        raise ValueError(f"name must be of a detector, because others have YAML only, got {name!r}")
    from spatial_mamba_d2.detection.lazy import load_lazy_config

    return load_lazy_config(name)


def build(name: str, device: str = "cpu") -> Any:
    """A published model, or one of :data:`COUNTED`, with initial weights, in eval mode.

    Args:
        name: see :func:`get_recipe`.
        device: ``meta`` makes parameters of shapes only, without the time to draw their values.

    Raises:
        ValueError: no such model.
        ImportError: the model is a detector, and Detectron2 is not installed.
    """
    import torch

    from spatial_mamba_d2 import models

    entry = get_recipe(name)
    if entry.task == "detection":
        from spatial_mamba_d2.detection import build_model

        cfg = get_config(name, ["MODEL.DEVICE", "cpu"]).clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = device
        with torch.device(device):
            return build_model(cfg).eval()
    builders = {"classification": models.build_classifier, "segmentation": models.build_upernet}
    with torch.device(device):
        return builders[entry.task](entry.variant).eval()


def get(name: str, weights: str | Path, sha256: str | None = None) -> Any:
    """A published model with its weights, on the CPU, in eval mode.

    Args:
        name: see :func:`list_models`.
        weights: the checkpoint, the authors' file or one of ours; or a folder that holds it as
            ``<name>.safetensors``, ``.pth``, ``.pt`` or ``.ckpt``.
        sha256: expected SHA-256 of the file; by default the one that the zoo knows, if any.

    Raises:
        FileNotFoundError: no such file; the message says where to get it.
        ImportError: the model is a detector, and Detectron2 is not installed.
        ValueError: no such model, or the file does not hold all of its weights.
    """
    from spatial_mamba_d2.models import load_weights, read_checkpoint

    entry = get_entry(name)
    path = _find(entry, Path(weights))
    content = read_checkpoint(path, sha256 or entry.sha256)
    model = build(name)
    load_weights(model, content, partial=False, source_name=str(path))
    return model


def _find(entry: Entry, weights: Path) -> Path:
    if not weights.is_dir():
        candidates = [weights]
    else:
        names = [entry.name + suffix for suffix in SUFFIXES]
        candidates = [weights / file for file in (*names, entry.file_name) if file]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"weights: no such file: {' or '.join(map(str, candidates))}; the README of {entry.source} "
        f"links the authors' checkpoints; download it yourself, nothing is downloaded for you"
    )


def markdown_tables() -> str:
    """The tables of the README: what was published, and what else has a recipe."""
    return "\n\n".join([*(_markdown_table(task) for task in TASKS), _counted_table()])


def _markdown_table(task_name: str) -> str:
    task = TASKS[task_name]
    height, width = task.input_shape[2:]
    rows = [
        (
            f"`{entry.name}`",
            *map(str, entry.scores),
            f"{entry.published_parameters_m} M",
            f"{entry.published_gflops:g} G",
            f"[{entry.name}.yaml](configs/{entry.name}.yaml)",
        )
        for entry in map(get_entry, list_models(task_name))
    ]
    header = ("model", *task.metrics, "parameters", f"FLOPs at {height} x {width}", "recipe")
    return f"**{task.title}** ({task.protocol})\n\n{markdown_table(header, rows)}"


def _counted_table() -> str:
    height, width = TASKS["detection"].input_shape[2:]
    rows = [
        (
            recipe.title,
            f"{recipe.parameters / 1e6:.0f} M",
            f"{recipe.gflops:g} G",
            f"[{recipe.name}.yaml](configs/{recipe.name}.yaml)",
        )
        for recipe in COUNTED.values()
    ]
    header = ("architecture", "parameters", f"FLOPs at {height} x {width}", "recipe")
    title = "**Other architectures of Detectron2, tiny backbone** (no scores are published)"
    return f"{title}\n\n{markdown_table(header, rows)}"


if __name__ == "__main__":
    print(markdown_tables())
