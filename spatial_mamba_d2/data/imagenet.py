"""Classification data in class folders, as ImageNet has them, checked.

::

    ROOT/SPLIT/CLASS/NAME.JPEG          any format that Pillow reads

The folders' names are the classes: WordNet ids in ImageNet, whatever you like elsewhere. A split
may also be a file in ``ROOT`` with a line ``FILE<tab>CLASS`` for each image.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torchvision import transforms

from spatial_mamba_d2.data.class_file import check_distinct, read_class_lines
from spatial_mamba_d2.data.faults import (
    Fault,
    OnError,
    check_on_error,
    check_once,
    reading_fault,
    settle_faults,
)
from spatial_mamba_d2.data.images import (
    SUFFIXES,
    files_below,
    is_image,
    is_litter,
    open_image,
    read_size,
)
from spatial_mamba_d2.data.pair_files import is_list
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.data.text_file import read_text_file
from spatial_mamba_d2.system.missing import no_such
from spatial_mamba_d2.system.seeding import seeded

logger = logging.getLogger(__name__)

# Of files that may have more than 8 bits: their values decide whether they can be read.
_DEEP_SUFFIXES = {".png", ".tif", ".tiff"}
_LONGEST_SHAPE = 50  # long side / short side of images that are resized as they are


NO_CLASS, EMPTY_CLASS = "folder that is not a class", "empty class"  # faults of folders


class ClassifiedImage(NamedTuple):
    """An image file and the index of its class."""

    path: Path
    target: int


def load_classes(source: str, root: str | Path, split: str, num_classes: int) -> tuple[str, ...]:
    """Names of the classes, which are names of folders, in the order of their indices.

    Args:
        source: ``"imagenet-1k"`` for its 1000 WordNet ids; a file in the folder ``root``, with one
            name a line; or ``""`` for the sorted names of the folders in ``root/split``, or of the
            classes in that list.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: these are another number of classes.
    """
    if source == "imagenet-1k":
        names = tuple(ImageNetInfo("imagenet-1k").label_names())
    elif source:
        names = tuple(read_class_lines(root, source))
        check_distinct(names, source)
    elif is_list(root, split):
        names = tuple(sorted({name for _, name in _listed(root, split, [])}))
    else:
        names = tuple(folder.name for folder in _folders(Path(root, split)))
        if not names:
            raise ValueError(
                f"DATASETS.ROOT: {Path(root, split)} must have a folder for each class, got none"
            )
    if len(names) != num_classes:
        source = source or f"the folders of {Path(root, split)}"
        raise ValueError(
            f"MODEL.NUM_CLASSES must be {len(names)}, the number of classes in DATASETS.CLASSES "
            f"({source}), got {num_classes}"
        )
    return names


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise no_such("DATASETS.ROOT", path, "folder", "datasets/README.md shows the tree")
    return sorted(f for f in path.iterdir() if f.is_dir() and not is_litter(f))


def read_sample(
    sample: ClassifiedImage, value_range: PixelRange | None = None
) -> tuple[Image.Image, int]:
    """The image as it is stored, and its class; see :func:`~.images.open_image`.

    EXIF orientation is left alone, as torchvision and the authors do: some images of ImageNet have
    one.
    """
    return open_image(sample.path, upright=False, value_range=value_range), sample.target


class CheckedSplit(NamedTuple):
    """The usable images of a split, and what was left out: kind of fault -> number."""

    samples: list[ClassifiedImage]
    left_out: dict[str, int]


def load_split(
    root: str | Path, split: str, classes: Sequence[str], **kwargs: Any
) -> list[ClassifiedImage]:
    """The images of :func:`check_split`."""
    return check_split(root, split, classes, **kwargs).samples


def check_split(
    root: str | Path,
    split: str,
    classes: Sequence[str],
    *,
    on_error: OnError = "raise",
    check_decode: bool = False,
    value_range: PixelRange | None = None,
) -> CheckedSplit:
    """The images of a split, in the order of their classes and names.

    Args:
        on_error: ``"raise"`` reports all faults together; ``"skip"`` skips what they concern and
            warns with their number.
        check_decode: also decode every image, which finds damaged and truncated ones; if not, only
            the headers of PNG and TIFF are read, and files of more than 8 bits decoded. Once per
            machine, and remembered for unchanged files.
        value_range: see :func:`~.images.read_image`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image is usable; with ``"raise"``, any fault: a folder that is not a class or
            has no image, an image that (if checked) cannot be decoded.
    """
    check_on_error(on_error)
    where = Path(root, split)
    index = {name: i for i, name in enumerate(classes)}
    samples: list[ClassifiedImage] = []
    faults: list[Fault] = []
    is_file = is_list(root, split)
    for file, name in _listed(root, split, faults) if is_file else ():
        if name in index:
            samples.append(ClassifiedImage(file, index[name]))
        else:
            reason = f"{where}: {name!r} of {file} is none of the {len(classes)} classes"
            faults.append(Fault(NO_CLASS, reason))
    for folder in () if is_file else _folders(where):
        if folder.name not in index:
            reason = f"folder {folder} is none of the {len(classes)} classes"
            faults.append(Fault(NO_CLASS, reason))
            continue
        files = [f for f in files_below(folder) if f.suffix.lower() in SUFFIXES]
        if not files:
            faults.append(Fault(EMPTY_CLASS, f"folder {folder} holds no image"))
        samples += [ClassifiedImage(file, index[folder.name]) for file in files]
    looked_at = [s for s in samples if check_decode or s.path.suffix.lower() in _DEEP_SUFFIXES]
    if looked_at:
        files = [sample.path for sample in looked_at]

        def read(sample: ClassifiedImage) -> object:
            if check_decode:
                return read_sample(sample, value_range)
            return read_size(sample.path, value_range=value_range)

        found = check_once(
            "imagenet",
            files,
            [value_range, check_decode],
            lambda: {"faults": _decoding_faults(looked_at, read)},
        )
        faults += [Fault(kind, reason) for _, kind, reason in found["faults"]]
        wrong = {files[index] for index, _, _ in found["faults"]}
        samples = [sample for sample in samples if sample.path not in wrong]
    settle_faults(faults, on_error, where=where, num_usable=len(samples))
    if absent := len(classes) - len({sample.target for sample in samples}):
        logger.warning("%s: %d of %d classes have no image", where, absent, len(classes))
    if is_file:
        return CheckedSplit(samples, dict(Counter(fault.kind for fault in faults)))
    if stray := [f for f in sorted(where.iterdir()) if is_image(f, where)]:
        logger.warning(
            "%s: not used, because they are in no class folder: %d images, the first: %s",
            where,
            len(stray),
            stray[0],
        )
    return CheckedSplit(samples, dict(Counter(fault.kind for fault in faults)))


def _listed(root: str | Path, split: str, faults: list[Fault]) -> list[tuple[Path, str]]:
    """File and class of each line of a list; files are looked for in ``root``."""
    found = []
    text = read_text_file(Path(root, split), "DATASETS.TRAIN or TEST")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, _, class_name = line.rpartition("\t")
        file = Path(root, name)
        if not name:
            reason = f"{Path(root, split)}, line {number}: must be FILE<tab>CLASS, got {line!r}"
            faults.append(Fault("malformed line", reason))
        elif not file.is_file():
            faults.append(Fault("missing image file", f"{Path(root, split)}: no file {file}"))
        else:
            found.append((file, class_name.strip()))
    return found


def _decoding_faults(
    samples: Sequence[ClassifiedImage], read: Callable[[ClassifiedImage], Any]
) -> list[list[Any]]:
    """Position, kind and reason of each fault."""

    def find_fault(sample: ClassifiedImage) -> Fault | None:
        try:
            read(sample)
        except (OSError, ValueError) as error:
            return reading_fault("damaged image file", error)
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
        found = pool.map(find_fault, samples)
        return [[index, *fault] for index, fault in enumerate(found) if fault]


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, which can ask for 0 bits: an error from Pillow 13 on, black before."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


@dataclass(frozen=True)
class TrainTransform:
    """The official augmentation, by timm; see ``INPUT`` in :mod:`..classification.config`.

    Attributes:
        mean, std: of the three channels, on the scale of 0 to 1.
        options: further arguments of ``timm.data.create_transform``.
    """

    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        built = create_transform(
            self.crop_px, is_training=True, mean=self.mean, std=self.std, **self.options
        )
        for step in built.transforms:
            for operation in getattr(step, "ops", []):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        object.__setattr__(self, "_transform", built)

    def __call__(
        self, image: Image.Image, target: int, rng: np.random.Generator
    ) -> tuple[Tensor, int]:
        """Image -> ``float32 Tensor[3, crop_px, crop_px]``, and the target as it is."""
        with seeded(int(rng.integers(2**32))):
            return self._transform(image), target  # type: ignore[attr-defined]


def _shorten(image: Image.Image) -> Image.Image:
    """The middle of a line of pixels, which resizing by the short side would make enormous."""
    long_px = _LONGEST_SHAPE * min(image.size)
    if max(image.size) <= long_px:
        return image
    width, height = (min(side, long_px) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def build_test_crop(short_px: int, crop_px: int) -> transforms.Compose:
    """The pixels of :func:`build_test_transform`: ``Image`` -> ``Image`` of P x P."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [_shorten, transforms.Resize(short_px, bicubic), transforms.CenterCrop(crop_px)]
    )


def build_test_transform(
    short_px: int, crop_px: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> transforms.Compose:
    """The official evaluation: short side by bicubic resizing, centre crop; ``Tensor[3, P, P]``."""
    crop = build_test_crop(short_px, crop_px)
    normalize = transforms.Normalize(mean, std)
    return transforms.Compose([*crop.transforms, transforms.ToTensor(), normalize])
