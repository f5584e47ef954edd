"""The choice between PyTorch's two libraries for matrix products."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2.system import matrix_rates


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Sets what is measured, and returns the list of threads' settings at each measurement."""
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path))
    calls = []

    def set_ratio(ratio):
        matrix_rates.linear_layers_keep_up.cache_clear()

        def measure():
            calls.append(ratio)
            return ratio

        monkeypatch.setattr(matrix_rates, "_ratio", measure)
        return calls

    yield set_ratio
    matrix_rates.linear_layers_keep_up.cache_clear()


@pytest.mark.parametrize(("ratio", "expected"), [(0.45, False), (1.05, True)])
def test_the_faster_library_is_remembered(measured, ratio, expected):
    calls = measured(ratio)
    assert [matrix_rates.linear_layers_keep_up() for _ in range(2)] == [expected] * 2
    measured(0.45 if expected else 1.05)  # as another process would measure on a busy machine
    assert matrix_rates.linear_layers_keep_up() is expected
    assert calls == [ratio]


def test_the_measurement_knows_nothing_of_the_thread_that_asks(monkeypatch):
    """Under autocast both would be in bfloat16, and a counter of FLOPs would count them."""
    seen = []
    linear = torch.nn.functional.linear

    def watched(x, weight):
        y = linear(x, weight)
        seen.append((y.dtype, y.device.type, y.requires_grad, torch.is_grad_enabled()))
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    generator = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert 0.01 < matrix_rates._measure() < 100
    assert set(seen) == {(torch.float32, "cpu", False, False)}
    assert torch.equal(torch.get_rng_state(), generator)


def test_without_onednn(monkeypatch, measured):
    calls = measured(0.1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert matrix_rates.linear_layers_keep_up() and not calls
