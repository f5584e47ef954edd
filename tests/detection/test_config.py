"""Configuration: recipes as published, typos explained."""

from __future__ import annotations

import pytest
from detectron2.data import MetadataCatalog

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
    ("overrides", "message"),
    [
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT must be one of RGB, BGR, got 'L'"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "sum"], "CLIP_TYPE must be one of full_model, norm"),
        (["DATALOADER.SAMPLER_TRAIN", "Other"], "SAMPLER_TRAIN must be one of TrainingSampler"),
        (["DATASETS.TRAIN_JSON", "a.json"], "TRAIN_JSON and DATASETS.TRAIN_IMAGES must be given"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


def test_json_files_become_data_sets_before_the_configuration_is_frozen(tmp_path):
    words = [
        "DATASETS.TRAIN_JSON",
        str(tmp_path / "a.json"),
        "DATASETS.TRAIN_IMAGES",
        str(tmp_path),
    ]
    cfg = load_config(None, words)
    assert cfg.is_frozen()
    (name,) = cfg.DATASETS.TRAIN
    assert MetadataCatalog.get(name).json_file == str(tmp_path / "a.json")
    assert load_config(None, words).DATASETS.TRAIN == (name,)
