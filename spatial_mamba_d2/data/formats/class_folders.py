"""Images in a folder for each class, with or without folders for splits above."""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.formats.instance_builder import SPLIT_NAMES, name_split
from spatial_mamba_d2.data.formats.records import ALL, LabelledData, Split, UnusableDataError
from spatial_mamba_d2.data.imagenet import ClassifiedImage
from spatial_mamba_d2.data.images import SUFFIXES, files_below, is_litter


def split_folders(path: Path) -> dict[str, Path]:
    """Name of the split -> its folder; ``{"all": path}`` if the data are not split."""
    found: dict[str, Path] = {}
    for folder in _folders(path):
        if (split := name_split([folder.name])) != ALL and _folders(folder):
            found.setdefault(split, folder)
    if not found:
        return {ALL: path}
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def read_class_folders(path: Path) -> LabelledData:
    """Read ``ROOT/SPLIT/CLASS/*``, or ``ROOT/CLASS/*``; subfolders belong to their class.

    Raises:
        UnusableDataError: less than two classes have images.
    """
    folders = split_folders(path)
    findings: list[Finding] = []
    images: dict[str, dict[str, list[Path]]] = {}
    for split, folder in folders.items():
        of_class = images[split] = {}
        for class_folder in _folders(folder):
            files = _images(files_below(class_folder))
            if not files:
                message = f"{class_folder} holds no image"
                findings.append(Finding("empty class", str(class_folder), message))
            of_class[class_folder.name] = files
        for file in _images(sorted(folder.iterdir())):
            message = f"{file} is in no folder of a class"
            findings.append(Finding("image in no class", str(file), message))
    names = sorted({n for of_class in images.values() for n, files in of_class.items() if files})
    if len(names) < 2:
        raise UnusableDataError(
            f"{path}: classes are folders with images, of which there must be 2, got {names}"
        )
    index = {name: i for i, name in enumerate(names)}
    splits: dict[str, Split] = {
        split: [
            ClassifiedImage(file, index[name]) for name, files in of_class.items() for file in files
        ]
        for split, of_class in images.items()
    }
    return LabelledData(path, "class_folders", "classification", tuple(names), splits, findings)


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not is_litter(f))


def _images(files: list[Path]) -> list[Path]:
    return [f for f in files if f.suffix.lower() in SUFFIXES and not is_litter(f)]
