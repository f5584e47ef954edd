"""Results that are remembered for unchanged files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spatial_mamba_d2.system.once import once_per_machine

LONG_AGO_NS = 10**18


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.txt"
    write(path, "abc", LONG_AGO_NS)
    return path


def write(path, text, time_ns):
    path.write_text(text)
    os.utime(path, ns=(time_ns, time_ns))


@pytest.fixture
def count(monkeypatch, tmp_path):
    """``count(files, parameters)``: how often the computation ran so far, as its result."""
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path / "cache"))
    calls = []

    def ask(files, parameters=None):
        def compute():
            calls.append(1)
            return len(calls)

        return once_per_machine("test", files, parameters, compute, keep=lambda _: True)

    return ask


def test_it_is_computed_once(count, file):
    assert [count([file]) for _ in range(3)] == [1, 1, 1]


def test_a_change_of_anything_computes_again(count, file, tmp_path):
    assert count([file]) == 1
    assert count([file], ["other"]) == 2
    write(file, "abcd", LONG_AGO_NS)
    assert count([file]) == 3
    write(file, "dcba", LONG_AGO_NS + 1)
    assert count([file]) == 4
    other = tmp_path / "other.txt"
    write(other, "dcba", LONG_AGO_NS + 1)
    assert count([other]) == 5
    assert count([file]) == 4


def test_a_file_that_was_just_written_may_change_unnoticed(count, file):
    file.write_text("abc")
    assert [count([file]) for _ in range(3)] == [1, 2, 3]


def test_a_damaged_memory_is_no_memory(count, file, tmp_path):
    assert count([file]) == 1
    (path,) = (tmp_path / "cache").glob("*.json")
    path.write_text('{"half')
    assert count([file]) == 2 == count([file])


def test_without_a_folder_to_write_to_it_still_computes(count, file, tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("no folder")
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path / "occupied"))
    assert [count([file]) for _ in range(2)] == [1, 2]


def test_what_is_not_to_be_kept_is_computed_again(file, tmp_path, monkeypatch):
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path / "cache"))
    results = iter("abc")
    for expected in "abb":
        result = once_per_machine(
            "test", [file], None, lambda: next(results), keep=lambda result: result == "b"
        )
        assert result == expected


def test_a_missing_file_is_a_matter_of_the_computation(count, tmp_path):
    assert [count([tmp_path / "absent.txt"]) for _ in range(2)] == [1, 2]


def test_an_error_is_not_remembered(count, file, tmp_path):
    def fail():
        raise FileNotFoundError("no such label")

    with pytest.raises(FileNotFoundError, match="no such label"):
        once_per_machine("test", [file], None, fail, keep=bool)
    assert count([file]) == 1


PROGRAM = """
import sys, time
from pathlib import Path
from spatial_mamba_d2.system.once import once_per_machine

def compute():
    with Path(sys.argv[2]).open("a") as log:
        log.write("computed\\n")
    time.sleep(0.5)
    return 7

assert once_per_machine("test", [sys.argv[1]], None, compute, keep=bool) == 7
"""


def test_one_of_several_processes_computes(count, file, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", PROGRAM, str(file), str(log)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert log.read_text() == "computed\n"
