"""Devices are named as PyTorch names them, and are here."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2.system.devices import check_device, check_device_name


@pytest.mark.parametrize(
    ("device", "num_gpus", "message"),
    [
        ("bogus", 2, "--device must be cpu, cuda or cuda:N, got 'bogus'"),
        ("cuda:", 2, "--device must be cpu, cuda or cuda:N, got 'cuda:'"),
        ("cuda", 0, "--device must be cpu, because no GPU can be used here, got 'cuda'"),
        ("cuda:2", 2, "--device must name one of the 2 GPUs, got 'cuda:2'"),
        ("cuda:1", 2, None),
        ("cuda", 1, None),
        ("cpu", 0, None),
    ],
)
def test_devices(monkeypatch, device, num_gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    if message is None:
        check_device(device, "--device")
        check_device_name(device, "--device")
        return
    with pytest.raises(ValueError, match=message):
        check_device(device, "--device")
