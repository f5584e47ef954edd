"""Counts of operators, FLOPs and memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spatial_mamba_d2.profiling.counting import count_operators
from spatial_mamba_d2.profiling.memory import saved_bytes


def test_memory_of_a_model_that_can_be_counted_by_hand():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to("meta")
    image = torch.empty(1, 4, device="meta")
    counts, peak_bytes = count_operators(model, lambda: model(image), complete=True)
    assert peak_bytes == 4 * (8 + 8)  # before and after the ReLU; no parameters
    assert sum(flops for _, flops in counts.values()) == 4 * 8 + 8 + 8 * 2
    assert saved_bytes(model, lambda: model(image)) == 4 * (4 + 8)


def test_an_operator_without_a_rule_is_an_error():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.erfinv(x)

    model, x = Odd(), torch.zeros(1)
    with pytest.raises(NotImplementedError, match="no rule counts the operator erfinv"):
        count_operators(model, lambda: model(x), complete=True)
