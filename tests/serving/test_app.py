"""The web demo as a program: it starts with checkpoints of all tasks, and its functions answer."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("gradio", reason="pip install 'spatial-mamba-d2[app]'")
pytest.importorskip("lightning", reason="Lightning is not installed")
pytest.importorskip("detectron2", reason="Detectron2 is not installed")
from gradio_client import Client, handle_file

from tests.prediction.conftest import CLASSES
from tests.serving.conftest import start_tool, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
]


def test_the_tool_answers_for_each_task(
    fork, checkpoint, truth, file_of, free_port, root, tmp_path, monkeypatch
):
    weights = [checkpoint(task) for task in CLASSES]
    photo = tmp_path / "photo.png"
    photo.write_bytes(file_of(truth.image))
    fork(start_tool, root / "tools/app.py", "--port", free_port, "--weights", *weights)
    url = f"http://127.0.0.1:{free_port}"
    wait_for(url)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    client = Client(url, verbose=False, download_files=tmp_path)
    for task, names in CLASSES.items():
        drawing, summary, table, files = client.predict(
            handle_file(photo), task, 0.0, [], 0, api_name="/predict"
        )
        assert "48 x 64 pixels" in summary and drawing and files
        shown = {row[0] for row in table["value"]["data"]}
        assert shown and shown <= set(names)
        inside = client.predict(handle_file(photo), task, 1, 1, api_name="/look")
        assert len(inside) == 2 and all(inside)
