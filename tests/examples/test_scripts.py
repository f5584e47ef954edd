"""The scripts and the notebook in ``examples/`` run, on small models."""

from __future__ import annotations

import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.variants import VARIANTS

pytestmark = pytest.mark.docs


@pytest.fixture(autouse=True)
def narrow_variant(monkeypatch) -> None:
    """The tiny variant is a narrow one."""
    arguments = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.1}
    monkeypatch.setitem(VARIANTS, "tiny", arguments)


@pytest.fixture
def run(root, monkeypatch, capsys, tmp_path):
    """``run(name, *words)``: what a script prints, with ``tmp_path/out`` as its ``--output``."""

    def call(name: str, *words: object) -> str:
        arguments = ["--output", str(tmp_path / "out"), *map(str, words)]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / "examples" / name), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    return call


@pytest.fixture
def segmentor(tmp_path):
    """The checkpoint of a small UPerNet."""
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from spatial_mamba_d2.segmentation.config import load_config
    from spatial_mamba_d2.segmentation.module import build_model

    words = ["MODEL.UPERNET.CHANNELS", "16", "MODEL.UPERNET.AUX_CHANNELS", "8", "INPUT.SHORT_PX",
             "64", "MODEL.NUM_CLASSES", "3", "DATASETS.CLASSES", "", "MODEL.DEVICE", "cpu",
             "MODEL.SPATIAL_MAMBA.VARIANT", "tiny"]  # fmt: skip
    cfg = load_config(None, words)
    content = {"model": build_model(cfg).state_dict(), "config": cfg.dump()}
    content |= {"classes": ["a", "b", "c"], "palette": [[i, i, i] for i in range(3)]}
    torch.save(content, tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


def test_a_raster_is_segmented(run, segmentor, tmp_path):
    printed = run("segment_raster.py", "--weights", segmentor, "--window", 384)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", printed)]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    label = read_image(tmp_path / "out/label.png", num_channels=1)
    assert label.shape == (384, 576, 1) and label.max() < 3
    scene = tmp_path / "scene.png"
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(scene)
    run("segment_raster.py", "--weights", segmentor, "--input", scene, "--window", 64)
    assert read_image(tmp_path / "out/label.png", num_channels=1).shape == (90, 120, 1)


def test_features_in_timm(run):
    printed = run("timm_features.py")
    found = re.search(r"(\d+) features, top-1 ([\d.]+)% of 5 classes", printed)
    assert int(found[1]) == 128 and float(found[2]) > 30  # 20 by chance


@pytest.mark.parametrize(
    ("library", "package"),
    [("smp", "segmentation_models_pytorch"), ("transformers", "transformers")],
)
def test_heads_of_others(library, package, run):
    pytest.importorskip(package, reason="pip install 'spatial-mamba-d2[heads]'")
    printed = run("heads_of_others.py", "--library", library, "--iterations", 10)
    assert "iteration 10: loss" in printed
    assert 5 < float(re.search(r"mIoU ([\d.]+)% of 6 classes, 16 images", printed)[1]) < 100


@pytest.mark.slow
def test_a_detector_is_fine_tuned(run, shapes, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    printed = run(
        "finetune_detector.py", "--data", shapes, "--epochs", 2, "INPUT.MIN_SIZE_TRAIN", "(48,)",
        "INPUT.MIN_SIZE_TEST", 48, "TEST.PICTURES", 0, "SOLVER.MAX_ITER", 4,
        "SOLVER.WARMUP_ITERS", 1,
    )  # fmt: skip
    assert len(re.findall(r"validation/\d+\.jpg: \d+ objects", printed)) == 5
    assert len(list((tmp_path / "out/drawings").glob("*.png"))) == 5
    assert (tmp_path / "out/run/model_final.pth").is_file()


@pytest.mark.long
def test_an_exported_model_runs_without_pytorch(run, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="pip install 'spatial-mamba-d2[export]'")
    config = pytest.importorskip(
        "spatial_mamba_d2.classification.config", reason="fvcore is not installed"
    )
    words = ["MODEL.NUM_CLASSES", "2", "INPUT.CROP_PX", "32", "TEST.SHORT_PX", "36"]
    cfg = config.load_config(None, [*words, "MODEL.DEVICE", "cpu"])
    content = {"model": build_classifier("tiny", 2).state_dict(), "config": cfg.dump()}
    torch.save(content | {"classes": ["x", "y"]}, tmp_path / "weights.pth")
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(photo)
    run("export_and_run.py", "--weights", tmp_path / "weights.pth", photo)
    assert (tmp_path / "out/model.onnx").is_file()
    assert list((tmp_path / "out/drawings").iterdir())


def test_the_notebook(root, monkeypatch, tmp_path):
    """Its cells run one after the other, in one namespace, as in a kernel that has just started."""
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    notebook = json.loads((root / "examples/look_inside.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # results are not kept in the repository
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    for name in ("states", "fields"):
        assert read_image(tmp_path / f"output/look_inside/{name}.png").std() > 10


@pytest.mark.long
def test_the_notebook_in_a_kernel(root, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    notebook = nbformat.read(root / "examples/look_inside.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
