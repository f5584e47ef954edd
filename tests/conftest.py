"""Fixtures that several subpackages share: golden values, sample data, runs of the tools."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np
import pytest
import torch

from spatial_mamba_d2.data.shape_classes import generate_shape_classes
from spatial_mamba_d2.data.shapes import generate_shapes
from spatial_mamba_d2.models.checkpoints.names import to_official
from spatial_mamba_d2.models.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED_DATA = ROOT.parent / "shared" / "data"
TEST_VARIANT = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.1}

# What is imported and collected stays: Python need not look for garbage in it, again and again.
gc.disable()
# Tests start many processes, which need not compile the sources each, whatever the environment
# says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

if num_processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Processes that test side by side share the cores, with the tools that they start.
    num_threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
assert _spec and _spec.loader
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that the processes end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@contextmanager
def unchanged_loggers() -> Iterator[None]:
    """Undo what Detectron2's ``setup_logger`` changes: other tests count messages by ``caplog``."""
    loggers = [logging.getLogger(name) for name in ("spatial_mamba_d2", "detectron2", "fvcore")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    try:
        yield
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    with unchanged_loggers():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def noise() -> Callable[..., torch.Tensor]:
    """``noise(key, shape)``: the goldens' inputs."""
    return lambda key, shape: torch.from_numpy(_fill.noise(key, shape))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """``golden(file)``: a golden npz (arrays as tensors) or json."""

    def load(name: str) -> dict:
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        with np.load(GOLDEN / name) as content:
            return {key: torch.from_numpy(content[key]) for key in content}

    return load


@pytest.fixture(scope="session")
def official_state(golden) -> Callable[[str], dict[str, torch.Tensor]]:
    """``official_state(model)``: a whole state dict under official names, e.g. ``"tiny"``,
    ``"maskrcnn_tiny"`` or, for the backbone with its output norms, ``"backbone_tiny"``.
    """

    def state(model: str) -> dict[str, torch.Tensor]:
        if model == "backbone_tiny":
            names = golden("official_keys_maskrcnn_tiny.json")["keys"]
            shapes = {
                name.removeprefix("backbone."): shape
                for name, shape in names.items()
                if name.startswith("backbone.")
            }
        else:
            shapes = golden(f"official_keys_{model}.json")["keys"]
        return {name: torch.from_numpy(value) for name, value in _fill.fill(shapes).items()}

    return state


@pytest.fixture(scope="session")
def filled_state() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """``filled_state(model)``: the goldens' weights for a model of any width, in official names."""

    def fill(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        shapes = {to_official(name): x.shape for name, x in model.state_dict().items()}
        return {name: torch.from_numpy(value) for name, value in _fill.fill(shapes).items()}

    return fill


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """210 real COCO images, which are not part of this repository."""
    folder = SHARED_DATA / "coco_mini"
    if not folder.is_dir():
        pytest.skip(f"real COCO images are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def imagenet_mini() -> Path:
    """280 real images of ten classes of ImageNet, which are not part of this repository."""
    folder = SHARED_DATA / "imagenet_mini"
    if not folder.is_dir():
        pytest.skip(f"real ImageNet images are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """12 training and 5 test images of 64 to 96 pixels, with instances and label maps."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, num_train=12, num_val=5, image_px=(64, 96))


@pytest.fixture(scope="session")
def sample_images(tmp_path_factory) -> Path:
    """5 training and 3 test images of each of 5 classes, 40 x 40, in class folders."""
    folder = tmp_path_factory.mktemp("data") / "shape_classes"
    return generate_shape_classes(folder, num_train=5, num_val=3, image_px=40)


@pytest.fixture
def test_variant(monkeypatch) -> str:
    """The name of a narrow and shallow variant, which only this process has."""
    monkeypatch.setitem(VARIANTS, "test", TEST_VARIANT)
    return "test"


@pytest.fixture(scope="session")
def timm_example() -> ModuleType:
    """The model of ``examples/timm``, which timm then knows as ``spatialmamba_tiny`` and so on."""
    timm = importlib.import_module("timm")
    if not hasattr(importlib.import_module("timm.layers"), "get_device_dtype"):
        pytest.skip(f"the example is for newer versions of timm than {timm.__version__}")
    name = "timm_example.spatial_mamba"
    path = ROOT / "examples" / "timm" / "spatial_mamba.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    # timm looks the module of a model up, to list its names
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def memory_of_checks(tmp_path_factory) -> None:
    """Checks of data are remembered in a folder of this run, also by the tools it starts."""
    os.environ["SMD2_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def quiet_package_logger():
    """Handlers that a test adds to the package's logger are removed, so that ``caplog`` works."""
    package = logging.getLogger("spatial_mamba_d2")
    before = list(package.handlers)
    yield
    package.handlers[:] = before


@pytest.fixture
def arguments(overrides) -> Callable[..., Namespace]:
    """``arguments(KEY, VALUE, ..., resume=...)``: what the command line of a training tool gives.

    The fixture ``overrides`` of the task comes first.
    """

    def make(*more: object, **flags: object) -> Namespace:
        defaults = {
            "config_file": None,
            "num_gpus": 1,
            "num_machines": 1,
            "machine_rank": 0,
            "dist_url": "auto",
            "opts": [*overrides, *(str(word) for word in more)],
            "resume": False,
            "eval_only": False,
        }
        return Namespace(**{**defaults, **flags})

    return make


# What a started process runs: a function and its arguments, with the variant of the tests.
_PROGRAM = """
import pickle, sys
from spatial_mamba_d2.models.variants import VARIANTS
with open(sys.argv[1], "rb") as file:
    VARIANTS["test"], function, arguments = pickle.load(file)
function(*arguments)
"""
_started: list[subprocess.Popen] = []  # kept, so that only those who wait for them reap them


def forks_can_train() -> bool:
    """Not if a test before has made PyTorch start threads for gradients, which no fork has."""
    if not hasattr(os, "fork"):
        return False
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1] == 0
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except BaseException:
        os._exit(1)
    os._exit(0)


def _fork(function: Callable, arguments: Iterable[object], environment: dict[str, object]) -> int:
    """A process that calls the function, and ends.

    Where possible, it is forked and need not import PyTorch again, which takes longer than what
    most tests do with it.
    """
    words = {name: str(value) for name, value in environment.items()}
    if not forks_can_train():
        with tempfile.NamedTemporaryFile(delete=False) as file:
            pickle.dump((TEST_VARIANT, function, tuple(arguments)), file)
        words |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", _PROGRAM, file.name]
        _started.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **words}))
        return _started[-1].pid
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(words)
        torch.set_num_threads(1)  # those of this process do not outlive the fork
        torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
        if rank_zero := sys.modules.get("lightning_utilities.core.rank_zero"):
            rank_zero.rank_zero_only.rank = environment.get("RANK", 0)  # set at its import
        function(*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture
def fork() -> Iterator[Callable[..., int]]:
    """``fork(function, *arguments)``: the number of a process that calls it, killed at the end."""
    processes = []

    def start(function: Callable, *arguments: object) -> int:
        processes.append(_fork(function, arguments, {}))
        return processes[-1]

    yield start
    for process in processes:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


@pytest.fixture
def run_tool() -> Callable[..., subprocess.CompletedProcess]:
    """``run_tool(file, *words)``: a file of ``tools/`` as a program, without the time of a start.

    What a tool needs of a fresh process, such as that it imports what it uses, is left to the tests
    of the tools in an empty folder and in environments without a package.
    """

    def main(path: Path, words: Iterable[str], files: Iterable[IO[bytes]]) -> None:
        os.chdir(ROOT)
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        logging.getLogger().handlers.clear()  # those of pytest
        sys.argv = [str(path), *words]
        runpy.run_path(str(path), run_name="__main__")

    def run(name: str, *words: object) -> subprocess.CompletedProcess:
        command = ROOT / "tools" / name, [*map(str, words)]
        if not forks_can_train():
            line = [sys.executable, str(command[0]), *command[1]]
            return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = _fork(main, (*command, (output, errors)), {})
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess(command, code, *texts)

    return run


@pytest.fixture
def as_under_torchrun() -> Callable[..., None]:
    """``as_under_torchrun(function, *arguments)``: in two processes, which must succeed.

    They find what torchrun tells its own in their environment.
    """

    def run(function: Callable, *arguments: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        shared |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        processes = [
            _fork(function, arguments, {**shared, "RANK": rank, "LOCAL_RANK": rank})
            for rank in range(2)
        ]
        codes: dict[int, int] = {}
        while len(codes) < 2 and not any(codes.values()):
            time.sleep(0.05)
            for process in set(processes) - codes.keys():
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
        for process in set(processes) - codes.keys():  # would wait for the one that failed
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        assert not any(codes.values()), "its error is in what was captured"

    return run


@pytest.fixture
def curve() -> Callable[..., dict[int, float]]:
    """``curve(folder, key="loss")``: ``{iteration: value}``, the last of a repeated iteration."""

    def read(folder: Path, key: str = "loss") -> dict[int, float]:
        lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
        return {line["iteration"]: line[key] for line in lines if key in line}

    return read


class Interrupted(RuntimeError):
    pass


@pytest.fixture
def interrupted() -> Callable[..., AbstractContextManager]:
    """``with interrupted(TrainingModule class, iteration):`` training ends there with an error."""

    @contextmanager
    def interrupt(module: type, iteration: int) -> Iterator[None]:
        step = module.training_step

        def raising(self, batch, batch_idx):
            if self.trainer.global_step == iteration:
                raise Interrupted
            return step(self, batch, batch_idx)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(module, "training_step", raising)
            yield

    return interrupt
