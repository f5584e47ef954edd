"""What holds for the configuration of every task: keys that are shared, typos, the fallback."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spatial_mamba_d2.config import check_processes

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
        (("SOLVER.WEIGHT_DECAY",), "KEY VALUE pairs, got 1 words: SOLVER.WEIGHT_DECAY"),
        (("SOLVER.IMS_PER_BATCH", "many"), "Type mismatch.*SOLVER.IMS_PER_BATCH"),
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
    with pytest.raises(FileNotFoundError, match="no such file: .*absent.yaml"):
        load_config(Path("absent.yaml"))


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
