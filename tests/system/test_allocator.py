"""The process keeps freed memory if the C library supports that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tests a setting of glibc")

PROGRAM = """
import resource, torch
from spatial_mamba_d2.system.allocator import keep_freed_memory

kept = keep_freed_memory()
faults = []
for _ in range(12):  # the first freed blocks may be a few bytes too short to be reused
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(2 ** 24)
    del x
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults[1:]) * resource.getpagesize() > 2 ** 25)
"""


def kept_and_faulting(**settings: str) -> list[str]:
    """What the call returned, and whether every tensor of 64 MiB causes page faults."""
    env = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    env.pop("GLIBC_TUNABLES", None)
    env |= settings
    return subprocess.check_output([sys.executable, "-c", PROGRAM], env=env, text=True).split()


def test_reusing_freed_memory_causes_no_page_faults():
    kept, faulting = kept_and_faulting()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert faulting == "False"


def test_settings_of_the_user_take_precedence():
    assert kept_and_faulting(MALLOC_TRIM_THRESHOLD_="1000000") == ["False", "True"]
