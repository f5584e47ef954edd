"""Names of devices, checked before anything is moved to one."""

from __future__ import annotations

import re

import torch


def check_device_name(device: str, key: str) -> None:
    """Raises ValueError if it is not ``cpu``, ``cuda`` or ``cuda:N``, whether or not it is here.

    Args:
        key: what names the device, for the error, such as ``--device``.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"{key} must be cpu, cuda or cuda:N, got {device!r}")


def check_device(device: str, key: str) -> None:
    """Raises ValueError if it is no such name, or if this machine has no such device."""
    check_device_name(device, key)
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"{key} must be cpu, because no GPU can be used here, got {device!r}")
    number = torch.cuda.device_count()
    if ":" in device and int(device[5:]) >= number:
        raise ValueError(f"{key} must name one of the {number} GPUs, got {device!r}")
