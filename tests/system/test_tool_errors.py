"""How a tool ends: a user's mistake in one line, a fault of ours with its traceback."""

from __future__ import annotations

import errno
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from spatial_mamba_d2.system.cli import parse_address, run_tool
from spatial_mamba_d2.system.tool_errors import find_mistake


def caught(action) -> Exception:
    with pytest.raises(Exception) as info:
        action()
    return info.value


def ours(source: str):
    """A function that runs ``source`` as code of the package."""
    code = compile(textwrap.dedent(source), "<code of the package>", "exec")
    return lambda: exec(code, {"__name__": "spatial_mamba_d2.data.example"})


def no_address() -> None:
    parse_address("localhost")


def bad_number() -> None:
    int("many")


def missing_file() -> None:
    open("absent/file.json")


def diverged() -> None:
    ours("raise FloatingPointError('iteration 7: the loss is nan')")()


NO_ADDRESS = "--dist-url must be tcp://HOST:PORT for several machines, got 'localhost'"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ValueError('SEED must be at least 0')", "SEED must be at least 0"),
        ("raise FileNotFoundError('no such file: a')", "no such file: a"),
        ("raise OSError('cannot write image a.png')", "cannot write image a.png"),
        ("raise ImportError('SMD2_BACKEND must be one of')", "SMD2_BACKEND must be one of"),
        ("try:\n    int('x')\nexcept ValueError:\n    raise ValueError('b')", "b"),
        ("int('x')", None),
        ("open('absent/a.txt')", f"{Path('absent/a.txt').absolute()}: No such file or directory"),
        ("[].index(1)", None),
        ("{}['key']", None),
        ("raise KeyError('key')", None),
        ("raise RuntimeError('key')", None),
        ("import no_such_package", "No module named 'no_such_package'; `"),
        ("import spatial_mamba_d2.no_such_module", None),
    ],
)
def test_a_mistake_is_what_our_checks_and_the_system_raise(source, text):
    mistake = find_mistake(caught(ours(source)))
    if text is None:
        assert mistake is None
    else:
        assert mistake.exit_code == 2 and mistake.text.startswith(text)


def test_what_a_library_raises_is_a_fault_of_ours():
    assert find_mistake(caught(lambda: textwrap.TextWrapper(width=-1).wrap("a"))) is None
    assert find_mistake(ValueError("never raised")) is None


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, True), (errno.ECONNREFUSED, False)])
def test_an_error_of_the_system_without_a_file(number, told):
    def fail():
        raise OSError(number, os.strerror(number))

    assert (find_mistake(caught(fail)) is not None) == told


class Samples:
    """A data set whose samples fail."""

    def __init__(self, fail) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        self.fail()


def in_process(index: int, fail) -> None:
    fail()


def in_process_with_loader(index: int, fail) -> None:
    # A child of a daemon cannot have children.
    mp.current_process()._config["daemon"] = False
    list(DataLoader(Samples(fail), num_workers=1))


WORKERS = {
    "loader": lambda fail: list(DataLoader(Samples(fail), num_workers=1)),
    "process": lambda fail: mp.start_processes(in_process, (fail,), 1, start_method="fork"),
    "both": lambda fail: mp.start_processes(
        in_process_with_loader, (fail,), 1, start_method="fork"
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
@pytest.mark.parametrize("where", WORKERS)
@pytest.mark.parametrize(
    ("fail", "mistake"),
    [
        (no_address, (NO_ADDRESS, 2)),
        (missing_file, (f"{Path('absent/file.json').absolute()}: No such file or directory", 2)),
        (bad_number, None),
    ],
)
def test_mistakes_in_worker_processes(where, fail, mistake):
    assert find_mistake(caught(lambda: WORKERS[where](fail))) == mistake


@pytest.mark.parametrize(
    ("main", "code", "text"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (no_address, 2, f"error: {NO_ADDRESS}\n"),
        (diverged, 1, "error: iteration 7: the loss is nan\n"),
    ],
)
def test_exit_codes(main, code, text, capsys, monkeypatch):
    monkeypatch.delenv("SMD2_DEBUG", raising=False)
    with pytest.raises(SystemExit) as info:
        run_tool(main)
    assert (info.value.code or 0) == code
    assert capsys.readouterr().err == text


def test_the_traceback_on_request(capsys, monkeypatch):
    monkeypatch.setenv("SMD2_DEBUG", "1")
    with pytest.raises(SystemExit, match="2"):
        run_tool(no_address)
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith(f"error: {NO_ADDRESS}\n")


def test_faults_of_ours_and_exits_pass():
    with pytest.raises(ValueError, match="invalid literal"):
        run_tool(bad_number)
    with pytest.raises(SystemExit, match="143"):
        run_tool(lambda: sys.exit(143))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_tool(interrupt)
