"""Which class of a detector a category of a file is: the one of the same name, whatever its id."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode

from spatial_mamba_d2.data.coco import CocoDataset

logger = logging.getLogger(__name__)


def num_classes_key(cfg: CfgNode) -> str:
    """The key that has the number of classes."""
    single_stage = cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FCOS")
    return "MODEL.RETINANET.NUM_CLASSES" if single_stage else "MODEL.ROI_HEADS.NUM_CLASSES"


def num_classes(cfg: CfgNode) -> int:
    """How many classes the detector has."""
    return int(cfg.MODEL[num_classes_key(cfg).split(".")[1]].NUM_CLASSES)


def check_num_classes(cfg: CfgNode, classes: Sequence[str], source: str) -> None:
    """Raises ValueError if the detector has another number of classes than its data."""
    if len(classes) != num_classes(cfg):
        raise ValueError(
            f"{num_classes_key(cfg)} must be {len(classes)}, the number of categories in {source}, "
            f"got {num_classes(cfg)}; they are {_shown(classes)}"
        )


def merge_classes(files: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """The classes of several files: those of the first, then what the others have in addition.

    Args:
        files: name and classes of each.
    """
    files = list(files)
    merged = list(dict.fromkeys(name for _, names in files for name in names))
    for source, names in files:
        if missing := [name for name in merged if name not in names]:
            logger.warning(
                "%s has no category %s, which other files have: its images must not show any, "
                "because they would train as background", source, _shown(missing),
            )  # fmt: skip
    return merged


def match_classes(coco: CocoDataset, classes: Sequence[str], source: str) -> dict[int, int]:
    """``{id of a category: index of its class}``.

    A category that no class is named after is left out if it has no annotation.

    Raises:
        ValueError: an annotation's category is no class.
    """
    index = {name: i for i, name in enumerate(classes)}
    ids = {id_: index[name] for id_, name in coco.categories if name in index}
    used = {a["category_id"] for record in coco.records for a in record["annotations"]}
    unknown = [name for id_, name in coco.categories if id_ not in ids and id_ in used]
    names = [name for _, name in coco.categories]
    if unknown:
        raise ValueError(
            f"{source}: classes are matched by name, and the detector has no {_shown(unknown)}\n"
            f"  in the file: {_shown(names)}\n"
            f"  the detector's: {_shown(classes)}"
        )
    if unused := [name for name in names if name not in index]:
        logger.info("%s: left out, because no class: %s", source, _shown(unused))
    if names != list(classes) and len(ids) == len(names) == len(classes):
        logger.info("%s has its categories in another order: matched by name", source)
    elif absent := [name for name in classes if name not in names]:
        logger.info("%s has no category %s", source, _shown(absent))
    return ids


def category_ids(ids: dict[int, int], num_classes: int) -> list[int]:
    """The id of each class in the file, or one that is free if the file does not have the class."""
    by_class = {index: id_ for id_, index in ids.items()}
    free = max(ids, default=0) + 1
    return [by_class.get(index, free + index) for index in range(num_classes)]


def require_equal_classes(
    source: str, names: Sequence[str] | None, classes: Sequence[str] | None
) -> None:
    """Raises ValueError if a data set without a COCO file has other classes than the detector."""
    if names and classes and list(names) != list(classes):
        raise ValueError(
            f"data set {source} must have the detector's classes {_shown(classes)}, "
            f"got {_shown(names)}"
        )


def _shown(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:20]))}{', ...' if len(names) > 20 else ''}"
