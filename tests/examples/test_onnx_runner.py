"""``examples/onnx_runner.py``, in a process that cannot import PyTorch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")

import cv2

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.models import build_classifier

pytestmark = pytest.mark.docs


@pytest.fixture
def runner(root):
    path = root / "examples/onnx_runner.py"
    spec = importlib.util.spec_from_file_location("onnx_runner", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_process_without_pytorch(root, runner, test_variant, filled_state, tmp_path):
    """Its file was compared with PyTorch in batches of 1, 2 and 5 images and in five sizes."""
    for package in ("onnx", "onnxscript", "lightning"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from spatial_mamba_d2.classification.config import load_config
    from spatial_mamba_d2.classification.predict import Predictor

    weights, model = tmp_path / "weights.pth", tmp_path / "model.onnx"
    names = ["circle", "square", "triangle", "star", "cross"]
    state = filled_state(build_classifier(test_variant, 5))
    torch.save({"state_dict": state, "classes": names}, weights)
    config = root / "configs/demo_spatial_mamba_t.yaml"
    words = ["MODEL.SPATIAL_MAMBA.VARIANT", test_variant]
    metadata = deploy.export_model(weights, "onnx", model, config_file=config, overrides=words)
    assert metadata["inputs"] == {"image": {"dtype": "uint8", "shape": ["B", "H", "W", 3]}}

    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    cfg = load_config(config, [*words, "MODEL.WEIGHTS", str(weights), "MODEL.DEVICE", "cpu"])
    found = runner.Model(model)(pixels)["probabilities"]
    assert np.allclose(found, Predictor(cfg)(pixels), rtol=0, atol=1e-5)

    blocked = ("torch", "torchvision", "timm", "detectron2", "cv2", "spatial_mamba_d2")
    script = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"  # importing any of them is an error
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", script, root / "examples/onnx_runner.py", model]
    command += [tmp_path / "photo.png", "--output", tmp_path / "drawn"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(name in done.stdout for name in names) == 5 and "%" in done.stdout
    assert Image.open(tmp_path / "drawn/photo.png").size == (70, 90)


def test_images_are_resized_as_opencv_does(runner):
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for size in ((80, 91), (20, 17), (37, 53), (1, 200)):
        expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        apart = np.abs(runner.bilinear(image, *size).astype(int) - expected)
        assert apart.max() <= 1


def test_masks_are_pasted_as_detectron2_does(runner):
    layers = pytest.importorskip("detectron2.layers.mask_ops", reason="Detectron2 is not installed")
    mask = torch.rand(28, 28)
    for box in ([3.2, 4.7, 40.1, 30.9], [0.0, 0.0, 64.0, 48.0], [10.5, 10.5, 11.2, 12.0]):
        expected = layers.paste_masks_in_image(mask[None], torch.tensor([box]), (48, 64))[0]
        found = runner.paste(mask.numpy(), np.float32(box), 48, 64)
        assert np.count_nonzero(found != expected.numpy()) <= 1
