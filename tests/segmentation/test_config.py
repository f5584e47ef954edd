"""The recipe, and what a wrong key or value is told."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2.segmentation.config import load_config


@pytest.mark.parametrize(
    ("letter", "variant", "single", "multi"),
    [("t", "tiny", 48.6, 49.4), ("s", "small", 50.6, 51.4), ("b", "base", 51.8, 52.6)],
)
def test_official_recipe(root, letter, variant, single, multi):
    path = root / f"configs/upernet_spatial_mamba_{letter}.yaml"
    cfg = load_config(path)
    solver, data = cfg.SOLVER, cfg.INPUT
    assert cfg.MODEL.SPATIAL_MAMBA.VARIANT == variant and cfg.MODEL.NUM_CLASSES == 150
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.BETAS) == (6e-5, 0.01, (0.9, 0.999))
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.MAX_ITER) == (1500, 1e-6, 160_000)
    assert solver.IMS_PER_BATCH == 16 and not solver.CLIP_GRADIENTS.ENABLED
    assert (data.SHORT_PX, data.LONG_PX, data.RATIO_RANGE) == (512, 2048, (0.5, 2.0))
    assert (data.CROP_PX, data.MAX_CLASS_SHARE) == (512, 0.75)
    assert (cfg.MODEL.UPERNET.AUX_WEIGHT, cfg.MODEL.UPERNET.DROPOUT) == (0.4, 0.1)
    text = path.read_text()
    assert f"tools/train_seg.py --config-file configs/{path.name}" in text
    assert f"mIoU {single} single-scale, {multi} multi-scale" in text
    assert "BN: sync" in (root / "configs/Base-UPerNet.yaml").read_text()


def test_no_gpu_means_cpu_without_sync_bn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load_config(None)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.SPATIAL_MAMBA.BN) == ("cpu", "train")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
        ("MODEL.NUM_CLASES", "MODEL.NUM_CLASSES"),
        ("CROP_PX", "(INPUT|TEST).CROP_PX"),
        ("MODEL.SPATIAL_MAMBA.OUT_FEATURES", "MODEL.SPATIAL_MAMBA..*"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=f"unknown config key {key}; the nearest .* is {nearest}"):
        load_config(None, [key, "1"])


def test_unknown_key_in_a_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("DATASETS:\n  ROT: data\n")
    with pytest.raises(ValueError, match=r"my.yaml: unknown config key DATASETS.ROT; .*ROOT"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be at least 1, got 0"),
        (["DATASETS.ON_ERROR", "ignore"], "ON_ERROR must be one of raise, skip, got 'ignore'"),
        (["TEST.MODE", "tiles"], "TEST.MODE must be one of whole, slide, got 'tiles'"),
        (["TEST.PROTOCOL", "tta"], "PROTOCOL must be one of ss, ms, ms_wide, custom, got 'tta'"),
        (["TEST.STRIDE_PX", "600"], "STRIDE_PX must be at most TEST.CROP_PX 512, .*got 600"),
        (["TEST.SCALES", "(0.0,)"], "TEST.SCALES must be numbers above 0"),
        (["INPUT.RATIO_RANGE", "(2.0, 0.5)"], r"must be \(low, high\) above 0, got \(2.0, 0.5\)"),
        (["INPUT.LONG_PX", "100"], "INPUT.LONG_PX must be at least 512, got 100"),
        (["MODEL.CLASS_WEIGHTS", "(1, 2)"], r"CLASS_WEIGHTS must be 6 numbers .*got \(1, 2\)"),
        (["SOLVER.EMA_DECAY", "1.0"], r"EMA_DECAY must be in \[0, 1\), got 1.0"),
        (["SOLVER.AMP.PRECISION", "int8"], "PRECISION must be one of bfloat16, float16"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
