"""What predictors return: detections, label maps and class scores, as arrays and in other forms."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index
from spatial_mamba_d2.prediction.masks import Rle, crop_of_rle, encode_bitmap, paint_crops

# Columns of tables, for each task, and their types
COLUMNS: Mapping[str, Mapping[str, type]] = {
    "detection": {
        "image": str, "class": int, "name": str, "score": float,
        "x1": float, "y1": float, "x2": float, "y2": float, "area": float,
    },
    "segmentation": {"image": str, "class": int, "name": str, "pixels": int, "share": float},
    "classification": {"image": str, "rank": int, "class": int, "name": str, "score": float},
}  # fmt: skip


def category_id(class_index: int | np.integer) -> int:
    """The id of a class in files in COCO format, which count from 1."""
    return int(class_index) + 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """Objects in one image, the highest scores first unless they come from windows.

    Attributes:
        boxes: ``float32[N, 4]``, x1, y1, x2, y2 in pixels; (0, 0) is the corner of the image.
        scores: ``float32[N]``.
        classes: ``int64[N]``, indices into ``names``.
        masks: COCO's RLE of each object in the frame of the image, or None if there are no masks.
        ids: ``int64[N]``, such as those of tracks, or None.
        names: of the classes.
        image_size: height and width of the image.
        source: its file, if it has one; of a frame of a video, ``VIDEO/000123``.
        time_s: of a frame, from the first one.

    Raises:
        ValueError: the arrays are not of one length, or a class has no name.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    image_size: tuple[int, int]
    masks: tuple[Rle, ...] | None = None
    ids: np.ndarray | None = None
    source: Path | None = None
    time_s: float | None = None

    def __post_init__(self) -> None:
        number = len(self.scores)
        if self.boxes.shape != (number, 4):
            raise ValueError(f"boxes must be [{number}, 4], got {list(self.boxes.shape)}")
        for name in ("classes", "masks", "ids"):
            value = getattr(self, name)
            if value is not None and len(value) != number:
                raise ValueError(f"{name} must be {number}, one for each score, got {len(value)}")
        if number and not 0 <= self.classes.min() <= self.classes.max() < len(self.names):
            raise ValueError(
                f"classes must be indices of the {len(self.names)} names, "
                f"got {self.classes.min()} to {self.classes.max()}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, which: np.ndarray) -> Detections:
        """Those that ``which`` selects: ``bool[N]``, or indices."""
        indices = np.arange(len(self))[which]
        return replace(
            self,
            boxes=self.boxes[indices],
            scores=self.scores[indices],
            classes=self.classes[indices],
            masks=None if self.masks is None else tuple(self.masks[i] for i in indices),
            ids=None if self.ids is None else self.ids[indices],
        )

    def bitmaps(self) -> np.ndarray:
        """The masks as ``bool[N, H, W]``.

        Raises:
            ValueError: there are no masks.
        """
        if self.masks is None:
            raise ValueError("masks must be given for bitmaps, got None")
        return paint_crops(map(crop_of_rle, self.masks), self.image_size)

    def areas(self) -> np.ndarray:
        """``float64[N]``, square pixels of the masks, or of the boxes if there are none."""
        if self.masks is None:
            sides = self.boxes[:, 2:].astype(np.float64) - self.boxes[:, :2]
            return sides.prod(axis=1)
        return np.array([crop_of_rle(m).bitmap.sum() for m in self.masks], np.float64)

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO's results: ``bbox`` is x, y, width, height; ids of categories begin with 1."""
        areas = self.areas()
        found = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            item = {
                "image_id": image_id,
                "category_id": category_id(self.classes[i]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(self.scores[i]),
                "area": float(areas[i]),
            }
            if self.masks is not None:
                item["segmentation"] = _as_text(self.masks[i])
            found.append(item)
        return found

    def to_supervision(self) -> Any:
        """``supervision.Detections``; masks become ``bool[N, H, W]``.

        Raises:
            ImportError: supervision is not installed.
        """
        return _import("supervision").Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            mask=self.bitmaps() if self.masks is not None and len(self) else None,
            confidence=self.scores,
            class_id=self.classes,
            tracker_id=self.ids,
            data={"class_name": np.array([self.names[i] for i in self.classes], dtype=object)},
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row of a table for each object."""
        areas = self.areas()
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            yield {
                "image": str(self.source or ""),
                "class": int(self.classes[i]),
                "name": self.names[self.classes[i]],
                "score": float(self.scores[i]),
                "x1": x1, "y1": y1, "x2": x2, "y2": y2,
                "area": float(areas[i]),
            }  # fmt: skip

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each object.

        Raises:
            ImportError: pandas is not installed.
        """
        return _import("pandas").DataFrame(list(self.rows()), columns=list(COLUMNS["detection"]))


def join_detections(
    parts: Iterable[Detections], names: Sequence[str], image_size: tuple[int, int]
) -> Detections:
    """Detections of one image, of which there may be none, in one object."""
    parts = list(parts)
    with_masks = any(part.masks is not None for part in parts)
    return Detections(
        boxes=np.concatenate([np.zeros((0, 4), np.float32), *(part.boxes for part in parts)]),
        scores=np.concatenate([np.zeros(0, np.float32), *(part.scores for part in parts)]),
        classes=np.concatenate([np.zeros(0, np.int64), *(part.classes for part in parts)]),
        masks=tuple(m for part in parts for m in part.masks or ()) if with_masks else None,
        names=tuple(names),
        image_size=image_size,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelMap:
    """The class of each pixel of one image.

    Attributes:
        label: ``uint8[H, W]``, indices into ``names``; 255 where nothing was predicted. With more
            than 255 classes: ``uint16`` and 65535.
        names: of the classes.
        source: its file, if it has one; of a frame of a video, ``VIDEO/000123``.
        time_s: of a frame, from the first one.
    """

    label: np.ndarray
    names: tuple[str, ...]
    source: Path | None = None
    time_s: float | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        return self.label.shape[0], self.label.shape[1]

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO's results of stuff: one mask for each class in the image."""
        return [
            {
                "image_id": image_id,
                "category_id": category_id(index),
                "segmentation": _as_text(encode_bitmap(self.label == index)),
            }
            for index in self._present()
        ]

    def to_supervision(self) -> Any:
        """``supervision.Detections`` with one mask for each class in the image.

        Raises:
            ImportError: supervision is not installed.
        """
        supervision = _import("supervision")
        present = self._present()
        masks = np.stack([self.label == i for i in present])
        return supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks),
            mask=masks,
            class_id=np.array(present),
            data={"class_name": np.array([self.names[i] for i in present], dtype=object)},
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row of a table for each class in the image."""
        counts = np.bincount(self.label.ravel(), minlength=ignore_index(len(self.names)) + 1)
        yield from count_rows(counts, self.names, self.source)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each class in the image.

        Raises:
            ImportError: pandas is not installed.
        """
        return _import("pandas").DataFrame(list(self.rows()), columns=list(COLUMNS["segmentation"]))

    def _present(self) -> list[int]:
        return [int(i) for i in np.unique(self.label) if i < len(self.names)]


def count_rows(
    counts: np.ndarray, names: Sequence[str], source: Path | None
) -> Iterator[dict[str, Any]]:
    """Rows of a table from the numbers of pixels of each stored value; the last one is no class."""
    total = max(int(counts.sum()), 1)
    for index in np.flatnonzero(counts[:-1]).tolist():
        yield {
            "image": str(source or ""),
            "class": index,
            "name": names[index],
            "pixels": int(counts[index]),
            "share": counts[index] / total,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassScores:
    """Probabilities of the classes of one image.

    Attributes:
        scores: ``float32[K]``, which sum to 1.
        names: of the classes.
        image_size: height and width of the image.
        source: its file, if it has one; of a frame of a video, ``VIDEO/000123``.
        time_s: of a frame, from the first one.
    """

    scores: np.ndarray
    names: tuple[str, ...]
    image_size: tuple[int, int]
    source: Path | None = None
    time_s: float | None = None

    def top(self, number: int = 5) -> list[tuple[str, float]]:
        """Name and probability of the most probable classes, the first one first."""
        best = np.argsort(-self.scores, kind="stable")[:number]
        return [(self.names[i], float(self.scores[i])) for i in best]

    def to_supervision(self) -> Any:
        """``supervision.Classifications``.

        Raises:
            ImportError: supervision is not installed.
        """
        return _import("supervision").Classifications(
            class_id=np.arange(len(self.scores)), confidence=self.scores
        )

    def rows(self, number: int = 5) -> Iterator[dict[str, Any]]:
        """A row of a table for each of the most probable classes."""
        best = np.argsort(-self.scores, kind="stable")[:number].tolist()
        for rank, index in enumerate(best, 1):
            yield {
                "image": str(self.source or ""),
                "rank": rank,
                "class": index,
                "name": self.names[index],
                "score": float(self.scores[index]),
            }

    def to_pandas(self, number: int = 5) -> Any:
        """A ``pandas.DataFrame`` with a row for each of the most probable classes.

        Raises:
            ImportError: pandas is not installed.
        """
        return _import("pandas").DataFrame(
            list(self.rows(number)), columns=list(COLUMNS["classification"])
        )


Result: TypeAlias = Detections | LabelMap | ClassScores


def _as_text(rle: Rle) -> dict[str, Any]:
    """RLE as JSON can hold it."""
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"to_{package} needs {package}: pip install 'spatial-mamba-d2[prediction]'"
        ) from error
