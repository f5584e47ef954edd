"""Loggers by name: each number once, the same run after a resume, and no failure ends a run."""

from __future__ import annotations

import csv
import sys
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.loggers import build_logger
from spatial_mamba_d2.detection.train import run
from spatial_mamba_d2.training import loggers


def write_three(writer):
    """Two iterations of one number, and a score after the second; written twice at the end."""
    with EventStorage() as storage:
        for iteration in range(2):
            storage.iter = iteration
            storage.put_scalar("loss", 1.0 + iteration, smoothing_hint=False)
            if iteration:
                storage.put_scalar("bbox/AP", 40.0, smoothing_hint=False)
            writer.write()
        writer.write()
    writer.close()


def test_csv_has_each_number_once_and_is_continued(make_cfg, tmp_path):
    cfg = make_cfg()
    (tmp_path / "output").mkdir()
    for _ in range(2):
        write_three(build_logger("csv", cfg, 20))
    rows = list(csv.reader((tmp_path / "output/metrics.csv").open()))
    numbers = [["0", "loss", "1.0"], ["1", "loss", "2.0"], ["1", "bbox/AP", "40.0"]]
    assert rows == [["iteration", "name", "value"], *numbers, *numbers]


@pytest.mark.parametrize("method", ["__init__", "log", "close"])
def test_a_logger_that_fails_is_switched_off(method, root, arguments, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    class Failing:
        def __init__(self, cfg):
            pass

        def log(self, numbers, iteration):
            pass

        def close(self):
            pass

    setattr(Failing, method, fail)
    monkeypatch.setitem(loggers.LOGS, "failing", Failing)
    config = str(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml")
    words = ("SOLVER.LOGGERS", ("failing", "csv"), "SOLVER.MAX_ITER", 2, "DATASETS.TEST_JSON", "",
             "DATASETS.TEST_IMAGES", "", "DATASETS.TEST", ())  # fmt: skip
    run(arguments(*words, config_file=config))
    text = (tmp_path / "output/log.txt").read_text()
    assert text.count("SOLVER.LOGGERS: failing has failed and is switched off: ConnectionErr") == 1
    assert (tmp_path / "output/model_final.pth").is_file()
    assert ",total_loss," in (tmp_path / "output/metrics.csv").read_text()
    assert not list((tmp_path / "output").glob("events.*"))


def test_unknown_and_missing_loggers_are_named(monkeypatch):
    with pytest.raises(ValueError, match="SOLVER.LOGGERS must be among .*, got comet"):
        load_config(None, ["SOLVER.LOGGERS", "('comet',)"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"LOGGERS wandb needs .*'spatial-mamba-d2\[loggers\]'"):
        load_config(None, ["SOLVER.LOGGERS", "('wandb',)"])


def test_wandb_gets_the_run(make_cfg, tmp_path, monkeypatch):
    """Its interface, in place of the service."""
    logged, started = [], []

    def init(**settings):
        started.append(settings)
        return SimpleNamespace(
            log=lambda numbers, step: logged.append((step, numbers)),
            finish=lambda: logged.append("finished"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    cfg = make_cfg()
    (tmp_path / "output").mkdir()
    for _ in range(2):
        write_three(build_logger("wandb", cfg, 20))
    assert logged[:3] == [(0, {"loss": 1.0}), (1, {"loss": 2.0, "bbox/AP": 40.0}), "finished"]
    assert started[0]["id"] == started[1]["id"]
    assert started[1]["resume"] == "allow" and started[0]["config"]["SOLVER"]["MAX_ITER"] == 6


def test_wandb_itself_offline(make_cfg, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "output").mkdir()
    writer = build_logger("wandb", make_cfg(), 20)
    assert writer.writer.target is not None
    write_three(writer)
    assert list((tmp_path / "output/wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_itself(make_cfg, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "output").mkdir()
    for _ in range(2):
        writer = build_logger("mlflow", make_cfg(), 20)
        assert writer.writer.target is not None
        write_three(writer)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(loggers.PROJECT)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"loss": 2.0, "bbox/AP": 40.0}
    assert found.data.params["SOLVER.MAX_ITER"] == "6"
    steps = [m.step for m in client.get_metric_history(found.info.run_id, "loss")]
    assert sorted(steps) == [0, 0, 1, 1]
