"""What holds for the configuration of every task: keys that are shared, typos, the fallback."""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spatial_mamba_d2.config import check_processes, merge_config

NEEDS = {"detection": "detectron2", "segmentation": "lightning", "classification": "lightning"}


@pytest.fixture(params=NEEDS)
def load_config(request):
    """``load_config`` of each task."""
    pytest.importorskip(NEEDS[request.param], reason=f"{NEEDS[request.param]} is not installed")
    return importlib.import_module(f"spatial_mamba_d2.{request.param}.config").load_config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL.SPATIAL_MAMBA.VARIANT", "tinny"), "VARIANT must be one of tiny, small, base, got"),
        (("MODEL.SPATIAL_MAMBA.BN", "batch"), "BN must be one of train, frozen, sync, got 'batch'"),
        (("MODEL.DEVICE", "gpu"), "MODEL.DEVICE must be cpu, cuda or cuda:N, got 'gpu'"),
        (("DATASETS.ON_ERROR", "ignore"), "ON_ERROR must be one of raise, skip, got 'ignore'"),
        (("SOLVER.AMP.PRECISION", "int8"), "PRECISION must be one of bfloat16, float16, got"),
        (("SOLVER.IMS_PER_BATCH", "0"), "SOLVER.IMS_PER_BATCH must be at least 1, got 0"),
        (("SOLVER.ACCUMULATION_STEPS", "0"), "ACCUMULATION_STEPS must be at least 1, got 0"),
        (("DATALOADER.NUM_WORKERS", "-1"), "DATALOADER.NUM_WORKERS must be at least 0, got -1"),
        (("SOLVER.BASE_LR", "-0.1"), "SOLVER.BASE_LR must be above 0, got -0.1"),
        (("SOLVER.BASE_LR", "0"), "SOLVER.BASE_LR must be above 0, got 0.0"),
        (("SOLVER.WEIGHT_DECAY", "-1"), "SOLVER.WEIGHT_DECAY must be at least 0, got -1.0"),
        (("SOLVER.BETAS", "(0.9, 1.0)"), r"SOLVER.BETAS must be in \[0, 1\), got \(0.9, 1.0\)"),
        (("SOLVER.BETAS", "0.9"), r"SOLVER.BETAS must have 2 elements, got \(0.9,\)"),
        (("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0"), "CLIP_VALUE must be above 0, got 0.0"),
        (("MODEL.PIXEL_STD", "(1, 0, 1)"), "MODEL.PIXEL_STD must be above 0, got .1.0, 0.0, 1.0"),
        (("MODEL.PIXEL_MEAN", "(1, 0)"), "MODEL.PIXEL_MEAN must have 3 elements, got"),
        (("MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", "1"), r"PATH_RATE must be in \[0, 1\), got 1.0"),
        (("SEED", "4294967296"), "SEED must be in .*4294967295.*got 4294967296"),
        (("OUTPUT_DIR", ""), "OUTPUT_DIR must be a folder, got ''"),
        (("OUTPUT_DIR", " "), "OUTPUT_DIR must be a folder, got ' '"),
        (
            ("OUTPUT_DIR", f"{__file__}/run"),
            r"OUTPUT_DIR must be a folder, .*config.py is a file",
        ),
        (("SOLVER.BASE_LR=1",), "KEY VALUE pairs, got 1 words: SOLVER.BASE_LR=1"),
        (("SOLVER.BASE_LR=1", "SEED=2"), "SOLVER.BASE_LR=1; write KEY VALUE, not KEY=VALUE"),
        (
            ("SOLVER.BASE_LR", "fast"),
            "SOLVER.BASE_LR must be a number such as .*, got 'fast'",
        ),
        (
            ("SOLVER.IMS_PER_BATCH", "2.5"),
            "must be a whole number such as .*got '2.5'",
        ),
        (("SOLVER.AMP.ENABLED", "maybe"), "AMP.ENABLED must be True or False, got 'maybe'"),
        (
            ("SOLVER.BETAS", "(0.9, 0.9"),
            "BETAS must be a list such as .*, 0.999.*got '.0.9, 0.9'",
        ),
        (("SOLVER", "1"), "SOLVER must be a section with keys such as .*, got '1'"),
        (("SEED.VALUE", "1"), "SEED must be a value, got a section with SEED.VALUE"),
        (("SOLVER.WEIGHT_DECAY",), "KEY VALUE pairs, got 1 words: SOLVER.WEIGHT_DECAY"),
        (("SOLVER.IMS_PER_BATCH", "many"), "IMS_PER_BATCH must be a whole number such as"),
        (("INPUT.PIXEL_RANGE", "(5, 5)"), r"INPUT.PIXEL_RANGE must be \(\) or \(low, high\)"),
        (("INPUT.PIXEL_RANGE", "(0, 1, 2)"), r"INPUT.PIXEL_RANGE must be \(\) or \(low, high\)"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_shared_key_has_one_rule(load_config, words, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("SOLVER.MAX_ITER", "0"), "SOLVER.MAX_ITER must be at least 1, got 0"),
        (("SOLVER.WARMUP_FACTOR", "2"), r"SOLVER.WARMUP_FACTOR must be in \[0, 1\], got 2.0"),
        (("TEST.PICTURES", "-1"), "TEST.PICTURES must be at least 0, got -1"),
        (("TEST.EVAL_PERIOD", "-5"), "TEST.EVAL_PERIOD must be at least 0, got -5"),
        (("SOLVER.EMA_DECAY", "1.0"), r"SOLVER.EMA_DECAY must be in \[0, 1\), got 1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_key_of_some_tasks_has_one_rule(load_config, words, message):
    try:
        load_config(None, (words[0], "1" if "EMA" not in words[0] else "0.5"))
    except ValueError as error:
        assert "unknown config key" in str(error)  # this task does not have it
        return
    with pytest.raises(ValueError, match=message):
        load_config(None, words)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
        ("MODEL.SPATIALMAMBA.VARIANT", "MODEL.SPATIAL_MAMBA.VARIANT"),
        ("IMS_PER_BATCH", "(SOLVER|TEST).IMS_PER_BATCH"),
    ],
)
def test_an_unknown_key_names_the_nearest(load_config, key, nearest):
    with pytest.raises(ValueError, match=f"unknown config key {key}; the nearest .* is {nearest}"):
        load_config(None, [key, "1"])


