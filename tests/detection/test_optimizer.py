"""Weight decay groups as in the official recipe, and gradient clipping."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.optimizer import build_optimizer, clip_gradients
from spatial_mamba_d2.models.checkpoints.names import to_official


def test_groups_equal_the_official_ones(root, golden):
    cfg = load_config(root / "configs/mask_rcnn_spatial_mamba_t.yaml", ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    official = golden("optim_groups_tiny.json")["maskrcnn"]
    names = {id(p): to_official(name) for name, p in model.named_parameters()}
    no_decay = set()
    for group in optimizer.param_groups:
        assert group["lr"] == official["lr"] and list(group["betas"]) == official["betas"]
        if group["weight_decay"] == 0:
            no_decay |= {names[id(p)] for p in group["params"]}
        else:
            assert group["weight_decay"] == official["weight_decay"]
    assert no_decay == set(official["no_decay"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_frozen_parameters_stay_out():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(load_config(None), model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("full_model", [0.6, 0.8]), ("norm", [1.0, 1.0]), ("value", [1.0, 1.0]), (None, [3.0, 4.0])],
)
def test_clipping(kind, expected):
    words = ["SOLVER.CLIP_GRADIENTS.ENABLED", str(kind is not None)]
    if kind:
        words += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind]
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip_gradients(load_config(None, words), parameters)
    assert [p.grad.item() for p in parameters[:2]] == pytest.approx(expected, rel=1e-4)
