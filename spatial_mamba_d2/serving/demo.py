"""What the web demo computes; :mod:`.demo_page` shows it."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from spatial_mamba_d2.data.class_indices import ignored_in
from spatial_mamba_d2.data.images import read_image, read_image_bytes, write_image
from spatial_mamba_d2.explain.backbones import normalize, read_square_images
from spatial_mamba_d2.explain.receptive_field import draw_fields, receptive_fields
from spatial_mamba_d2.explain.states import draw_states, record_states
from spatial_mamba_d2.models.spatial_mamba import SpatialMamba
from spatial_mamba_d2.prediction.loading import TASKS
from spatial_mamba_d2.prediction.predictor import Predictor
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap, Result
from spatial_mamba_d2.prediction.sources import read_georeference
from spatial_mamba_d2.prediction.writers import FORMATS, ImageInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: task -> where ``dev.py`` leaves the checkpoint of its demo, and the command
DEMOS = {
    "detection": (Path("output/demo/model_final.pth"), "python3 dev.py demo"),
    "segmentation": (Path("output/demo_seg/best.ckpt"), "python3 dev.py demo-seg"),
    "classification": (Path("output/demo_cls/best.ckpt"), "python3 dev.py demo-cls"),
}
#: task -> formats to download, in addition to the drawing
DOWNLOADS = {
    "detection": ("coco", "geojson", "csv"),
    "segmentation": ("label", "csv"),
    "classification": ("csv",),
}
COLUMNS = {
    "detection": ("class", "objects", "highest score"),
    "segmentation": ("class", "pixels", "share"),
    "classification": ("class", "score"),
}
SIZE_PX = 224  # of the image whose states and receptive fields are drawn
_MOST_DRAWN_PX = 16_000_000  # a drawing of more takes minutes, and no browser shows it
_NUM_KEPT = 20  # results whose files can still be downloaded


def find_weights(given: Sequence[Path]) -> list[Path]:
    """``given``; else the checkpoints of the demos that are there.

    Raises:
        FileNotFoundError: there are none; with the commands that make them.
    """
    found = list(given) or [path for path, _ in DEMOS.values() if path.is_file()]
    if not found:
        commands = ", ".join(command for _, command in DEMOS.values())
        raise FileNotFoundError(
            f"weights (--weights): none given, and none of a demo in {Path().absolute()}; one of "
            f"these makes some: {commands}"
        )
    return found


@dataclass(frozen=True)
class Shown:
    """What the page shows of a prediction.

    Attributes:
        drawing: RGB, ``uint8[H, W, 3]``; None of images that are too large.
        rows: of the table, see :data:`COLUMNS`.
        summary: a sentence.
        files: to download.
    """

    drawing: np.ndarray | None
    rows: list[list[str]]
    summary: str
    files: list[Path]


class Demo:
    """Predictors, at most one of each task, and the files of the last results.

    Raises:
        ValueError: there is none, or two are of one task.
    """

    def __init__(self, predictors: Iterable[Predictor]):
        self.predictors: dict[str, Predictor] = {}
        for predictor in predictors:
            if predictor.task in self.predictors:
                raise ValueError(f"weights (--weights) must be of different tasks, got two of "
                                 f"{predictor.task}")  # fmt: skip
            self.predictors[predictor.task] = predictor
        if not self.predictors:
            raise ValueError("weights (--weights) must be at least one file, got none")
        self._folder = Path(tempfile.mkdtemp(prefix="spatial_mamba_"))
        self._results: deque[Path] = deque()

    def close(self) -> None:
        """Remove the files of all results."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def tasks(self) -> list[str]:
        return [task for task in TASKS if task in self.predictors]

    def missing(self) -> list[str]:
        """For each task without a model, the command that makes one."""
        return [
            f"{task}: `{command}`" for task, (_, command) in DEMOS.items()
            if task not in self.predictors
        ]  # fmt: skip

    def predict(
        self,
        task: str,
        file: str | Path,
        *,
        score_thresh: float,
        names: Sequence[str] = (),
        window_px: int | None = None,
    ) -> Shown:
        """Predict for an image file.

        Args:
            score_thresh: of detections.
            names: the classes to show; empty: all.
            window_px: by windows of this side; None: at once. Not used in classification.

        Raises:
            ValueError: the file cannot be read as an image, or an argument is out of its range.
        """
        file, predictor = Path(file), self.predictors[task]
        window_px = None if task == "classification" else window_px
        with _short_names(file):
            result = predictor(file, score_thresh=score_thresh, window_px=window_px)
            result = replace(_of_classes(result, names), source=Path(file.name))
            drawing = None
            if np.prod(result.image_size) <= _MOST_DRAWN_PX:
                model = predictor.model
                image = read_image(file, model.num_channels, model.value_range)
                drawing = model.draw(image, result)
            files = self._write(task, file, result, drawing)
        return Shown(drawing, rows_of(result), _sentence(result, drawing), files)

    def _write(
        self, task: str, file: Path, result: Result, drawing: np.ndarray | None
    ) -> list[Path]:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        self._results.append(folder)
        while len(self._results) > _NUM_KEPT:
            shutil.rmtree(self._results.popleft(), ignore_errors=True)
        predictor, name = self.predictors[task], Path(file.name)
        image = ImageInfo(
            number=1, file=name, name=Path(name.stem), size=result.image_size,
            georeference=read_georeference(file), is_whole=True,
        )  # fmt: skip
        written = []
        for kind in DOWNLOADS[task]:
            writer = FORMATS[kind](folder, predictor.names, predictor.model)
            with ExitStack() as files:
                writer.open(files)
                writer.start(image, files)
                writer.add(image, result)
                if isinstance(result, LabelMap):
                    writer.add_rows(image, result.label)
                writer.finish(image)
                writer.close()
            written += writer.paths([name], [Path(name.stem)])
        if drawing is not None:
            written.append(folder / f"{name.stem}_drawing.png")
            write_image(written[-1], drawing)
        return written

    def look_inside(self, task: str, file: str | Path, stage: int, block: int) -> list[np.ndarray]:
        """States before and after fusion in a block, and receptive fields of all stages.

        Args:
            stage, block: from 1, see :func:`~.states.record_states`.

        Returns:
            two drawings, RGB ``uint8[H, W, 3]``.

        Raises:
            ValueError: the model has no blocks, there is no such block, or the file cannot be read.
        """
        backbone, file = backbone_of(self.predictors[task]), Path(file)
        device = next(backbone.parameters()).device
        with _short_names(file):
            (image,) = read_square_images([file], 1, SIZE_PX)
        x = normalize(backbone, image).to(device)
        title = f"stage {stage}, block {block}"
        states = draw_states(record_states(backbone, x[None], stage, block), image, [], title)

        def maps(batch: Tensor) -> list[Tensor]:
            return [y.permute(0, 3, 1, 2) for y in backbone.forward_stages(batch).values()]

        fields = draw_fields({"effective receptive field": receptive_fields(maps, [x])})
        return [as_pixels(states), as_pixels(fields)]


