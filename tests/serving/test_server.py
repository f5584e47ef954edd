"""The server: what it answers, what it refuses, and that nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="pip install 'spatial-mamba-d2[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'spatial-mamba-d2[serve]'")
pytest.importorskip("python_multipart", reason="pip install 'spatial-mamba-d2[serve]'")
pytest.importorskip("httpx", reason="pip install httpx")
import httpx
import torch
from starlette.testclient import TestClient

from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.prediction import Predictor, load_predictor
from spatial_mamba_d2.serving import server
from spatial_mamba_d2.serving.server import Limits, build_app
from tests.prediction.conftest import Oracle
from tests.serving.conftest import start_tool, wait_for


@pytest.fixture
def client(predictor):
    """``client(task="detection", **limits)``"""
    opened = []

    def open_client(task: str = "detection", model=None, **limits) -> TestClient:
        app = build_app(Predictor(model) if model else predictor(task), Limits(**limits))
        opened.append(TestClient(app).__enter__())
        return opened[-1]

    yield open_client
    for each in opened:
        each.__exit__(None, None, None)


@pytest.fixture(scope="module")
def png(truth, file_of) -> bytes:
    return file_of(truth.image)


class Slow(Oracle):
    """Takes its time, and counts."""

    def __init__(self, seconds: float = 0.0):
        super().__init__()
        self.seconds, self.num_calls = seconds, 0
        self.may_end = threading.Event()

    def __call__(self, image):
        self.num_calls += 1
        if self.seconds:
            self.may_end.wait(self.seconds)
        return super().__call__(image)


def numbers_of(page: str) -> dict[str, float]:
    """Name and value of each line of ``/metrics``."""
    pairs = (line.rpartition(" ")[::2] for line in page.splitlines() if not line.startswith("#"))
    return {name.removeprefix("spatial_mamba_"): float(value) for name, value in pairs}


def metrics(client) -> dict[str, float]:
    return numbers_of(client.get("/metrics").text)


@pytest.mark.parametrize("task", ["detection", "segmentation", "classification"])
def test_an_image_is_a_body_or_a_file_in_a_form(task, client, png, truth, predictor):
    opened = client(task)
    plain = opened.post("/predict", content=png)
    assert plain.status_code == 200 and plain.headers["content-type"] == "application/json"
    assert plain.json()["task"] == task and plain.json()["height"] == truth.image.shape[0]
    form = opened.post("/predict", files={"image": ("../../etc/passwd", png, "image/png")})
    assert form.content == plain.content
    model = opened.get("/model").json()
    assert model["task"] == task and model["names"] == list(predictor(task).names)


def test_parameters_reach_the_predictor(client, png):
    opened = client()
    scores = [o["score"] for o in opened.post("/predict", content=png).json()["objects"]]
    thresh = sorted(scores)[1]
    kept = opened.post(f"/predict?score_thresh={thresh}", content=png).json()["objects"]
    assert [o["score"] for o in kept] == [s for s in scores if s >= thresh] != scores
    windows = opened.post("/predict?window_px=40&masks=none", content=png).json()["objects"]
    assert len(windows) == len(scores)


@pytest.mark.parametrize(
    ("query", "content", "status", "text"),
    [
        ("?scores=1", None, 400, "parameters of detection are"),
        ("?url=http://127.0.0.1/x.png", None, 400, "got 'url'"),
        ("", b"", 415, "image must be one of JPEG, PNG"),
        ("", b"/etc/passwd", 415, "image must be one of JPEG, PNG"),
        ("", b"%!PS-Adobe-3.0 EPSF-3.0", 415, "image must be one of JPEG, PNG"),
        ("", b"GIF89a" + bytes(99), 415, "image must be one of JPEG, PNG"),
        ("", b"\x89PNG\r\n\x1a\n" + bytes(99), 422, "cannot be decoded"),
        ("", b"II*\0" + bytes(99), 422, "image file in memory"),
        ("", b"RIFF" + bytes(99), 422, "cannot be decoded"),
        ("", "cut", 422, "cannot be decoded"),
        ("?window_px=4", None, 413, "at most 9 windows, got"),
        ("", bytes(100_001), 413, "at most 100000 bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(query, content, status, text, client, png):
    opened = client(max_bytes=100_000, max_windows=9)
    body = {None: png, "cut": png[:-30]}.get(content, content)
    answer = opened.post(f"/predict{query}", content=body)
    assert answer.status_code == status and text in answer.json()["error"], answer.text
    assert metrics(opened)[f'requests_total{{status="{status}"}}'] == 1
    assert opened.post("/predict", content=png).status_code == 200  # it goes on


def test_an_image_of_too_many_pixels_is_not_decoded(client, huge_png):
    import tracemalloc

    opened, content = client(max_pixels=1_000_000), huge_png(5000, 4000)
    tracemalloc.start()
    answer = opened.post("/predict", content=content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.status_code == 413 and "5000 x 4000 pixels" in answer.json()["error"]
    assert peak < 10_000_000
    bomb = opened.post("/predict", content=huge_png(1, 200_000_000)[:200])
    assert bomb.status_code == 413


def test_a_form_is_one_file(client, png):
    opened = client(max_bytes=100_000)
    image = ("image.png", png, "image/png")
    two = opened.post("/predict", files=[("image", image), ("image", image)])
    wrong = opened.post("/predict", files={"photo": image})
    text = opened.post("/predict", files={"image": image}, data={"path": "/etc/passwd"})
    for answer in (two, wrong, text):
        assert answer.status_code == 400 and "one file, 'image'" in answer.json()["error"]
    broken = {"Content-Type": "multipart/form-data"}
    assert opened.post("/predict", content=png, headers=broken).status_code == 400
    large = ("image.png", bytes(100_000), "image/png")
    assert opened.post("/predict", files={"image": large}).status_code == 413


def test_other_paths_and_methods_are_told_in_json(client):
    opened = client()
    assert opened.get("/predict").status_code == 405
    assert opened.get("/nothing").json() == {"error": "Not Found"}
    assert opened.get("/healthz").text == "ok\n"
    assert "/predict" in opened.get("/openapi.json").json()["paths"]


def test_a_fault_is_logged_and_not_told(client, png, caplog):
    class Faulty(Oracle):
        def __call__(self, image):
            raise RuntimeError("secret")

    opened = client(model=Faulty())
    answer = opened.post("/predict", content=png)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "secret" in caplog.text


def test_one_too_many_comes_back(client, png):
    model = Slow(seconds=20)
    opened = client(model=model, max_pending=2)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(opened.post, "/predict", content=png) for _ in range(2)]
        while metrics(opened)["pending_requests"] < 2:
            time.sleep(0.01)
        refused = opened.post("/predict", content=png)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert opened.get("/healthz").status_code == 200  # while it predicts
        model.may_end.set()
        assert [each.result().status_code for each in waiting] == [200, 200]
    assert metrics(opened)["pending_requests"] == 0
    assert opened.post("/predict", content=png).status_code == 200


def test_late_answers_are_dropped(client, png):
    """The one in progress keeps its place until it ends; one that waits is never predicted."""
    model = Slow(seconds=20)
    opened = client(model=model, timeout_s=0.3, max_pending=2)
    with ThreadPoolExecutor(2) as pool:
        late = [pool.submit(opened.post, "/predict", content=png) for _ in range(2)]
        assert [each.result().status_code for each in late] == [504, 504]
    assert metrics(opened)["pending_requests"] == 1
    model.may_end.set()
    while metrics(opened)["pending_requests"]:
        time.sleep(0.01)
    assert opened.post("/predict", content=png).status_code == 200
    assert model.num_calls == 2


def test_a_slow_sender_is_cut_off(predictor):
    """Not with a client, which sends at once: the application itself gets what has come."""
    app, sent = build_app(predictor(), Limits(timeout_s=0.2)), []

    async def receive():
        await asyncio.sleep(0.15)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [],
             "query_string": b"", "root_path": ""}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408 and b"did not arrive" in sent[1]["body"]


def test_limits_are_positive():
    with pytest.raises(ValueError, match="max_bytes must be above 0, got 0"):
        Limits(max_bytes=0)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def send_many(predictor, number: int, bodies: list[bytes]) -> list[int]:
    """Resident bytes after each tenth; every request has its answer, of eight at a time."""
    app = build_app(predictor, Limits(max_bytes=50_000, max_pixels=100_000))

    async def send_all() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as web:

            async def status(body: bytes) -> int:
                return (await web.post("http://server/predict", content=body)).status_code

            expected = [await status(body) for body in bodies]
            assert {200, 413, 415, 422} == set(expected)

            async def send(first: int) -> None:
                for i in range(first, number // 10, 8):
                    assert await status(bodies[i % len(bodies)]) == expected[i % len(bodies)]

            memory = []
            for _ in range(10):
                await asyncio.gather(*map(send, range(8)))
                memory.append(resident_bytes())
            await check_counts(web)
        return memory

    async def check_counts(web: httpx.AsyncClient) -> None:
        counted = numbers_of((await web.get("http://server/metrics")).text)
        total = sum(value for name, value in counted.items() if name.startswith("requests_total"))
        assert total == number // 10 * 10 + len(bodies)
        assert counted['requests_total{status="200"}'] == counted["prediction_seconds_count"]
        assert counted["pending_requests"] == 0

    return asyncio.run(send_all())


@pytest.fixture
def bodies(png, truth, file_of, huge_png) -> list[bytes]:
    """Good ones and bad ones."""
    return [
        png, file_of(truth.image, "BMP"), file_of(truth.image, "TIFF"), png[:-30], b"", b"text",
        bytes(60_000), huge_png(400, 300), b"RIFF" + png,
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_many_requests_with_flat_memory(predictor, bodies):
    memory = send_many(predictor(), 800, bodies)
    assert memory[-1] - memory[4] < 3_000_000


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_ten_thousand_requests_with_flat_memory(predictor, bodies):
    memory = send_many(predictor(), 10_000, bodies)
    print("resident MB after each tenth:", [round(b / 1e6, 1) for b in memory])
    assert memory[-1] - memory[0] < 5_000_000


def serve_stub(port: int, seconds: float) -> None:
    """A process with the server of a slow stub."""
    model = Slow(seconds)
    server.load_named_predictor = lambda *words: Predictor(model)
    from types import SimpleNamespace

    server.run(
        SimpleNamespace(
            weights="stub", config_file="", device=None, task=None, opts=[], host="127.0.0.1",
            port=port, access_log=False, **vars(Limits()),
        )
    )  # fmt: skip


def post(url: str, content: bytes) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_what_was_accepted_is_answered_before_the_end(fork, png, free_port):
    process = fork(serve_stub, free_port, 0.3)
    url = f"http://127.0.0.1:{free_port}"
    wait_for(f"{url}/healthz")
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(post, f"{url}/predict", png) for _ in range(6)]
        while num_accepted(url) < 6:
            time.sleep(0.01)
        os.kill(process, signal.SIGTERM)
        found = [answer.result() for answer in answers]
    assert [status for status, _ in found] == [200] * 6
    assert len({content for _, content in found}) == 1 and json.loads(found[0][1])["objects"]
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM or status == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/healthz", timeout=5)


def num_accepted(url: str) -> float:
    """Requests that wait, or have their answers."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as page:
        numbers = numbers_of(page.read().decode())
    kinds = ("pending_requests", "requests_total")
    return sum(value for name, value in numbers.items() if name.startswith(kinds))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_the_tool_serves_a_checkpoint(fork, png, free_port, root, test_variant, tmp_path):
    config = pytest.importorskip(
        "spatial_mamba_d2.classification.config", reason="fvcore is not installed"
    )
    words = ["MODEL.NUM_CLASSES", "3", "INPUT.CROP_PX", "32", "TEST.SHORT_PX", "36"]
    words += ["MODEL.SPATIAL_MAMBA.VARIANT", test_variant, "MODEL.DEVICE", "cpu"]
    cfg = config.load_config(None, words)
    torch.manual_seed(0)
    content = {"model": build_classifier(test_variant, 3).state_dict(), "config": cfg.dump()}
    torch.save(content | {"classes": ["x", "y", "z"]}, tmp_path / "weights.pth")
    (tmp_path / "image.png").write_bytes(png)
    tool = root / "tools/serve.py"
    fork(start_tool, tool, "--weights", tmp_path / "weights.pth", "--port", free_port)
    url = f"http://127.0.0.1:{free_port}"
    wait_for(f"{url}/healthz")
    status, answer = post(f"{url}/predict?top=2", png)
    expected = load_predictor(tmp_path / "weights.pth", device="cpu")(tmp_path / "image.png").top(2)
    found = json.loads(answer)["classes"]
    assert status == 200 and [c["name"] for c in found] == [name for name, _ in expected]
    assert [c["score"] for c in found] == pytest.approx([score for _, score in expected], abs=1e-5)
