"""Streams: of a server of files each frame, of a live one the newest; ended whenever, complete."""

from __future__ import annotations

import csv
import functools
import http.server
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="PyAV is not installed")

from spatial_mamba_d2.prediction import Predictor, streams
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.recording import record_stream
from spatial_mamba_d2.prediction.streams import Stream
from tests.prediction.films import Reader, write_video

NUM_FRAMES = 60


def send_slowly(content, seconds, send):
    step = -(-len(content) // 100)
    for start in range(0, len(content), step):
        send(content[start : start + step])
        time.sleep(seconds / 100)


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; ``/cut/NAME`` is half of one, ``/hang/NAME`` its half and then nothing.

    ``/live/NAME`` is sent in four seconds, and does not say how much it is.
    """

    def do_GET(self):
        self.server.asked.append(self.path)
        how, _, name = self.path.lstrip("/").partition("/")
        if how not in ("cut", "hang", "live"):
            return super().do_GET()
        content = Path(self.directory, name).read_bytes()
        if how == "live":
            self.protocol_version = "HTTP/1.1"  # whose chunks say where the end is
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            send_slowly(
                content, 4, lambda part: self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            )
            self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        if how == "hang":
            self.server.released.wait(60)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path):
    """Of the files in ``tmp_path``; ``server.address``, and ``server.asked`` for paths."""
    handler = functools.partial(Server, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked, server.released = [], threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def live(content: bytes):
    """The address of a stream that sends its bytes in four seconds, whether somebody waits."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def send():
            connection, _ = listening.accept()
            with connection:
                send_slowly(content, 4, connection.sendall)

        thread = threading.Thread(target=send)
        thread.start()
        yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def frames_of(folder: Path) -> list[int]:
    with (folder / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    assert [float(row["time_s"]) for row in rows] == pytest.approx(
        [int(row["image"][-6:]) / 25 for row in rows], abs=1e-3
    )
    return [int(row["image"][-6:]) for row in rows]


def test_in_python(tmp_path, server):
    write_video(tmp_path / "stream.mkv", 20)
    model = Reader()
    results = list(Predictor(model)(f"{server.address}/stream.mkv"))
    assert model.numbers == list(range(20))
    assert [result.time_s for result in results] == pytest.approx(np.arange(20) / 25, abs=1e-3)
    assert results[3].source.as_posix().endswith("_stream.mkv/000003")
    with pytest.raises(ValueError, match=r"stream http://.*/none.mp4 cannot be read: .*404"):
        next(Predictor(model)(f"{server.address}/none.mp4"))
    with pytest.raises(ValueError, match="a stream or a camera, which is predicted alone"):
        predict_files([f"{server.address}/x"], tmp_path / "out", Predictor(model), Options(["csv"]))


@pytest.mark.parametrize(
    ("bounds", "expected", "reason"),
    [
        ({}, NUM_FRAMES, "the stream ended"),
        ({"max_frames": 7}, 7, "it has 7 frames"),
        ({"max_seconds": 1}, 25, "1 seconds are over"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_files_of_a_stream(tmp_path, server, bounds, expected, reason, batch_size):
    write_video(tmp_path / "film.mkv", NUM_FRAMES)
    model, options = Reader(), Options(["csv"], batch_size=batch_size)
    address = f"{server.address.replace('//', '//user:secret@')}/film.mkv?token=secret"
    summary = record_stream(address, tmp_path / "out", Predictor(model), options, **bounds)
    assert frames_of(tmp_path / "out") == model.numbers == list(range(expected))
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["images"] == expected and summary["ended"] == reason
    assert summary["dropped"] == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 2 and not any(b"secret" in path.read_bytes() for path in files)
    assert set(server.asked) == {"/film.mkv?token=secret"}


def test_detections_by_windows_with_drawings(oracle, tmp_path, server):
    coco = pytest.importorskip("pycocotools.coco")
    write_video(tmp_path / "film.mkv", 3)
    options = Options(["coco", "png", "yolo"], 0, window_px=64)
    record_stream(f"{server.address}/film.mkv", tmp_path / "out", Predictor(oracle()), options)
    images = coco.COCO(tmp_path / "out/coco.json").dataset["images"]
    assert [image["time_s"] for image in images] == pytest.approx([0, 0.04, 0.08], abs=1e-3)
    assert len(list((tmp_path / "out/yolo/labels").rglob("*.txt"))) == 3
    assert not (tmp_path / "out/png").exists()  # predicted by windows
    options = Options(["png", "label"])
    model = Predictor(oracle("segmentation"))
    record_stream(f"{server.address}/film.mkv", tmp_path / "whole", model, options)
    assert len(list((tmp_path / "whole/png").rglob("*.png"))) == 3
    assert len(list((tmp_path / "whole/label").rglob("*.png"))) == 3


@pytest.mark.parametrize("scheme", ["tcp", "http"])
def test_of_a_live_stream_the_newest_frames(tmp_path, server, scheme):
    """A model that takes longer than the time between frames gets some of them, and no old ones."""
    num_frames = 400  # FFmpeg looks at five seconds of a stream before it gives the first frame
    options = {"container_options": {"live": "1"}}  # without a length
    content = write_video(tmp_path / "film.mkv", num_frames, **options).read_bytes()

    class Slow(Reader):
        def batch(self, images):
            time.sleep(0.2)
            return super().batch(images)

    predictor, options = Predictor(model := Slow()), Options(["csv"])
    if scheme == "http":
        address = f"{server.address}/live/film.mkv"
        summary = record_stream(address, tmp_path / "out", predictor, options)
    else:
        with live(content) as address:
            summary = record_stream(address, tmp_path / "out", predictor, options)
    numbers = frames_of(tmp_path / "out")
    assert numbers == sorted(set(numbers)) and summary["images"] == len(numbers) < 40
    assert summary["images"] + summary["dropped"] == num_frames
    assert len(numbers) > 3 and numbers[-1] == num_frames - 1
    assert model.numbers == numbers  # what was predicted is what the files say


@pytest.mark.parametrize(
    ("how", "reason"),
    [("cut", "Input/output error"), ("hang", "nothing has arrived for 1 seconds")],
)
def test_a_stream_that_breaks_off(tmp_path, server, monkeypatch, how, reason):
    """What came is written, and the error says why there is not more."""
    monkeypatch.setattr(streams, "TIMEOUT_S", 1.0)
    write_video(tmp_path / "film.mkv", NUM_FRAMES)
    address, predictor = f"{server.address}/{how}/film.mkv", Predictor(Reader())
    with pytest.raises(ValueError, match=rf"broke off after \d+ frames: {reason}; the results of"):
        record_stream(address, tmp_path / "out", predictor, Options(["csv"]))
    numbers = frames_of(tmp_path / "out")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert numbers == list(range(len(numbers))) and 5 < len(numbers) < NUM_FRAMES
    assert summary["images"] == len(numbers) and reason in summary["ended"]


def test_a_server_that_says_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ValueError, match="cannot be read: nothing has arrived for 0.5 seconds"):
            record_stream(address, tmp_path / "out", Predictor(Reader()), Options(["csv"]))
    assert not list(tmp_path.rglob("*.csv"))


def test_nobody_answers(tmp_path):
    """What the system says about the stream is not taken for what it says about a file."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/x"
    places = {address: "Connection refused"}
    if sys.platform == "linux":  # which has cameras as files
        places["/dev/zero"] = "Inappropriate ioctl"
    for place, reason in places.items():
        with pytest.raises(ValueError, match=f"stream {place} cannot be read: {reason}"):
            record_stream(place, tmp_path / "out", Predictor(Reader()), Options(["csv"]))
    assert not (tmp_path / "out").exists()


def test_no_file_is_opened_for_a_server(tmp_path, server):
    """Neither by an address nor by a playlist, which names what is to be read."""
    write_video(tmp_path / "film.ts", 10, codec="mpeg2video")
    with pytest.raises(ValueError, match="must begin with one of http://.*got file://"):
        Stream(f"file://{tmp_path}/film.ts")
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    for name, place in (("good", "film.ts"), ("bad", f"file://{tmp_path}/film.ts")):
        (tmp_path / f"{name}.m3u8").write_text(f"{head}{place}\n#EXT-X-ENDLIST\n")
    assert len(list(Stream(f"{server.address}/good.m3u8"))) == 10
    with pytest.raises(ValueError, match="cannot be read"):
        list(Stream(f"{server.address}/bad.m3u8"))


@pytest.mark.parametrize(
    ("bounds", "options", "message"),
    [
        ({"max_frames": 0}, {}, r"max_frames \(--max-frames\) must be at least 1, got 0"),
        ({"max_seconds": 0.0}, {}, r"seconds \(--seconds\) must be above 0 and finite, got 0.0"),
        ({}, {"formats": ["coco"]}, "for classification, got coco"),
        ({}, {}, "must be empty for a stream"),
    ],
)
def test_what_is_refused(tmp_path, bounds, options, message):
    (tmp_path / "old.csv").write_text("x")
    options = Options(**{"formats": ["csv"], **options})
    with pytest.raises(ValueError, match=message):
        record_stream("http://127.0.0.1:1/x", tmp_path, Predictor(Reader()), options, **bounds)


# tools/predict.py with a model that needs some time.
PROGRAM = """
import importlib.util, sys, time
sys.path[:0] = [{root!r}]
from tests.prediction.films import Reader
from spatial_mamba_d2.prediction import Predictor, command

class Slow(Reader):
    def batch(self, images):
        time.sleep(0.02)
        print("predicted", flush=True)
        return super().batch(images)

command.load_named_predictor = lambda *arguments: Predictor(Slow())
spec = importlib.util.spec_from_file_location("predict_tool", {root!r} + "/tools/predict.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
tool.run_tool(tool.main)
"""


@pytest.fixture
def start(root, tmp_path):
    """``start(WORD, ...)``: the tool with that model, as a process."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(root)))

    def start(*words):
        words = ["--weights", "none", "--output", "out", "--format", "csv", *words]
        return subprocess.Popen(
            [sys.executable, program, *map(str, words)], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return start


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_asked_to_stop(tmp_path, server, start, signum):
    """While it predicts, and while it waits for a frame that does not come."""
    num_frames = 400  # FFmpeg looks at five seconds of a stream before it gives the first frame
    write_video(tmp_path / "film.mkv", num_frames)
    process = start("--input", f"{server.address}/hang/film.mkv")
    for _ in range(5):
        assert process.stdout.readline() == "predicted\n"
    if signum == signal.SIGTERM:
        time.sleep(0.03 * num_frames)  # all that came is predicted
    process.send_signal(signum)
    begin = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert time.monotonic() - begin < 5
    assert f"{signal.Signals(signum).name}: writing the results, then ending" in errors
    numbers = frames_of(tmp_path / "out")
    assert numbers == list(range(5 + output.count("predicted")))
    assert (len(numbers) > 100) == (signum == signal.SIGTERM) and len(numbers) < num_frames
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["ended"] == "it was asked to stop" and summary["images"] == len(numbers)


@pytest.mark.slow
def test_the_command_line(tmp_path, server, start):
    write_video(tmp_path / "film.mkv", 10)
    process = start("--input", f"{server.address}/film.mkv", "--max-frames", 4)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "4 frames are in out, 0 were dropped: it has 4 frames" in output
    assert frames_of(tmp_path / "out") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("film.mkv", "--seconds", "2"), "are for a stream or camera, got --input film.mkv"),
        (("http://x/y", "--resume"), "by one process, as it comes; leave out --resume"),
        (("http://x/y", "--processes", "2"), "by one process, as it comes"),
        (("http://x/y", "film.mkv"), "must be one stream or camera, or none, got 2 inputs"),
    ],
)
def test_command_lines_that_are_refused(root, tmp_path, monkeypatch, words, message):
    tool = runpy.run_path(str(root / "tools/predict.py"))
    line = ["predict.py", "--weights", "w.pth", "--output", "out", "--format", "csv", "--input"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*line, *words])
    with pytest.raises(ValueError, match=message):
        tool["main"]()
