"""An HTTP server: POST an image to ``/predict``, get JSON.

One thread predicts, because one prediction uses all cores or the GPU already. Requests wait for it
in a line of bounded length: one too many is told to come back (503), so that memory is bounded too.
A request names no file and no address: all that is opened is the bytes that it brings.

When the process is asked to stop (SIGTERM, Ctrl-C), it accepts nothing more, answers what it has
accepted, and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from spatial_mamba_d2 import __version__
from spatial_mamba_d2.data.images import UnknownFormatError, read_image_bytes
from spatial_mamba_d2.data.pixels import TooManyPixelsError
from spatial_mamba_d2.prediction.loading import load_named_predictor
from spatial_mamba_d2.prediction.predictor import Predictor, grid_of
from spatial_mamba_d2.serving.answers import (
    ParameterError,
    as_json,
    parse_parameters,
    predictor_arguments,
)
from spatial_mamba_d2.serving.metrics import CONTENT_TYPE, Metrics
from spatial_mamba_d2.serving.openapi import openapi_document
from spatial_mamba_d2.system.tool_errors import find_mistake

try:
    import python_multipart  # noqa: F401 - Starlette needs it for forms, and says so late
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(
        "the server needs Starlette, uvicorn and python-multipart: "
        "pip install 'spatial-mamba-d2[serve]'"
    ) from error

logger = logging.getLogger(__name__)
FIELD = "image"  # of a form, the file
_RETRY_S = 1
_WARMUP_PX = 64


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        max_bytes: of a request's body.
        max_pixels: of its image, compared with the header before a pixel is decoded.
        max_windows: by which an image may be predicted.
        max_pending: requests that are read, wait or are predicted; one more is refused.
        timeout_s: from the first byte to the answer.

    Raises:
        ValueError: one is not above 0.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_windows: int = 256
    max_pending: int = 16
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


class _Refused(Exception):
    """A request that gets no prediction."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Service:
    """A predictor, the requests that wait for it, and their numbers.

    Its methods are called in the event loop, except :meth:`predict`, for which there is a thread.
    """

    def __init__(self, predictor: Predictor, limits: Limits):
        self.predictor, self.limits = predictor, limits
        self.metrics = Metrics()
        self.num_pending = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")

    async def answer(self, request: Request) -> Response:
        """The response to ``POST /predict``."""
        try:
            content, seconds = await self._answer(request)
        except _Refused as refused:
            headers = {"Retry-After": str(_RETRY_S)} if refused.status == 503 else {}
            body = {"error": str(refused)}
            response: Response = JSONResponse(body, refused.status, headers)
        else:
            self.metrics.add_prediction(seconds)
            response = Response(content, media_type="application/json")
        self.metrics.num_requests[response.status_code] += 1
        return response

    async def _answer(self, request: Request) -> tuple[bytes, float]:
        deadline = time.monotonic() + self.limits.timeout_s
        try:
            values = parse_parameters(self.predictor.task, request.query_params.multi_items())
        except ParameterError as error:
            raise _Refused(400, str(error)) from None
        if self.num_pending >= self.limits.max_pending:
            raise _Refused(503, f"{self.num_pending} requests are waiting")
        self.num_pending += 1
        future: Future[tuple[bytes, float]] | None = None
        try:
            image = await _in_time(self._read(request), deadline, 408, "the request did not arrive")
            future = self._thread.submit(self.predict, image, values)
        finally:
            if future is None:
                self.num_pending -= 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        return await _in_time(asyncio.wrap_future(future), deadline, 504, "no answer")

    def _release(self) -> None:
        """A prediction that has come too late holds its place until it ends."""
        self.num_pending -= 1

    async def _read(self, request: Request) -> bytes:
        """The bytes of the image: the body, or the file in a form."""
        try:
            body = await self._read_body(request)
            if not request.headers.get("content-type", "").startswith("multipart/form-data"):
                return body
            return await _file_of_form(request, body)
        except ClientDisconnect:
            raise _Refused(400, "the connection was closed") from None

    async def _read_body(self, request: Request) -> bytes:
        limit = self.limits.max_bytes
        declared = request.headers.get("content-length", "")
        parts, size = [], int(declared) if declared.isdecimal() else 0
        if size <= limit:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
        if size > limit:
            raise _Refused(413, f"the body must have at most {limit} bytes, got {size} or more")
        self.metrics.num_bytes += size
        return b"".join(parts)

    def predict(self, content: bytes, values: dict[str, Any]) -> tuple[bytes, float]:
        """The answer's JSON, and the seconds that it took.

        Raises:
            _Refused: the image cannot be used, or there is a fault.
        """
        start = time.perf_counter()
        try:
            model = self.predictor.model
            limit = self.limits.max_pixels
            image = read_image_bytes(content, model.num_channels, model.value_range, limit)
            self._check_windows(image, values)
            result = self.predictor(image, **predictor_arguments(values))
            answer = json.dumps(as_json(result, values)).encode("ascii")
        except _Refused:
            raise
        except UnknownFormatError as error:
            raise _Refused(415, str(error)) from None
        except TooManyPixelsError as error:
            raise _Refused(413, str(error)) from None
        except Exception as error:
            if isinstance(error, ValueError) and (mistake := find_mistake(error)):
                raise _Refused(422, mistake.text) from None
            logger.exception("a prediction failed")
            raise _Refused(500, "the prediction failed; the server's log says why") from None
        return answer, time.perf_counter() - start

    def _check_windows(self, image: np.ndarray, values: dict[str, Any]) -> None:
        size = image.shape[0], image.shape[1]
        number = len(grid_of(size, values.get("window_px"), values.get("overlap_px")))
        if number > self.limits.max_windows:
            raise _Refused(
                413, f"window_px must give at most {self.limits.max_windows} windows, got {number}"
            )

    async def stop(self) -> None:
        """Wait for what was accepted."""
        await asyncio.to_thread(self._thread.shutdown)


