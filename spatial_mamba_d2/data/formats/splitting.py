"""A split into training and test images of data that have none: by groups, and reproducible."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.formats.records import ALL, Instances, LabelledData, Split
from spatial_mamba_d2.data.imagenet import ClassifiedImage

_LEAST_GROUPS = 5  # with fewer, a share of the images cannot be met
_NUMBER = re.compile(r"[-_. ]*\d+$")
_ROBOFLOW = re.compile(r"\.rf\.[0-9a-f]{16,}$")  # which marks copies of one image


def split_data(data: LabelledData, *, val_share: float = 0.2, seed: int = 0) -> LabelledData:
    """Data with the splits ``train`` and ``val``; unchanged if they have these.

    A missing ``val`` is taken from ``test`` if there is one, and else from the images of ``train``
    or of ``all``. Images of one group stay together: see :func:`group_images`. Which groups are for
    testing follows from their names and the seed alone, whatever the order of the files. In
    classification, each class is split for itself.

    Args:
        val_share: of the images, about, above 0 and below 1.
        seed: another one gives another split.

    Raises:
        ValueError: ``val_share`` is out of range, or there are less than two groups.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share must be above 0 and below 1, got {val_share}")
    splits = dict(data.splits)
    if "train" in splits and "val" in splits:
        return data
    if "train" in splits and "test" in splits:
        rule = "the split test is used as val"
        return replace(data, splits={"train": splits["train"], "val": splits["test"]},
                       split_rule=rule)  # fmt: skip
    source = "train" if "train" in splits else ALL if ALL in splits else next(iter(splits))
    items = splits.pop(source)
    files = data.image_files(source)
    strata = [item.target if isinstance(item, ClassifiedImage) else 0 for item in _listed(items)]
    root = data.path if data.path.is_dir() else data.path.parent
    chosen: set[int] = set()
    rules: Counter[str] = Counter()
    for stratum in sorted(set(strata)):
        members = [index for index, of in enumerate(strata) if of == stratum]
        rule, groups = group_images([files[index] for index in members], root)
        rules[rule] += 1
        chosen |= _choose(dict(zip(members, groups, strict=True)), val_share, seed)
    rule = ", ".join(rules)
    if not chosen or len(chosen) == len(files):
        raise ValueError(
            f"{data.path}: {len(files)} images cannot be split (by {rule}); give training and test "
            "images folders train and val"
        )
    rest = [index for index in range(len(files)) if index not in chosen]
    new = {"train": _select(items, rest), "val": _select(items, sorted(chosen)), **splits}
    text = (
        f"{source}: {len(chosen)} of {len(files)} images are val (share {val_share:g}, seed {seed})"
        f", by {rule}"
    )
    return replace(data, splits=new, split_rule=text)


def group_images(files: Sequence[Path], root: Path) -> tuple[str, list[str]]:
    """What groups are, in words, and the group of each image.

    Images of one scene, video or object must not be in both splits. Without better knowledge, they
    are those of one folder if there are at least 5 folders; else those of one prefix before a
    number, if there are at least 5, each of several images; else single images.
    """
    stems = [_ROBOFLOW.sub("", file.stem) for file in files]
    folders = [str(file.parent) for file in files]
    prefixes = [
        f"{folder}/{_NUMBER.sub('', stem) or stem}"
        for folder, stem in zip(folders, stems, strict=True)
    ]
    names = [f"{folder}/{stem}" for folder, stem in zip(folders, stems, strict=True)]
    for rule, groups in (("folder", folders), ("prefix of names", prefixes)):
        sizes = Counter(groups)
        if _LEAST_GROUPS <= len(sizes) <= len(files) / 2 and max(sizes.values()) < len(files) / 2:
            return f"groups: {rule}, {len(sizes)}", [_below(g, root) for g in groups]
    return "single images", [_below(name, root) for name in names]


def _below(name: str, root: Path) -> str:
    """A group's name that stays when the data are moved."""
    path = Path(name)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _choose(group_of: Mapping[int, str], share: float, seed: int) -> set[int]:
    """The images of the groups that are for testing; never all groups."""
    members: dict[str, list[int]] = {}
    for index, group in group_of.items():
        members.setdefault(group, []).append(index)
    wanted = max(1, round(share * len(group_of)))
    chosen: set[int] = set()
    for group in sorted(members, key=lambda name: _hash(seed, name)):
        num_taken = len(chosen) + len(members[group])
        fits = num_taken <= max(wanted, 1.5 * wanted if chosen else num_taken)
        if len(chosen) < wanted and fits and num_taken < len(group_of):
            chosen.update(members[group])
    return chosen


def _listed(items: Split) -> Sequence[Any]:
    return items.image_files() if isinstance(items, Instances) else items


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()


def _select(items: Split, indices: Sequence[int]) -> Split:
    """The images of those positions, with what belongs to them."""
    if not isinstance(items, Instances):
        return [items[index] for index in indices]  # type: ignore[return-value]
    named = [i for i in items.content["images"]
             if isinstance(i, dict) and isinstance(i.get("file_name"), str)]  # fmt: skip
    images = [named[index] for index in indices]
    ids: set[Any] = {image.get("id") for image in images}
    annotations = [
        a for a in items.content["annotations"] if isinstance(a, dict) and a.get("image_id") in ids
    ]
    content = {**items.content, "images": images, "annotations": annotations}
    return Instances(content, items.image_root)
