"""The page of the web demo, in Gradio. It loads nothing from other hosts, and tells nobody."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.images import SUFFIXES
from spatial_mamba_d2.prediction.loading import load_predictor
from spatial_mamba_d2.prediction.predictor import SCORE_THRESH
from spatial_mamba_d2.serving.demo import COLUMNS, Demo, find_weights

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at the import
try:
    import gradio
except ImportError as error:
    raise ImportError("the demo needs Gradio: pip install 'spatial-mamba-d2[app]'") from error

logger = logging.getLogger(__name__)
TITLE = "Spatial-Mamba"
_MAX_BYTES = 200_000_000
_NUM_STAGES, _MOST_BLOCKS = 4, 21


def build_page(demo: Demo) -> gradio.Blocks:
    """Two tabs: predictions, and what happens inside of the backbone."""
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(f"# {TITLE}")
        if missing := demo.missing():
            gradio.Markdown("Other tasks are there after these commands: " + ", ".join(missing))
        file = gradio.File(label="Image", file_types=sorted(SUFFIXES), elem_id="file")
        task = gradio.Radio(demo.tasks, value=demo.tasks[0], label="Task", elem_id="task")
        with gradio.Tab("Predictions"):
            _build_predictions(demo, file, task)
        with gradio.Tab("Inside"):
            _build_inside(demo, file, task)
    return page


def _build_predictions(demo: Demo, file: gradio.File, task: gradio.Radio) -> None:
    first = demo.tasks[0]
    with gradio.Row():
        with gradio.Column(scale=1):
            thresh = gradio.Slider(
                0, 1, SCORE_THRESH, step=0.05, label="Lowest score", visible=first == "detection"
            )
            names = gradio.Dropdown(
                list(demo.predictors[first].names), multiselect=True, label="Classes (empty: all)"
            )
            window = gradio.Number(
                0, label="Side of windows in pixels (0: the image at once)", precision=0, minimum=0
            )
            button = gradio.Button("Predict", variant="primary", elem_id="predict")
            summary = gradio.Markdown(elem_id="summary")
            table = gradio.Dataframe(
                headers=list(COLUMNS[first]), interactive=False, label="Legend"
            )
            files = gradio.File(
                label="Results", file_count="multiple", interactive=False, elem_id="results"
            )
        with gradio.Column(scale=2):
            drawing = _drawing("Prediction", "drawing")

    def predict(file: str | None, task: str, thresh: float, names: list[str], px: float) -> Any:
        shown = _told(demo.predict, task, _given(file), score_thresh=thresh, names=names or (),
                      window_px=int(px or 0) or None)  # fmt: skip
        rows = gradio.Dataframe(value=shown.rows, headers=list(COLUMNS[task]))
        return shown.drawing, shown.summary, rows, [str(path) for path in shown.files]

    def choose(task: str) -> Any:
        return (
            gradio.Slider(visible=task == "detection"),
            gradio.Dropdown(
                choices=list(demo.predictors[task].names), value=[],
                visible=task != "classification",
            ),
            gradio.Number(visible=task != "classification"),
            None, "", gradio.Dataframe(value=[], headers=list(COLUMNS[task])), None,
        )  # fmt: skip

    outputs = [drawing, summary, table, files]
    button.click(predict, [file, task, thresh, names, window], outputs)
    task.change(choose, task, [thresh, names, window, *outputs])


def _build_inside(demo: Demo, file: gradio.File, task: gradio.Radio) -> None:
    gradio.Markdown(
        "States of a block after the scan, before and after the fusion with their neighbours; and "
        "how much each pixel contributes to the centre of each stage's map."
    )
    with gradio.Row():
        stage = gradio.Slider(1, _NUM_STAGES, 1, step=1, label="Stage")
        block = gradio.Slider(1, _MOST_BLOCKS, 1, step=1, label="Block of the stage")
    button = gradio.Button("Look inside", variant="primary", elem_id="look")
    states, fields = _drawing("States", "states"), _drawing("Receptive fields", "fields")

    def look(file: str | None, task: str, stage: float, block: float) -> Any:
        return _told(demo.look_inside, task, _given(file), int(stage), int(block))

    button.click(look, [file, task, stage, block], [states, fields])


def _drawing(label: str, elem_id: str) -> gradio.Image:
    """Without the button that would share it on another host."""
    return gradio.Image(
        label=label, format="png", elem_id=elem_id, interactive=False,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _given(file: str | None) -> Path:
    if not file:
        raise gradio.Error("An image is missing: choose a file.")
    return Path(file)


def _told(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Its result; an error about the input is shown on the page."""
    try:
        return function(*args, **kwargs)
    except (ValueError, FileNotFoundError) as error:
        raise gradio.Error(str(error)) from error


def launch(demo: Demo, host: str, port: int, **options: Any) -> Any:
    """Serve the page; the fonts are those of the system.

    Args:
        options: of ``gradio.Blocks.launch``.
    """
    return build_page(demo).launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=_MAX_BYTES,
        **options,
    )


def run(args: argparse.Namespace) -> None:
    """``tools/app.py``: load the models, and serve the page until a signal comes.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`.find_weights` and
            :func:`~spatial_mamba_d2.prediction.load_predictor`.
    """
    weights = find_weights(args.weights)
    demo = Demo(load_predictor(path, device=args.device) for path in weights)
    logger.info("models: %s", ", ".join(map(str, weights)))
    try:
        launch(demo, args.host, args.port)
    finally:
        demo.close()
