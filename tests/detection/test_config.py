"""Configuration: recipes as published, typos explained."""

from __future__ import annotations

import pytest
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from spatial_mamba_d2.detection.config import add_spatial_mamba_config, load_config

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
        (["SOLVER.STEPS", "(20, 10)"], r"SOLVER.STEPS must be ascending, got \(20, 10\)"),
        (["SOLVER.STEPS", "(10, 10)"], r"SOLVER.STEPS must be ascending, got \(10, 10\)"),
        (["SOLVER.STEPS", "(0, 10)"], r"SOLVER.STEPS must be above 0, got \(0, 10\)"),
        (["SOLVER.GAMMA", "0"], r"SOLVER.GAMMA must be in \(0, 1\], got 0.0"),
        (["SOLVER.GAMMA", "1.5"], r"SOLVER.GAMMA must be in \(0, 1\], got 1.5"),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "LR_SCHEDULER_NAME must be one of WarmupMulti"),
        (["SOLVER.WARMUP_METHOD", "exp"], "WARMUP_METHOD must be one of linear, constant, got"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], "MIN_SIZE_TRAIN must be at least one side"),
        (["INPUT.MIN_SIZE_TRAIN", "0"], r"MIN_SIZE_TRAIN must be above 0, got \(0,\)"),
        (["INPUT.MIN_SIZE_TRAIN", "(48.5,)"], "MIN_SIZE_TRAIN must be whole numbers, got"),
        (["INPUT.MAX_SIZE_TRAIN", "0"], "MAX_SIZE_TRAIN must be above 0, got 0"),
        (["INPUT.MIN_SIZE_TEST", "-1"], "MIN_SIZE_TEST must be at least 0, got -1"),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(800, 480)"],
            r"MIN_SIZE_TRAIN must be \(low, high\)",
        ),
        (["INPUT.MASK_FORMAT", "rle"], "MASK_FORMAT must be one of polygon, bitmask, got 'rle'"),
        (["INPUT.RESIZE_CROP.CROP_RANGE", "(600, 384)"], "CROP_RANGE must be .low, high., both"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "0"], "NUM_CLASSES must be at least 1, got 0"),
        (["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "5"], r"must be in \[0, 1\], got 5.0"),
        (["MODEL.ROI_HEADS.NAME", "Heads"], "ROI_HEADS.NAME must be one of .*StandardROIHeads"),
        (["MODEL.META_ARCHITECTURE", "RCNN"], "META_ARCHITECTURE must be one of .*GeneralizedRCNN"),
        (
            ["MODEL.BACKBONE.NAME", "mamba"],
            "must be one of .*build_spatial_mamba_fpn_backbone",
        ),
        (
            ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 0]]"],
            r"SIZES must be above 0, got .*32, 0",
        ),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "32"], r"SIZES must be a list such as .*got '32'"),
        (["MODEL.RPN.POSITIVE_FRACTION", "0"], r"POSITIVE_FRACTION must be in \(0, 1\], got 0.0"),
        (["TEST.DETECTIONS_PER_IMAGE", "0"], "DETECTIONS_PER_IMAGE must be at least 1, got 0"),
        (["TEST.PICTURES_SCORE_THRESH", "50"], r"must be in \[0, 1\], got 50.0"),
        (["MODEL.FPN.NORM", "Batch"], "MODEL.FPN.NORM must be one of .*FrozenBN.*got 'Batch'"),
        (["MODEL.RPN.HEAD_NAME", "Head"], "RPN.HEAD_NAME must be one of .*StandardRPNHead"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "Max"], "POOLER_TYPE must be one of ROIAlign, "),
        (["INPUT.CROP.TYPE", "bogus"], "INPUT.CROP.TYPE must be one of relative, .*got 'bogus'"),
        (["INPUT.CROP.SIZE", "[0, 0.5]"], r"CROP.SIZE must be in \(0, 1\], got \[0.0, 0.5\]"),
        (["INPUT.CROP.SIZE", "[0.5]"], r"CROP.SIZE must have 2 elements, got \[0.5\]"),
        (
            ["INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[0.9, 64]"],
            "CROP.SIZE must be whole numbers above 0 for absolute, got",
        ),
        (
            ["INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", "[64, 32]"],
            r"CROP.SIZE must be \(low, high\)",
        ),
        (
            ["MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]"],
            r"RPN.IOU_THRESHOLDS must be ascending and above 0, got \[0.7, 0.3\]",
        ),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", "[]"], r"ROI_HEADS.IOU_THRESHOLDS must .*got \[\]"),
        (
            ["MODEL.RPN.IOU_LABELS", "[0, 1]"],
            r"RPN.IOU_LABELS must be one more than .*THRESHOLDS, 3, .*got \[0, 1\]",
        ),
        (["MODEL.RPN.IOU_LABELS", "[0, 2, 1]"], r"IOU_LABELS .*got \[0, 2, 1\]"),
        (
            ["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "100"],
            "FPN.OUT_CHANNELS must be a multiple of 32, the groups of MODEL.FPN.NORM GN, got 100",
        ),
        (
            ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()"],
            "TEST.AUG.MIN_SIZES must be at least one side in pixels, got none",
        ),
        (["TEST.AUG.MIN_SIZES", "(0,)"], r"TEST.AUG.MIN_SIZES must be above 0, got \(0,\)"),
        (["TEST.PRECISE_BN.NUM_ITER", "0"], "PRECISE_BN.NUM_ITER must be at least 1, got 0"),
        (["VIS_PERIOD", "-3"], "VIS_PERIOD must be at least 0, got -3"),
        (
            ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", ""],
            "ROI_MASK_HEAD.NAME must be one of .*MaskRCNNConvUpsampleHead",
        ),
        (["VERSION", "1"], "VERSION must be one of 2, got 1"),
        (["DATASETS.TRAIN_JSON", "a.json"], "TRAIN_JSON and DATASETS.TRAIN_IMAGES must be given"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["MODEL.FPN.IN_FEATURES", "['res2', 'res4']"],
            "FPN.IN_FEATURES must be .* or the last ones",
        ),
        (["MODEL.FPN.IN_FEATURES", "['c2']"], "FPN.IN_FEATURES must be .*got .'c2'."),
        (["MODEL.RPN.IN_FEATURES", "['p2', 'p7']"], "must be among p2, p3, p4, p5, p6, .*got p7"),
        (["MODEL.ROI_HEADS.IN_FEATURES", "['res4']"], "ROI_HEADS.IN_FEATURES must be among p2"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"], "must be one list or 5, one for .*got 2"),
        (
            ["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64], [128, 256]]"],
            r"same number of anchors, at least 1, got \[3, 3, 3, 3, 6\]",
        ),
        (["MODEL.RPN.IN_FEATURES", "[]"], "RPN.IN_FEATURES must be at least one, got none"),
        (
            ["MODEL.SPATIAL_MAMBA.OUT_FEATURES", "['res4', 'res5']"],
            "OUT_FEATURES must have res2, res3 of MODEL.FPN.IN_FEATURES",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.IN_FEATURES", "['p7']"],
            "RPN.IN_FEATURES must be among p2, p3, p4, p5, p6, .*got p7",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", "False"],
            "RETINANET.IN_FEATURES must be among p2, p3, p4, p5, p6, .*got p7",
        ),
        (
            [
                "MODEL.META_ARCHITECTURE",
                "RetinaNet",
                "MODEL.MASK_ON",
                "False",
                "MODEL.RETINANET.IN_FEATURES",
                "['p4', 'p5', 'p6']",
            ],
            "SIZES must be one list or 3, one for each of MODEL.RETINANET.IN_FEATURES, got 5",
        ),
    ],
)
def test_names_of_feature_maps(overrides, message, root):
    with pytest.raises(ValueError, match=message):
        load_config(root / "configs/mask_rcnn_spatial_mamba_t.yaml", overrides)


