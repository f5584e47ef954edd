"""The recipe, and the errors for wrong keys and values."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TEST.MODE", "tiles"], "TEST.MODE must be one of whole, slide, got 'tiles'"),
        (["TEST.PROTOCOL", "tta"], "PROTOCOL must be one of ss, ms, ms_wide, custom, got 'tta'"),
        (["TEST.STRIDE_PX", "600"], "STRIDE_PX must be at most TEST.CROP_PX 512 .*got 600"),
        (["TEST.SCALES", "(0.0,)"], "TEST.SCALES must be numbers above 0"),
        (["INPUT.RATIO_RANGE", "(2.0, 0.5)"], r"must be \(low, high\), both above 0, got \(2.0"),
        (["INPUT.LONG_PX", "100"], "INPUT.LONG_PX must be at least 512, got 100"),
        (["INPUT.CROP_PX", "0"], "INPUT.CROP_PX must be at least 1, got 0"),
        (["INPUT.MAX_CLASS_SHARE", "0"], r"MAX_CLASS_SHARE must be in \(0, 1\], got 0.0"),
        (["MODEL.UPERNET.DROPOUT", "1"], r"DROPOUT must be in \[0, 1\), got 1.0"),
        (["MODEL.UPERNET.AUX_WEIGHT", "-0.4"], "AUX_WEIGHT must be at least 0, got -0.4"),
        (["MODEL.UPERNET.CHANNELS", "0"], "CHANNELS must be at least 1, got 0"),
        (["DATASETS.LABEL_OFFSET", "-1"], "LABEL_OFFSET must be at least 0, got -1"),
        (["DATASETS.IGNORE_LABELS", "0.5"], r"IGNORE_LABELS must be whole numbers, got \(0.5,\)"),
        (["DATASETS.IGNORE_LABELS", "-1"], r"IGNORE_LABELS must be at least 0, got \(-1,\)"),
        (["MODEL.CLASS_WEIGHTS", "(0, 0, 0, 0, 0, 0)"], "numbers of at least 0, not all 0, or"),
        (["MODEL.NUM_CLASSES", "1"], "NUM_CLASSES must be at least 2: .*background is a class.*1$"),
        (["SOLVER.IMS_PER_BATCH", "1"], "IMS_PER_BATCH must be at least 2 x .*STEPS 1, .*got 1"),
        (["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATION_STEPS", "4"], "2 x .*STEPS 4, .*got 4"),
        (["INPUT.CHANNELS", "4"], "MODEL.PIXEL_MEAN must have 4 elements, got"),
        (["MODEL.PIXEL_STD", "(1.0,)"], r"MODEL.PIXEL_STD must have 3 elements, got \(1.0,\)"),
        (["MODEL.BACKBONE.FREEZE_AT", "6"], r"FREEZE_AT must be in \[0, 5\], got 6"),
        (["MODEL.DICE_WEIGHT", "-1.0"], "DICE_WEIGHT must be at least 0, got -1.0"),
        (["DATASETS.TRAIN", ""], "DATASETS.TRAIN must name a split, got ''"),
        (["MODEL.CLASS_WEIGHTS", "('car',)"], r"numbers of at least 0, not all 0, or \('auto',\)"),
        (["MODEL.CLASS_WEIGHTS", "(1, 2)"], r"CLASS_WEIGHTS must be empty or 6 .*got \(1, 2\)"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
