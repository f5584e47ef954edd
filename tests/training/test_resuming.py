"""Resuming with other settings: the differing keys, and the learning rate of the new schedule."""

from __future__ import annotations

import pytest
import torch
from fvcore.common.config import CfgNode
from timm.scheduler import CosineLRScheduler
from torch import nn

pytest.importorskip("lightning", reason="Lightning is not installed")

from spatial_mamba_d2.segmentation.module import learning_rate_factor
from spatial_mamba_d2.training.resuming import (
    ConfiguredSchedule,
    differing_keys,
    require_iterations_left,
    require_same_network,
    tell_differences,
)


def torch_schedule(base_rate, max_iter, decay=0.01):
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), base_rate, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: learning_rate_factor(i, 2, 0.1, max_iter)
    )
    return optimizer, scheduler, scheduler.step


def timm_schedule(base_rate, max_iter, decay=0.01):
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), base_rate, weight_decay=decay)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=max_iter - 2, lr_min=1e-5, warmup_lr_init=1e-4, warmup_t=2,
        warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    steps = iter(range(1, max_iter + 1))
    return optimizer, scheduler, lambda: scheduler.step_update(next(steps))


def detectron2_schedule(base_rate, max_iter, decay=0.01):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.solver import build_lr_scheduler

    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = max_iter, (), 2
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.BASE_LR = base_rate
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), base_rate, weight_decay=decay)
    scheduler = build_lr_scheduler(cfg, optimizer)
    return optimizer, scheduler, scheduler.step


SCHEDULES = [torch_schedule, timm_schedule, detectron2_schedule]


def rates(build, *args, num=0):
    """The rate of each iteration of a training that is not interrupted."""
    optimizer, _, step = build(*args)
    values = []
    for _ in range(num):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        step()
    return values


@pytest.mark.parametrize("build", SCHEDULES)
@pytest.mark.parametrize(("base_rate", "max_iter"), [(0.01, 8), (0.01, 16), (0.002, 8)])
def test_the_rate_is_that_of_the_new_schedule(build, base_rate, max_iter, caplog):
    """After 5 of 8 iterations at 0.01: the same, a longer one, a lower one."""
    optimizer, scheduler, step = build(0.01, 8)
    for _ in range(5):
        optimizer.step()
        step()
    saved = optimizer.state_dict(), scheduler.state_dict()
    before = optimizer.param_groups[0]["lr"]

    optimizer, scheduler, step = build(base_rate, max_iter, 0.05)
    configured = ConfiguredSchedule(optimizer, scheduler)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    with caplog.at_level("INFO"):
        configured.restore(5)
    expected = rates(build, base_rate, max_iter, num=max_iter)
    if build is not timm_schedule:
        continued = []
        for _ in range(5, max_iter):
            continued.append(optimizer.param_groups[0]["lr"])
            step()
        assert continued == pytest.approx(expected[5:])
        assert min(continued) >= 0
    else:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[5])
        scheduler.step_update(6)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[6])
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    changed = (base_rate, max_iter) != (0.01, 8)
    told = f"learning rate at iteration 5: {before:.6g}" + (" by the run so far" * changed)
    assert told in caplog.text
    assert (f"{expected[5]:.6g} by the settings of now" in caplog.text) == changed


def test_the_rate_of_segmentation_is_never_below_0():
    assert [learning_rate_factor(i, 1, 0.1, 4) for i in (3, 4, 5)] == [0, 0, 0]


@pytest.fixture
def config():
    solver = {"BASE_LR": 0.1, "STEPS": (3, 4), "IMS_PER_BATCH": 2}
    return CfgNode({
        "SOLVER": CfgNode(solver), "OUTPUT_DIR": "here", "MODEL": CfgNode({"WIDTH": 4}),
    })  # fmt: skip


def test_differing_keys_and_their_effects(config, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(config.dump())
    assert differing_keys(tmp_path, config) == {}
    config.SOLVER.BASE_LR, config.SOLVER.STEPS, config.OUTPUT_DIR = 0.2, (3,), "there"
    config.SOLVER.IMS_PER_BATCH = 4
    config.NEW_KEY = 1  # of a later version
    found = differing_keys(tmp_path, config)
    assert found == {
        "SOLVER.BASE_LR": (0.1, 0.2), "SOLVER.STEPS": ([3, 4], [3]),
        "OUTPUT_DIR": ("here", "there"), "SOLVER.IMS_PER_BATCH": (2, 4),
    }  # fmt: skip
    tell_differences(found, tmp_path)
    assert "SOLVER.BASE_LR: 0.1 -> 0.2: counts from here on: the learning rate is" in caplog.text
    assert "SOLVER.IMS_PER_BATCH: 2 -> 4: counts from here on: the stream of images" in caplog.text
    assert "OUTPUT_DIR" not in caplog.text.replace(str(tmp_path), "")


def test_a_record_that_cannot_be_read_is_told(config, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("SOLVER: [")
    assert differing_keys(tmp_path, config) == {}
    assert "config.yaml cannot be read" in caplog.text


def test_another_network_is_refused_by_its_keys():
    differences = {"MODEL.WIDTH": (4, 8), "MODEL.WEIGHTS": ("a", "b"), "SOLVER.BASE_LR": (1, 2)}
    state = nn.Linear(4, 4).state_dict()
    require_same_network(state, nn.Linear(4, 4), differences, "last.ckpt", num_trained=(2, 2))
    message = r"last.ckpt is of another network: 2 .*such as weight \(\(4, 4\) there, \(8, 8\) now"
    with pytest.raises(ValueError, match=message + r"\). MODEL.WIDTH was 4, is 8\. Use the run's"):
        require_same_network(state, nn.Linear(8, 8), differences, "last.ckpt")
    with pytest.raises(ValueError, match="2 parameters were trained, 1 are now"):
        require_same_network(state, nn.Linear(4, 4), {}, "last.ckpt", num_trained=(2, 1))
    with pytest.raises(ValueError, match=r"such as bias \(\(4,\) there, absent now\)"):
        require_same_network(state, nn.Linear(4, 4, bias=False), {}, "last.ckpt")


def test_a_shorter_training_is_refused():
    require_iterations_left(5, 5, "SOLVER.MAX_ITER", "last.ckpt")
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER must be at least the 6 .*got 5"):
        require_iterations_left(6, 5, "SOLVER.MAX_ITER", "last.ckpt")
