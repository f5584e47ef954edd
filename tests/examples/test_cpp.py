"""``examples/cpp``: a saved model and the compiled operators, in a program without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.ops import _extension

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_classes": 7}
COMPILER = os.environ.get("CXX", "c++").split()
LIBRARY = next(iter(sorted(Path(_extension.__file__).parent.glob("_C*.so"))), None)


@pytest.fixture(scope="module")
def program(root, tmp_path_factory):
    if not shutil.which(COMPILER[0]):
        pytest.skip(f"no C++ compiler {COMPILER[0]}")
    if not LIBRARY or _extension.WHY_NOT_COMPILED:
        pytest.skip(f"no compiled operators: {_extension.WHY_NOT_COMPILED}")
    program = tmp_path_factory.mktemp("cpp") / "classify"
    libraries = cpp_extension.library_paths()
    command = [*COMPILER, "-std=c++20", "-O0", root / "examples/cpp/classify.cpp", "-o", program]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{path}" for path in libraries] + [f"-Wl,-rpath,{path}" for path in libraries]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_classifier("tiny", **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.slow
def test_a_program_without_python(program, model, tmp_path):
    torch.jit.script(model).save(tmp_path / "model.pt")
    x = torch.randn(1, 3, 40, 72)
    words = [program, LIBRARY, tmp_path / "model.pt", 40, 72]
    done = subprocess.run([*map(str, words)], input=x.numpy().tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    with torch.no_grad():
        values, classes = model(x).softmax(1)[0].topk(5)
    assert [int(index) for index, _ in lines] == classes.tolist()
    assert [float(value) for _, value in lines] == pytest.approx(values.tolist(), rel=1e-4)

    short = subprocess.run([*map(str, words)], input=b"1234", capture_output=True)
    assert short.returncode == 1
    assert b"the image must have 34560 bytes, got 4" in short.stderr