@pytest.mark.parametrize("value", ["nan", "-inf", "1e999"])
def test_no_number_may_be_infinite_or_nan(load_config, value):
    """In every key that is a number, or whose first element is one."""

    def words(section, prefix=""):
        for key, default in section.items():
            if isinstance(default, dict):
                yield from words(default, f"{prefix}{key}.")
            elif isinstance(default, float):
                yield f"{prefix}{key}", value
            elif isinstance(default, (tuple, list)) and default and isinstance(default[0], float):
                yield f"{prefix}{key}", str([float(value), *default[1:]]).replace("inf", "1e999")

    keys = [pair for pair in words(load_config(None)) if "nan" not in pair[1] or pair[1] == "nan"]
    assert len(keys) >= 8
    for key, word in keys:
        if key == "SOLVER.CLIP_GRADIENTS.NORM_TYPE" and word == "1e999":
            continue  # the norm that is the largest element
        with pytest.raises(ValueError, match=rf"{re.escape(key)} must be (finite|above 0), got"):
            load_config(None, [key, word])


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.IMS_PER_BATCH", "1e3", 1000),
        ("SOLVER.IMS_PER_BATCH", "16.0", 16),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "true", True),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "no", False),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "1", True),
        ("SOLVER.BETAS", "[0, 0.9]", (0.0, 0.9)),
        ("SOLVER.BETAS", "0.5, 0.9", (0.5, 0.9)),
        ("MODEL.WEIGHTS_SKIP", "head.", ("head.",)),
        ("MODEL.WEIGHTS_SKIP", "('a', 'b')", ("a", "b")),
        ("OUTPUT_DIR", "2024", "2024"),
        ("OUTPUT_DIR", "'out put'", "out put"),
        ("OUTPUT_DIR", "1e3", "1e3"),
        ("MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", "0", 0.0),
        ("MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", "None", None),
    ],
)
def test_a_value_with_one_meaning_is_taken(load_config, tmp_path, key, word, value):
    cfg = load_config(None, [key, word])
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value and type(cfg) is type(value)


def test_words_in_a_file_mean_the_same(load_config, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "SOLVER: {BASE_LR: 1e-3, IMS_PER_BATCH: 1e3, BETAS: [0, 0.9]}\n"
        "MODEL: {WEIGHTS_SKIP: head., SPATIAL_MAMBA: {DROP_PATH_RATE: 0, BN: 'train'}}\n"
        "DATASETS: {ON_ERROR: skip}\n"
    )
    cfg = load_config(path)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (0.001, 1000)
    assert cfg.SOLVER.BETAS == (0.0, 0.9) and cfg.DATASETS.ON_ERROR == "skip"
    assert cfg.MODEL.WEIGHTS_SKIP == ("head.",)
    assert cfg.MODEL.SPATIAL_MAMBA.DROP_PATH_RATE == 0.0