def test_a_retinanet_of_our_pyramid(root):
    """What the checks accept can be built."""
    words = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", "False", "MODEL.DEVICE",
             "cpu", "MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5', 'p6']",
             "MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64], [128], [256]]",
             "MODEL.RETINANET.NORM", "GN"]  # fmt: skip
    cfg = load_config(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml", words)
    model = build_model(cfg)
    assert list(model.head_in_features) == ["p3", "p4", "p5", "p6"]
    assert model.head.cls_score.out_channels == 3 * 80


def test_keys_of_the_mask_head_count_with_masks_only():
    words = ["MODEL.ROI_MASK_HEAD.NAME", "", "MODEL.ROI_MASK_HEAD.CONV_DIM", "0"]
    assert load_config(None, words).MODEL.ROI_MASK_HEAD.NAME == ""


def test_sides_of_anchors_may_be_fractions():
    cfg = load_config(None, ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32.5, 64.0]]"])
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32.5, 64]]


@pytest.mark.parametrize("source", ["recipe", "config.yaml of a training"])
def test_a_script_of_detectron2_reads_our_files(source, root, tmp_path):
    """With its own ``merge_from_file``, after ``add_spatial_mamba_config``."""
    paths = sorted((root / "configs").glob("*mask_rcnn*.yaml"))
    assert len(paths) == 9
    for path in paths:
        ours = load_config(path, ["MODEL.WEIGHTS_SKIP", "('a', 'b')"])
        if source != "recipe":
            path = tmp_path / "config.yaml"
            path.write_text(ours.dump())
        cfg = get_cfg()
        add_spatial_mamba_config(cfg)
        cfg.merge_from_file(str(path))
        assert cfg.MODEL.SPATIAL_MAMBA == ours.MODEL.SPATIAL_MAMBA
        assert cfg.SOLVER.BETAS == (0.9, 0.999) and cfg.SOLVER.STEPS == ours.SOLVER.STEPS
        assert cfg.INPUT.RESIZE_CROP == ours.INPUT.RESIZE_CROP
        assert load_config(path).MODEL.RPN == ours.MODEL.RPN


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
