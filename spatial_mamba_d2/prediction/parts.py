"""Results of items, an image or a window of one, on disk until all of them are written.

``OUTPUT/.parts`` holds one file for each item, which is complete or absent, and ``settings.json``,
which says what they depend on. So a run that is killed continues with the missing items, several
runs can share the items, and what is written from the parts does not depend on either.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.prediction.blending import WindowLabels
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap
from spatial_mamba_d2.system.atomic import replacing

FOLDER, SETTINGS = ".parts", "settings.json"
_SKIPPED = ".txt"
Part = Detections | LabelMap | ClassScores | WindowLabels


class Parts:
    """The parts of one run, or of several that share its items.

    Args:
        output: the folder of the results.
        settings: everything that the parts depend on.
        names: of the classes.

    Raises:
        ValueError: the folder holds parts of other settings; or any, unless ``may_exist``.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        names: tuple[str, ...],
        *,
        may_exist: bool,
    ):
        self.folder = output / FOLDER
        self.names = names
        file = self.folder / SETTINGS
        if file.exists():
            if not may_exist:
                raise ValueError(
                    f"output: {output} holds an unfinished run; continue it with --resume, remove "
                    f"{self.folder}, or choose another folder"
                )
            if different := _differences(read_json(file), json.loads(json.dumps(settings))):
                raise ValueError(
                    f"output: the unfinished run in {output} has other {', '.join(different)}; "
                    f"repeat its arguments, remove {self.folder}, or choose another folder"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(file, by_several=True) as temporary:
            temporary.write_text(json.dumps(settings), encoding="utf-8")

    def _path(self, image: int, window: int, suffix: str = ".npz") -> Path:
        return self.folder / f"{image // 1000:06d}" / f"{image:09d}_{window:09d}{suffix}"

    def has_result(self, image: int, window: int) -> bool:
        """Whether the item was handled, and not skipped."""
        return self._path(image, window).exists()

    def write(self, image: int, window: int, result: Part | None) -> None:
        """Keep the result of a window, or of an image as its window 0; None if it is nodata.

        Raises:
            OSError: it cannot be written.
        """
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **_arrays(result))
        self._write(self._path(image, window), buffer.getvalue())
        self._path(image, window, _SKIPPED).unlink(missing_ok=True)

    def skip(self, image: int, window: int, reason: str) -> None:
        """Remember that an item has no result, and why; another run tries it again.

        Raises:
            OSError: it cannot be written.
        """
        self._write(self._path(image, window, _SKIPPED), reason.encode())

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, len(content), by_several=True) as temporary:
            temporary.write_bytes(content)

    def reason(self, image: int, window: int) -> str | None:
        """Why an item was skipped; None if it was not.

        Raises:
            ValueError: the item was not handled.
        """
        if self.has_result(image, window):
            return None
        path = self._path(image, window, _SKIPPED)
        if not path.exists():
            raise ValueError(
                f"output: the part {path.with_suffix('.npz')} is missing: a shard has not ended "
                "yet, or has not run"
            )
        return path.read_text(encoding="utf-8")

    def read(self, image: int, window: int) -> Part | None:
        """What :meth:`write` was given; None if the item was skipped.

        Raises:
            ValueError: the item was not handled.
        """
        if self.reason(image, window) is not None:
            return None
        with np.load(self._path(image, window), allow_pickle=False) as content:
            return _result({name: content[name] for name in content.files}, self.names)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def digest(settings: Mapping[str, Any]) -> str:
    """A hash of settings, for a finished run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _differences(old: Any, new: Mapping[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        return ["settings"]
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def _arrays(result: Part | None) -> dict[str, Any]:
    if result is None:
        return {"nothing": np.zeros(0)}
    if isinstance(result, Detections):
        arrays = {
            "boxes": result.boxes, "scores": result.scores, "classes": result.classes,
            "image_size": np.array(result.image_size),
        }  # fmt: skip
        if result.masks is not None:
            counts = [mask["counts"] for mask in result.masks]
            arrays["counts"] = np.frombuffer(b"".join(counts), np.uint8)
            arrays["lengths"] = np.array(list(map(len, counts)), np.int64)
        return arrays
    if isinstance(result, ClassScores):
        return {"probabilities": result.scores, "image_size": np.array(result.image_size)}
    if isinstance(result, WindowLabels):
        return result._asdict()
    return {"label": result.label}


def _result(arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Part | None:
    if "nothing" in arrays:
        return None
    if "shared" in arrays:
        return WindowLabels(arrays["label"], arrays["shared"])
    if "label" in arrays:
        return LabelMap(label=arrays["label"], names=names)
    height, width = map(int, arrays["image_size"])
    if "probabilities" in arrays:
        return ClassScores(scores=arrays["probabilities"], names=names, image_size=(height, width))
    masks = None
    if "counts" in arrays:
        counts, ends = arrays["counts"].tobytes(), np.cumsum(arrays["lengths"]).tolist()
        masks = tuple(
            {"size": [height, width], "counts": counts[start:stop]}
            for start, stop in pairwise([0, *ends])
        )
    return Detections(
        boxes=arrays["boxes"],
        scores=arrays["scores"],
        classes=arrays["classes"],
        masks=masks,
        names=names,
        image_size=(height, width),
    )