async def _in_time(awaitable: Awaitable[Any], deadline: float, status: int, text: str) -> Any:
    """Its result; refused with ``status`` if there is none at ``deadline``."""
    start = time.monotonic()
    try:
        return await asyncio.wait_for(awaitable, max(deadline - start, 0))
    except asyncio.TimeoutError:
        raise _Refused(status, f"{text} within the time limit") from None


async def _file_of_form(request: Request, body: bytes) -> bytes:
    """The file in ``multipart/form-data``, of which the complete body has been read."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form(max_files=1, max_fields=0) as form:
            file = form.get(FIELD)
            if file is None or isinstance(file, str):
                raise _Refused(400, f"the form must have one file, {FIELD!r}")
            return await file.read()
    except HTTPException as error:
        raise _Refused(400, f"the form must have one file, {FIELD!r}: {error.detail}") from None


def build_app(predictor: Predictor, limits: Limits | None = None) -> Starlette:
    """The server as an ASGI application.

    ==================  ===========================================================
    ``POST /predict``   an image: the body, or the file ``image`` of a form -> JSON
    ``GET /model``      task, names of classes, version
    ``/healthz``        200 while it takes requests
    ``/metrics``        numbers for Prometheus
    ``/openapi.json``   all of this for programs
    ==================  ===========================================================
    """
    service = Service(predictor, limits or Limits())
    document = openapi_document(predictor.task)
    model = {"task": predictor.task, "names": list(predictor.names), "version": __version__}

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def metrics(request: Request) -> Response:
        text = service.metrics.text(service.num_pending)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.stop()

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    return Starlette(
        routes=[
            Route("/predict", service.answer, methods=["POST"]),
            Route("/model", _constant(model)),
            Route("/healthz", healthz),
            Route("/metrics", metrics),
            Route("/openapi.json", _constant(document)),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: refuse},
    )


def _constant(content: Any) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return JSONResponse(content)

    return respond


def run(args: argparse.Namespace) -> None:
    """``tools/serve.py``: load a model, and serve it until a signal comes.

    Raises:
        FileNotFoundError, ValueError, ImportError: see
            :func:`~spatial_mamba_d2.prediction.load_predictor`.
    """
    names = ("max_bytes", "max_pixels", "max_windows", "max_pending", "timeout_s")
    limits = Limits(**{name: getattr(args, name) for name in names})
    predictor = load_named_predictor(args)
    # The first prediction allocates, and may compile kernels.
    predictor(np.zeros((_WARMUP_PX, _WARMUP_PX, predictor.model.num_channels), np.uint8))
    logger.info("%s of %d classes, by %s", predictor.task, len(predictor.names), args.weights)
    uvicorn.run(
        build_app(predictor, limits),
        host=args.host,
        port=args.port,
        access_log=args.access_log,
        server_header=False,
        timeout_graceful_shutdown=int(limits.timeout_s) + 1,
    )
