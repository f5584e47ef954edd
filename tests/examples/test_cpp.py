"""``examples/cpp``: saved models in programs without Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import cpp_extension

from spatial_mamba_d2.export.exportable import Normalize
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.ops import _extension

pytestmark = pytest.mark.docs

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_classes": 7}
COMPILER = os.environ.get("CXX", "c++").split()
LIBRARY = _extension.CPU_LIBRARY


@pytest.fixture(scope="module")
def compiled(root, tmp_path_factory):
    """``compiled(name, ...)``: the program of ``examples/cpp/NAME.cpp``."""

    def compile(name, standard, includes, folders, libraries):
        if not shutil.which(COMPILER[0]):
            pytest.skip(f"no C++ compiler {COMPILER[0]}")
        program = tmp_path_factory.mktemp("cpp") / name
        command = [*COMPILER, f"-std={standard}", "-O0", root / f"examples/cpp/{name}.cpp"]
        command += ["-o", program, *(f"-I{path}" for path in includes)]
        command += [f"-L{path}" for path in folders] + [f"-Wl,-rpath,{path}" for path in folders]
        command += [f"-l{library}" for library in libraries]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return program

    return compile


@pytest.fixture(scope="module")
def with_torch(compiled):
    """``with_torch(name)``: a program that links PyTorch, and loads our operators."""

    def compile(name):
        if _extension.WHY_NOT_COMPILED:
            pytest.skip(f"no compiled operators: {_extension.WHY_NOT_COMPILED}")
        folders = cpp_extension.library_paths()
        libraries = ("torch", "torch_cpu", "c10", "dl")
        return compiled(name, "c++20", cpp_extension.include_paths(), folders, libraries)

    return compile


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_classifier("tiny", **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.long
def test_torchscript(with_torch, model, tmp_path):
    program = with_torch("classify")
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


class Probabilities(torch.nn.Module):
    """What ``classification/export.py`` exports."""

    def __init__(self, model):
        super().__init__()
        self.normalize, self.model = Normalize([124] * 3, [58] * 3), model

    def forward(self, image):
        return (self.model(self.normalize(image)).softmax(-1),)


@pytest.mark.long
def test_aotinductor(with_torch, model, tmp_path):
    program, path = with_torch("run_aoti"), tmp_path / "model.pt2"
    module = Probabilities(model).eval()
    image = torch.randint(0, 256, (1, 40, 72, 3), dtype=torch.uint8)
    with torch.no_grad():
        graph = torch.export.export(module, (image,))
        torch._inductor.aoti_compile_and_package(graph, package_path=str(path))
        values, classes = module(image)[0][0].topk(5)
    words = [*map(str, (program, LIBRARY, path, 40, 72))]
    done = subprocess.run(words, input=image.numpy().tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [int(index) for index, _ in lines] == classes.tolist()
    assert [float(value) for _, value in lines] == pytest.approx(values.tolist(), rel=1e-4)
    short = subprocess.run(words, input=b"1234", capture_output=True)
    assert short.returncode == 1 and b"must have 8640 bytes, got 4" in short.stderr


def test_openvino(compiled, tmp_path):
    """A file of one product, so that the test takes no export."""
    onnx = pytest.importorskip("onnx", reason="onnx (extra export) is not installed")
    package = importlib.util.find_spec("openvino")
    if package is None:
        pytest.skip("openvino (extra openvino) is not installed")
    folder = Path(package.origin).parent
    (library,) = (folder / "libs").glob("libopenvino.so.*")
    name = f":{library.name}"
    program = compiled("run_onnx", "c++17", [folder / "include"], [folder / "libs"], [name])

    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["probabilities"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes, "mean", [helper.make_tensor_value_info("image", kinds.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("probabilities", kinds.FLOAT, ["B", 3])],
        [helper.make_tensor("axes", kinds.INT64, [2], [1, 2])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    words = [*map(str, (program, tmp_path / "m.onnx", 4, 6))]
    done = subprocess.run(words, input=image.tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    name, shape, *values = done.stdout.decode().split()
    assert (name, shape) == ("probabilities", "[1,3]")
    assert [*map(float, values)] == pytest.approx(image.mean((0, 1)).tolist(), rel=1e-4)
    short = subprocess.run(words, input=b"1234", capture_output=True)
    assert short.returncode == 1 and b"must have 72 bytes, got 4" in short.stderr
