"""Classification data in class folders, as ImageNet comes, checked, and as Lightning's data module.

::

    ROOT/SPLIT/CLASS/NAME.JPEG          any format that Pillow reads

The folders' names are the classes: WordNet ids in ImageNet, whatever you like elsewhere.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from spatial_mamba_d2.data.images import SUFFIXES
from spatial_mamba_d2.data.stream import OnError, StreamedData, TrainingSamples

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 10
BROKEN = -1  # the class of a test image that could not be read


class Picture(NamedTuple):
    """An image file and the index of its class."""

    path: Path
    target: int


def load_classes(source: str, root: str | Path, split: str, number: int) -> tuple[str, ...]:
    """Names of ``number`` classes, which are names of folders, in the order of their indices.

    Args:
        source: ``"imagenet-1k"`` for its 1000 WordNet ids; a file in the folder ``root``, with one
            name a line; or ``""`` for the sorted names of the folders in ``root/split``.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: these are another number of classes.
    """
    if source == "imagenet-1k":
        names = tuple(ImageNetInfo("imagenet-1k").label_names())
    elif source:
        path = Path(root, source)
        if not path.is_file():
            raise FileNotFoundError(f"DATASETS.CLASSES: no such file: {path}")
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        names = tuple(name for name in names if name)
    else:
        names = tuple(folder.name for folder in _folders(Path(root, split)))
    if len(names) != number:
        source = source or f"the folders of {Path(root, split)}"
        raise ValueError(
            f"MODEL.NUM_CLASSES must be {len(names)}, the number of classes in DATASETS.CLASSES "
            f"({source}), got {number}"
        )
    return names


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(
            f"DATASETS.ROOT: no folder {path} (datasets/README.md shows the tree)"
        )
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def read_picture(path: str | Path) -> Image.Image:
    """Read an image file as RGB, as it is stored: EXIF orientation is left alone.

    So do torchvision and the authors; some images of ImageNet do have one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not an image, or is damaged or cut off.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file {path}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"image file {path} cannot be decoded: {error}") from error


def load_split(
    root: str | Path,
    split: str,
    classes: Sequence[str],
    *,
    on_error: OnError = "raise",
    check_decode: bool = False,
) -> list[Picture]:
    """The images of a split, in the order of their classes and names.

    Args:
        on_error: ``"raise"`` reports all faults together; ``"skip"`` leaves out what they concern
            and warns with their number.
        check_decode: also decode every image, which finds damaged and truncated ones.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image is usable; with ``"raise"``, any fault: a folder that is no class or
            has no image, an image that is empty or (if checked) cannot be decoded.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
    where = Path(root, split)
    index = {name: i for i, name in enumerate(classes)}
    pictures: list[Picture] = []
    faults: list[str] = []
    for folder in _folders(where):
        if folder.name not in index:
            faults.append(f"folder {folder} is none of the {len(classes)} classes")
            continue
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            faults.append(f"folder {folder} holds no image")
        pictures += [Picture(file, index[folder.name]) for file in files]
    if check_decode:
        with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
            found = list(pool.map(_fault, pictures))
        pictures = [p for p, fault in zip(pictures, found, strict=True) if fault is None]
        faults += [fault for fault in found if fault]
    if faults and on_error == "raise":
        more = len(faults) - SHOWN_PROBLEMS
        shown = faults[:SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(
            f"{where}: problems found: {len(faults)}. Correct them, or leave out what they concern "
            "with DATASETS.ON_ERROR skip\n  " + "\n  ".join(shown)
        )
    if not pictures:
        raise ValueError(f"{where}: no usable image{f': {faults[0]}' if faults else ''}")
    if faults:
        logger.warning("%s: left out: %d. The first: %s", where, len(faults), faults[0])
    if absent := len(classes) - len(Counter(p.target for p in pictures)):
        logger.warning("%s: %d of %d classes have no image", where, absent, len(classes))
    return pictures


def _fault(picture: Picture) -> str | None:
    try:
        read_picture(picture.path)
    except (OSError, ValueError) as error:
        return str(error)
    return None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's generators start at ``seed``, and are put back at the end.

    timm's augmentations draw from all three.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, which can ask for 0 bits: refused from Pillow 13 on, black before it."""
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
        with _seeded(int(rng.integers(2**32))):
            return self._transform(image), target  # type: ignore[attr-defined]


def build_test_transform(
    short_px: int, crop_px: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> transforms.Compose:
    """The official evaluation: short side by bicubic resizing, centre crop; ``Tensor[3, P, P]``."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.Resize(short_px, bicubic),
            transforms.CenterCrop(crop_px),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


class TestPictures(Dataset[tuple[Tensor, int, str]]):
    """One image at a time: network input, class (or :data:`BROKEN`), and what was wrong."""

    __test__ = False

    def __init__(self, pictures: Sequence[Picture], transform: Any, on_error: OnError):
        self.pictures = pictures
        self.transform = transform
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        path, target = self.pictures[index]
        try:
            return self.transform(read_picture(path)), target, ""
        except (OSError, ValueError) as error:
            if self.on_error == "raise":
                raise
            return self.transform(Image.new("RGB", (8, 8))), BROKEN, str(error)


def _read(picture: Picture) -> tuple[Image.Image, int]:
    return read_picture(picture.path), picture.target


class ClassificationData(StreamedData[Picture]):
    """Training and test images for the trainer.

    Args:
        root, train, test: the folder, and the names of its splits.
        classes: names of the class folders, see :func:`load_classes`.
        epochs: of the whole training. One has as many iterations as there are whole batches.
        check_decode: see :func:`load_split`.
        **kwargs: see :class:`~.stream.StreamedData`.

    Raises:
        FileNotFoundError, ValueError: from ``setup``, see :func:`load_split`.
    """

    def __init__(
        self,
        root: str | Path,
        train: str,
        test: str,
        classes: Sequence[str],
        train_transform: TrainTransform,
        test_transform: transforms.Compose,
        *,
        epochs: int,
        check_decode: bool = False,
        **kwargs: Any,
    ):
        super().__init__(root, train, test, **kwargs)
        self.classes, self.epochs, self.check_decode = classes, epochs, check_decode
        self.train_transform, self.test_transform = train_transform, test_transform

    def epoch_iterations(self) -> int:
        """Iterations of an epoch, once ``setup`` has found the images."""
        return max(1, len(self.splits[self.train]) // self.batch_size)

    def iterations(self) -> int:
        return self.epochs * self.epoch_iterations()

    def load_split(self, split: str) -> list[Picture]:
        return load_split(
            self.root,
            split,
            self.classes,
            on_error=self.on_error,
            check_decode=self.check_decode,
        )

    def training_samples(self, items: list[Picture]) -> TrainingSamples[Picture]:
        return TrainingSamples(items, _read, self.train_transform, self.seed, self.on_error)

    def test_samples(self, items: list[Picture]) -> TestPictures:
        return TestPictures(items, self.test_transform, self.on_error)