def test_a_warmup_that_never_ends_is_told(caplog):
    pytest.importorskip("lightning")
    from spatial_mamba_d2.segmentation.config import load_config

    load_config(None, ["SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "4"])
    assert "SOLVER.WARMUP_ITERS 4 is not below SOLVER.MAX_ITER 4" in caplog.text


def test_a_key_of_several_types():
    types = {"FILES": (tuple,)}
    for word, value in [
        ("a.json", "a.json"),
        ("('a.json', 'b.json')", ("a.json", "b.json")),
        ("[a.json", None),
        (["a.json"], ("a.json",)),
        (3, None),
    ]:
        cfg = {"FILES": ""}
        if value is None and not isinstance(word, str):
            with pytest.raises(ValueError, match="FILES must be text or a list, got 3"):
                merge_config(cfg, None, ["FILES", word], types)
        else:
            merge_config(cfg, None, ["FILES", word], types)
            assert cfg["FILES"] == (word if value is None else value)


def test_an_unknown_key_in_a_file(load_config, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("SOLVER:\n  BASE_RL: 0.1\n")
    with pytest.raises(ValueError, match=r"my.yaml: unknown config key SOLVER.BASE_RL; .*BASE_LR"):
        load_config(path)


def test_a_file_cannot_run_code(load_config, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "evil.yaml"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.system ["touch {marker}"]\n')
    with pytest.raises(ValueError, match="evil.yaml: not plain YAML: .*python/object/apply"):
        load_config(path)
    assert not marker.exists()


def test_a_missing_file(load_config):
    with pytest.raises(FileNotFoundError, match=f"no such file: {Path('absent.yaml').absolute()}"):
        load_config(Path("absent.yaml"))


@pytest.mark.parametrize(
    ("task", "key", "name"),
    [
        ("segmentation", "DATASETS.ROOT", "ade"),
        ("classification", "DATASETS.ROOT", "imagenet"),
        ("detection", "DATASETS.TRAIN_IMAGES", "coco/train2017"),
        ("detection", "DATASETS.TEST_JSON", "coco/instances.json"),
    ],
)
def test_data_sets_are_found_where_detectron2_looks(task, key, name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[task], reason=f"{NEEDS[task]} is not installed")
    load_config = importlib.import_module(f"spatial_mamba_d2.{task}.config").load_config
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "all"))
    (tmp_path / "all" / name).mkdir(parents=True)
    section, leaf = key.split(".")
    other = key.replace("JSON", "IMAGES") if "JSON" in key else key.replace("IMAGES", "JSON")
    words = [key, f"datasets/{name}", *(() if other == key else (other, "x"))]

    def found() -> str:
        return load_config(None, words)[section][leaf]

    assert found() == str(tmp_path / "all" / name)
    Path("datasets", name).mkdir(parents=True)  # what is here comes first
    assert found() == f"datasets/{name}"
    words[1] = f"other/{name}"
    assert found() == f"other/{name}"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    words[1] = "datasets/absent"
    assert found() == "datasets/absent"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_fallback_without_a_gpu(load_config, monkeypatch, caplog, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "spatial_mamba_d2"):
        cfg = load_config(
            None,
            ["MODEL.DEVICE", device, "MODEL.SPATIAL_MAMBA.BN", "sync",
             "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16"],
        )  # fmt: skip
    assert cfg.is_frozen()
    assert (cfg.MODEL.DEVICE, cfg.MODEL.SPATIAL_MAMBA.BN) == ("cpu", "train")
    assert not cfg.SOLVER.AMP.ENABLED
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no CUDA device",
        "PyTorch has no SyncBN on a CPU",
        "float16 is slow on a CPU",
    ]


def test_gpus_keep_their_settings(load_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["MODEL.DEVICE", "cuda:1", "MODEL.SPATIAL_MAMBA.BN", "sync"]
    cfg = load_config(None, words)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.SPATIAL_MAMBA.BN) == ("cuda:1", "sync")
    with pytest.raises(ValueError, match="MODEL.DEVICE must name one of the 2 GPUs, got 'cuda:2'"):
        load_config(None, ["MODEL.DEVICE", "cuda:2"])


def test_processes_and_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = SimpleNamespace(MODEL=SimpleNamespace(DEVICE="cuda"))
    check_processes(cfg, 2)
    with pytest.raises(ValueError, match="--num-gpus must be at most 2, the GPUs here, got 3"):
        check_processes(cfg, 3)
    cfg.MODEL.DEVICE = "cuda:1"
    check_processes(cfg, 1)
    with pytest.raises(ValueError, match="MODEL.DEVICE must be cuda or cpu for 2 processes, got"):
        check_processes(cfg, 2)
    cfg.MODEL.DEVICE = "cpu"
    check_processes(cfg, 3)


def test_bfloat16_stays_on_a_cpu(load_config):
    words = [
        "MODEL.DEVICE",
        "cpu",
        "SOLVER.AMP.ENABLED",
        "True",
        "SOLVER.AMP.PRECISION",
        "bfloat16",
    ]
    assert load_config(None, words).SOLVER.AMP.ENABLED
