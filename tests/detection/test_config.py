"""Configuration: recipes as published, typos explained."""

from __future__ import annotations

import pytest

from spatial_mamba_d2.detection.config import load_config

RECIPES = {
    "mask_rcnn_spatial_mamba_t": ("tiny", 12, "47.6", "42.9"),
    "mask_rcnn_spatial_mamba_s": ("small", 12, "49.2", "44.0"),
    "mask_rcnn_spatial_mamba_b": ("base", 12, "50.4", "45.1"),
    "mask_rcnn_spatial_mamba_t_3x": ("tiny", 36, "49.3", "43.8"),
    "mask_rcnn_spatial_mamba_s_3x": ("small", 36, "50.5", "44.6"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, root):
    variant, epochs, box_ap, mask_ap = RECIPES[name]
    path = root / "configs" / f"{name}.yaml"
    cfg = load_config(path)
    per_epoch = 7330
    drops = {12: (8, 11), 36: (27, 33)}[epochs]
    assert cfg.MODEL.SPATIAL_MAMBA.VARIANT == variant
    assert cfg.SOLVER.MAX_ITER == epochs * per_epoch
    assert cfg.SOLVER.STEPS == tuple(epoch * per_epoch for epoch in drops)
    assert cfg.INPUT.RESIZE_CROP.ENABLED == (epochs == 36)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (1e-4, 0.05)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR) == (1000, 0.001)
    assert cfg.SOLVER.IMS_PER_BATCH == 16 and not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    text = path.read_text()
    assert f"tools/train_net.py --config-file configs/{name}.yaml" in text
    assert f"box AP {box_ap}, mask AP {mask_ap}" in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
        ("MODEL.SPATIALMAMBA.VARIANT", "MODEL.SPATIAL_MAMBA.VARIANT"),
        ("SOLVR.MAX_ITER", "SOLVER.MAX_ITER"),
        ("MAX_ITER", "SOLVER.MAX_ITER"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=f"unknown config key {key}; the nearest .* is {nearest}"):
        load_config(None, [key, "1"])


def test_unknown_key_in_a_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("SOLVER:\n  BASE_RL: 0.1\n")
    with pytest.raises(ValueError, match=r"my.yaml: unknown config key SOLVER.BASE_RL; .*BASE_LR"):
        load_config(path)


def test_config_file_cannot_run_code(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "evil.yaml"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.system ["touch {marker}"]\n')
    with pytest.raises(ValueError, match="evil.yaml: not plain YAML: .*python/object/apply"):
        load_config(path)
    assert not marker.exists()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.MAX_ITER"], "KEY VALUE pairs, got 1 words: SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER", "many"], "Type mismatch.*SOLVER.MAX_ITER"),
        (["DATASETS.ON_ERROR", "ignore"], "ON_ERROR must be one of raise, skip, got 'ignore'"),
        (["SOLVER.AMP.PRECISION", "int8"], "PRECISION must be one of bfloat16, float16, got"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "sum"], "CLIP_TYPE must be one of full_model, norm"),
        (["DATALOADER.SAMPLER_TRAIN", "Other"], "SAMPLER_TRAIN must be one of TrainingSampler"),
        (["SOLVER.ACCUMULATION_STEPS", "0"], "ACCUMULATION_STEPS must be at least 1, got 0"),
        (["DATASETS.TRAIN_JSON", "a.json"], "TRAIN_JSON and DATASETS.TRAIN_IMAGES must be given"),
        (
            ["MODEL.SPATIAL_MAMBA.BN", "sync", "MODEL.DEVICE", "cpu"],
            "BN must be train or frozen on a CPU",
        ),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
