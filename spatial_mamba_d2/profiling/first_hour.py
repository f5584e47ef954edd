"""The first hour on a GPU: everything that waits for one, correctness before speed.

Each step runs in a process of its own, because an invalid access of a kernel ends the use of a GPU
by a process, and has a limit of time. Its result is written when it is done, and a step that is
done is not repeated: an hour that is cut off continues where it was.

On a CPU (``device="cpu"``), steps measure the CPU, and say what they leave out: that is how they
are tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.profiling.first_hour_steps import STEPS, Result, Settings
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.tables import markdown_table


def run_step(name: str, settings: Settings) -> Result:
    """Run one step in this process; what it raises becomes part of the result."""
    start = time.perf_counter()
    try:
        result: Result = {"status": "done", "result": STEPS[name][0](settings)}
    except Exception as error:
        text = traceback.format_exc(limit=-4)
        result = {"status": "failed", "error": f"{error}", "traceback": text}
    seconds = time.perf_counter() - start
    return {"step": name, "settings": settings._asdict(), "seconds": seconds, **result}


def run_hour(
    output: Path,
    settings: Settings,
    steps: Sequence[str] = tuple(STEPS),
    program: Path | None = None,
) -> int:
    """Run the steps that ``output`` has no result of, and write the report.

    Args:
        output: a folder; each step has a file ``<step>.json`` in it, the report is
            ``first_hour.json`` and ``first_hour.md``.
        settings: a result that was taken with others is taken again, and so is a failed one.
        program: ``tools/gpu_first_hour.py``, which runs a step in a process of its own. Without it,
            steps run in this one.

    Returns:
        the number of steps that failed.

    Raises:
        ValueError: there is no such step, or ``output`` cannot be written.
    """
    for name in steps:
        if name not in STEPS:
            raise ValueError(f"a step must be one of {', '.join(STEPS)}, got {name!r}")
    check_outputs([output / "first_hour.md"], [], overwrite=True)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for name in steps:
        result = _known_result(output / f"{name}.json", settings)
        if result is None:
            print(f"{name} ...", flush=True)
            result = (
                _in_process(name, settings, output, program)
                if program
                else write_step(name, settings, output)
            )
        print(f"{name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
        results.append(result)
        _write(output / "first_hour.json", json.dumps(results, indent=2, default=str))
        _write(output / "first_hour.md", to_markdown(results))
    return sum(result["status"] != "done" for result in results)


def _known_result(path: Path, settings: Settings) -> Result | None:
    try:
        result = read_json(path)
        is_same = result["settings"] == settings._asdict() and result["status"] == "done"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result if is_same else None


def write_step(name: str, settings: Settings, output: Path) -> Result:
    """:func:`run_step`, with the result in ``output``/<step>.json."""
    result = run_step(name, settings)
    _write(output / f"{name}.json", json.dumps(result, indent=2, default=str))
    return result


def _in_process(name: str, settings: Settings, output: Path, program: Path) -> Result:
    command = [sys.executable, str(program), "--step", name, "--output", str(output)]
    (output / f"{name}.json").unlink(missing_ok=True)
    limit = STEPS[name][1]
    start = time.perf_counter()
    failed: Result = {"step": name, "settings": settings._asdict(), "status": "failed"}
    try:
        done = subprocess.run(
            [*command, *settings.words()], capture_output=True, text=True, timeout=limit
        )
        return read_json(output / f"{name}.json")
    except subprocess.TimeoutExpired:
        failed["error"] = f"not done after {limit} seconds"
    except (FileNotFoundError, ValueError):
        failed["error"] = f"exit code {done.returncode}: {done.stderr[-2000:]}"
    failed["seconds"] = time.perf_counter() - start
    _write(output / f"{name}.json", json.dumps(failed, indent=2))
    return failed


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def to_markdown(results: Sequence[Result]) -> str:
    """The report: a section for each step, with its rows as tables."""
    sections = ["# First hour on a GPU"]
    summary = [[r["step"], r["status"], f"{r['seconds']:.0f}"] for r in results]
    sections.append(markdown_table(["step", "status", "s"], summary))
    for result in results:
        sections.append(f"## {result['step']}")
        if result["status"] != "done":
            sections.append(f"Failed: {result['error']}")
            continue
        for key, value in result["result"].items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(dict.fromkeys(name for row in value for name in row))
                rows = [[_cell(row.get(name, "")) for name in columns] for row in value]
                sections.append(markdown_table(columns, rows))
            elif isinstance(value, dict):
                rows = [[str(name), _cell(x)] for name, x in value.items()]
                sections.append(markdown_table([key, ""], rows))
            else:
                sections.append(f"{key}: {_cell(value)}")
    return "\n\n".join(sections)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "/")
