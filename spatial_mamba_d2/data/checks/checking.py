"""``check_data``: everything that can be said about labelled images without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from spatial_mamba_d2.data.checks.duplicates import check_duplicates
from spatial_mamba_d2.data.checks.image_facts import (
    ImageFacts,
    check_colors,
    check_files,
    check_names,
    read_facts,
)
from spatial_mamba_d2.data.checks.instance_checks import (
    CheckedInstances,
    check_unused_images,
    similar_names,
)
from spatial_mamba_d2.data.checks.label_checks import check_classes, check_label_maps
from spatial_mamba_d2.data.checks.report import DataReport, SplitCounts
from spatial_mamba_d2.data.faults import Fault, Finding
from spatial_mamba_d2.data.formats import Instances, LabelledData
from spatial_mamba_d2.data.imagenet import ClassifiedImage
from spatial_mamba_d2.data.label_maps import Pair

# A class may be missing in the training split by chance, if it is rare and the splits are small: it
# is a finding if that would happen with a probability below this, over all classes.
_UNLIKELY = 0.05


def check_data(data: LabelledData) -> DataReport:
    """Check all files and labels of ``data``.

    Every image is decoded once per machine, as long as it does not change.

    Returns:
        what was found; no finding means that nothing is wrong.
    """
    findings = list(data.findings)
    notes = list(data.notes)
    facts = read_facts([file for split in data.splits for file in data.image_files(split)])
    broken = {file: fact for file, fact in facts.items() if isinstance(fact, Fault)}
    good = {file: fact for file, fact in facts.items() if isinstance(fact, ImageFacts)}
    counts: dict[str, SplitCounts] = {}
    if data.task == "detection":
        _check_instances(data, counts, findings, notes)
    elif data.task == "segmentation":
        for split, items in data.splits.items():
            assert data.labels is not None, "label maps have a format"
            pairs = [item for item in items if isinstance(item, Pair)]  # type: ignore[union-attr]
            found, counts[split], _ = check_label_maps(pairs, data.labels)
            findings += found
    else:
        for split, items in data.splits.items():
            samples = [i for i in items if isinstance(i, ClassifiedImage)]  # type: ignore[union-attr]
            counts[split], _ = check_classes(samples, data.classes, broken)
    if data.task != "detection":
        findings += similar_names(list(data.classes), str(data.path))
    findings += _check_unseen(data.task, data.classes, counts, str(data.path))
    notes += _absent(data.classes, counts)
    findings += check_files(facts)
    findings += check_colors(facts, data.path)
    files_of = {split: data.image_files(split) for split in data.splits}
    findings += check_names([file for files in files_of.values() for file in files])
    findings += check_duplicates(files_of, good, _labels(data))
    sizes = Counter((fact.height, fact.width) for fact in good.values())
    return DataReport(data, counts, _merged(findings), notes, sizes)


def _check_instances(
    data: LabelledData,
    counts: dict[str, SplitCounts],
    findings: list[Finding],
    notes: list[str],
) -> None:
    index = {name: i for i, name in enumerate(data.classes)}
    parts = {s: part for s, part in data.splits.items() if isinstance(part, Instances)}
    names_of: dict[str, set[str]] = {}
    for split, part in parts.items():
        checked = CheckedInstances(split, part, _with_all_names(index, part))
        counts[split] = checked.counts
        findings += checked.findings
        notes += [f"{split}: {note}" for note in checked.notes]
        names_of[split] = set(checked.categories.values())
    if data.format == "coco":
        findings += check_unused_images(parts)
    for split, names in names_of.items():
        others = names_of.get("train", names)
        if missing := sorted(names ^ others):
            where = str(parts[split].json_file or split)
            message = f"{where}: classes differ from those of train in {', '.join(missing[:10])}"
            findings.append(Finding("classes differ between splits", where, message))


def _with_all_names(index: Mapping[str, int], part: Instances) -> Mapping[str, int]:
    """The classes by name; names that the checks make of repeated ones count for the first."""

    class Names(dict[str, int]):
        def __missing__(self, name: str) -> int:
            return next((i for known, i in index.items() if name.startswith(known)), 0)

    return Names(index)


def _check_unseen(
    task: str, classes: Sequence[str], counts: Mapping[str, SplitCounts], where: str
) -> list[Finding]:
    """Classes that training never sees, and other splits have."""
    if "train" not in counts:
        return []
    found = []
    num_train = counts["train"].num_images
    for split, count in counts.items():
        share = count.num_images / max(1, count.num_images + num_train)
        for index, name in enumerate(classes):
            number = count.images_by_class[index]
            if not number or counts["train"].images_by_class[index]:
                continue
            if task == "classification" or share**number * len(classes) < _UNLIKELY:
                message = f"{where}: {split} has {number} images with {name!r}, train has none"
                found.append(Finding("class missing from training", where, message))
    return found


def _absent(classes: Sequence[str], counts: Mapping[str, SplitCounts]) -> list[str]:
    """Classes of which there is little or nothing to learn."""
    absent = [
        name
        for index, name in enumerate(classes)
        if not any(count.by_class[index] for count in counts.values())
    ]
    if not absent:
        return []
    shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
    return [f"{len(absent)} of {len(classes)} classes never occur: {shown}"]


def _labels(data: LabelledData) -> dict[Path, str]:
    """The class of each image, where equal images must have equal ones."""
    labels = {}
    if data.task == "classification":
        for items in data.splits.values():
            for item in items:  # type: ignore[union-attr]
                if isinstance(item, ClassifiedImage):
                    labels[item.path] = data.classes[item.target]
    return labels


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Without repetitions: a damaged file is found by several checks; sorted by kind."""
    kept: dict[tuple[str, str, str], Finding] = {}
    damaged: set[str] = set()
    for finding in findings:
        if finding.kind in ("damaged image file", "unreadable image file"):
            if finding.file in damaged:
                continue
            damaged.add(finding.file)
        kept.setdefault(finding[:3], finding)
    order = {kind: i for i, kind in enumerate(dict.fromkeys(f.kind for f in kept.values()))}
    return sorted(kept.values(), key=lambda finding: order[finding.kind])
