"""The recipes, and what becomes of wrong values."""

from __future__ import annotations

import pytest

from spatial_mamba_d2.classification.config import classification_defaults, load_config


@pytest.mark.parametrize(
    ("letter", "variant", "mesa"), [("t", "tiny", 1.0), ("s", "small", 1.5), ("b", "base", 2.0)]
)
def test_the_official_recipes(root, letter, variant, mesa):
    cfg = load_config(root / f"configs/spatial_mamba_{letter}.yaml")
    solver = cfg.SOLVER
    assert cfg.MODEL.SPATIAL_MAMBA.VARIANT == variant and cfg.MODEL.NUM_CLASSES == 1000
    assert (solver.MESA.WEIGHT, solver.MESA.START) == (mesa, 0.25)
    assert (solver.EPOCHS, solver.WARMUP_EPOCHS, solver.IMS_PER_BATCH) == (300, 20, 1024)
    assert solver.BASE_LR * solver.IMS_PER_BATCH / 512 == pytest.approx(1e-3)
    assert (solver.EMA_DECAY, solver.WEIGHT_DECAY, solver.LABEL_SMOOTHING) == (0.9999, 0.05, 0.1)
    assert solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_VALUE == 5
    assert (cfg.INPUT.MIXING.MIXUP, cfg.INPUT.MIXING.CUTMIX) == (0.8, 1.0)
    assert (cfg.TEST.SHORT_PX, cfg.INPUT.CROP_PX) == (256, 224)
    assert str(cfg.OUTPUT_DIR) == f"output/spatial_mamba_{letter}"


def test_the_demo_and_its_base_files_hold_only_known_keys(root):
    cfg = load_config(root / "configs/demo_spatial_mamba_t.yaml")
    assert cfg.MODEL.NUM_CLASSES == classification_defaults().MODEL.NUM_CLASSES == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("SOLVER.EPOCHS", "0"), "SOLVER.EPOCHS must be at least 1, got 0"),
        (("SOLVER.EPOCHS", "20"), "WARMUP_EPOCHS must be below SOLVER.EPOCHS 20, got 20"),
        (("TEST.SHORT_PX", "200"), "TEST.SHORT_PX must be at least 224, got 200"),
        (("INPUT.ERASE_PROB", "1.5"), r"INPUT.ERASE_PROB must be in \[0, 1\], got 1.5"),
        (("SOLVER.MIN_LR", "1"), r"SOLVER.MIN_LR must be in \[0, 0.0005\], got 1.0"),
        (("SOLVER.WARMUP_LR", "-1"), r"SOLVER.WARMUP_LR must be in \[0, 0.0005\], got -1.0"),
        (("INPUT.SCALE_RANGE", "(0.5, 2)"), r"SCALE_RANGE must be in \[0, 1\], got \(0.5, 2.0\)"),
        (("INPUT.AUTO_AUGMENT", "random"), "AUTO_AUGMENT must be in timm's notation, .*'random'"),
        (("SOLVER.EMA_DECAY", "0.0"), "MESA.WEIGHT must be 0 without a moving average"),
        (("INPUT.SCALE_RANGE", "(1, 0.5)"), "INPUT.SCALE_RANGE must be .low, high., both above 0"),
        (("SOLVER.MAX_ITER", "5"), "unknown config key SOLVER.MAX_ITER"),
    ],
)
def test_wrong_values_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, words)