@contextmanager
def _short_names(file: Path) -> Iterator[None]:
    """Errors have the name that the user knows, and not the place of the upload."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), file.name)) from error


def _of_classes(result: Result, names: Sequence[str]) -> Result:
    """The objects, or pixels, of classes with these names; of class scores all."""
    if not names or isinstance(result, ClassScores):
        return result
    wanted = np.array([i for i, name in enumerate(result.names) if name in names])
    if isinstance(result, Detections):
        return result.select(np.isin(result.classes, wanted))
    chosen = np.isin(result.label, wanted)
    label = np.where(chosen, result.label, ignored_in(result.label)).astype(result.label.dtype)
    return replace(result, label=label)


def rows_of(result: Result) -> list[list[str]]:
    """The table of a result, see :data:`COLUMNS`: the largest numbers first."""
    if isinstance(result, ClassScores):
        return [[name, f"{score:.1%}"] for name, score in result.top()]
    if isinstance(result, LabelMap):
        rows = sorted(result.rows(), key=lambda row: -row["pixels"])
        return [[row["name"], str(row["pixels"]), f"{row['share']:.1%}"] for row in rows]
    found, counts = np.unique(result.classes, return_counts=True)
    return [
        [result.names[i], str(n), f"{result.scores[result.classes == i].max():.2f}"]
        for n, i in sorted(zip(counts.tolist(), found.tolist(), strict=True), reverse=True)
    ]


def _sentence(result: Result, drawing: np.ndarray | None) -> str:
    height, width = result.image_size
    if isinstance(result, Detections):
        what = f"{len(result)} objects"
    elif isinstance(result, LabelMap):
        what = f"{len(rows_of(result))} classes"
    else:
        what = "most probably {} ({:.1%})".format(*result.top(1)[0])
    drawn = "" if drawing is not None else "; too large to be drawn, but not to be downloaded"
    return f"{what} in {height} x {width} pixels{drawn}."


def backbone_of(predictor: Predictor) -> SpatialMamba:
    """The backbone in a predictor's network.

    Raises:
        ValueError: it has none of ours, as in exported files and backbones of timm.
    """
    network = getattr(getattr(predictor.model, "predictor", None), "model", None)
    if isinstance(network, nn.Module):
        for module in network.modules():
            if isinstance(module, SpatialMamba):
                return module
    raise ValueError(
        "the model must have a Spatial-Mamba backbone in PyTorch, whose states can be seen; "
        "exported files and other backbones have none"
    )


def as_pixels(figure: Figure) -> np.ndarray:
    """RGB, ``uint8[H, W, 3]``."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return read_image_bytes(file.getvalue())
