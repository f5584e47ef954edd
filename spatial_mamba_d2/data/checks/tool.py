"""What ``tools/check_data.py`` runs."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.checks.checking import check_data
from spatial_mamba_d2.data.checks.drawing import write_report_page
from spatial_mamba_d2.data.checks.report import write_json
from spatial_mamba_d2.data.formats import read_data
from spatial_mamba_d2.data.outputs import check_outputs

CLEAN, FOUND = 0, 1


def run(args: argparse.Namespace) -> int:
    """Check ``args.path`` and write what was asked for.

    Returns:
        0 if nothing was found, 1 if there are findings.

    Raises:
        FileNotFoundError, ValueError: the data are not usable, which is the exit code 2; the JSON
            file says so too.
        ImportError: the format needs a package that is not installed.
    """
    outputs = [path for path in (args.json, args.html) if path is not None]
    check_outputs(outputs, [args.path] if args.path.is_file() else [], overwrite=True)
    with tempfile.TemporaryDirectory(prefix="check_data-") as folder:
        try:
            data = read_data(args.path, task=args.task, extract_to=folder)
        except (OSError, ValueError) as error:
            if args.json is not None:
                write_json(args.json, _unusable(args.path, error))
            raise
        report = check_data(data)
        print(report.text())
        if args.json is not None:
            report.write_json(args.json)
        if args.html is not None:
            write_report_page(report, args.html)
    return FOUND if report.findings else CLEAN


def _unusable(path: Path, error: Exception) -> dict[str, Any]:
    finding = {"kind": "unusable data", "file": str(path), "message": str(error)}
    return {
        "path": str(path.absolute()),
        "format": None,
        "task": None,
        "num_images": 0,
        "num_objects": 0,
        "findings": [finding],
        "notes": [],
    }
