#!/usr/bin/env python3
"""Export a trained model as ONNX, and run it in a Python that has no PyTorch.

    python examples/export_and_run.py --weights output/demo/model_final.pth photo.jpg

The second step is onnx_runner.py, which needs onnxruntime, numpy and Pillow. Here it is started in
a process in which importing PyTorch is an error.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from spatial_mamba_d2.deploy import export_model
from spatial_mamba_d2.system.cli import run_tool

RUNNER = Path(__file__).with_name("onnx_runner.py")
WITHOUT_PYTORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["spatial_mamba_d2"] = None  # importing them raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("output/demo/model_final.pth"))
    parser.add_argument("--output", type=Path, default=Path("output/example_export"))
    parser.add_argument("images", nargs="+", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model = args.output / "model.onnx"
    export_model(args.weights, "onnx", model, overwrite=True)
    words = [RUNNER, model, *args.images, "--output", args.output / "drawings"]
    command = [sys.executable, "-c", WITHOUT_PYTORCH, *map(str, words)]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    run_tool(main)
