"""Registers, shared memory and occupancy of the compiled CUDA kernels, without a GPU.

The compiler wrote them into the library, and ``cuobjdump`` reads them from there. The sizes of
blocks come from the kernels' sources, so this needs a checkout.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from spatial_mamba_d2.profiling.kernel_constants import kernel_constants
from spatial_mamba_d2.system import cuda_toolkit
from spatial_mamba_d2.system.tables import markdown_table

#: Most registers per thread. With 128 a multiprocessor holds two blocks of 256 threads. Kernels
#: for float64 exist to check the others, and may use as many as a thread can have.
REGISTER_BUDGET = {"float": 128, "double": 255}


class Limits(NamedTuple):
    """Limits of one multiprocessor, from the CUDA C++ Programming Guide (compute capabilities)."""

    threads: int
    blocks: int
    shared_kib: int
    reserved_kib: int  # shared memory that each block takes for the system


REGISTERS = 65536  # of a multiprocessor of every architecture
LIMITS = {
    "7.5": Limits(1024, 16, 64, 0),
    "8.0": Limits(2048, 32, 164, 1),
    "8.6": Limits(1536, 16, 100, 1),
    "8.9": Limits(1536, 24, 100, 1),
    "9.0": Limits(2048, 32, 228, 1),
    "10.0": Limits(2048, 32, 228, 1),
    "12.0": Limits(1536, 24, 100, 1),
}


class Kernel(NamedTuple):
    """A kernel compiled for one architecture."""

    name: str
    architecture: str
    registers: int  # per thread
    stack_bytes: int  # per thread; our kernels use the stack for spilled registers only
    warps: int  # per block
    shared_bytes: int  # per block

    @property
    def occupancy(self) -> float:
        """Resident threads as a fraction of the most that a multiprocessor can hold."""
        limits = LIMITS[self.architecture]
        warp_registers = 256 * math.ceil(self.registers * 32 / 256)  # allocated in units of 256
        blocks = min(
            limits.blocks,
            limits.threads // (32 * self.warps),
            REGISTERS // warp_registers // self.warps,
            limits.shared_kib * 1024 // (self.shared_bytes + limits.reserved_kib * 1024 or 1),
        )
        return blocks * self.warps * 32 / limits.threads


def find_cuobjdump() -> str | None:
    """NVIDIA's tool that reads compiled kernels, from the CUDA toolkit, triton or ``PATH``."""
    candidates = []
    try:
        candidates.append(cuda_toolkit.find_toolkit(torch.version.cuda).home / "bin/cuobjdump")
    except cuda_toolkit.NoToolkitError:
        pass
    site = Path(torch.__file__).parents[1]
    candidates.append(site / "triton/backends/nvidia/bin/cuobjdump")
    found = next((str(path) for path in candidates if path.exists()), None)
    return found or shutil.which("cuobjdump")


def read_kernels(library: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels in a compiled library, sorted by name and architecture."""
    command = [cuobjdump, "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout
    found = []
    for part in text.split("arch = sm_")[1:]:
        number = re.match(r"\d+", part)
        assert number
        architecture = f"{number[0][:-1]}.{number[0][-1]}"
        usage = re.findall(r"Function (.+?):\n\s*REG:(\d+) STACK:(\d+)", part)
        for name, registers, stack in usage:
            name = re.sub(r"^void |\(.*\)$|smd2::cuda::|c10::", "", name)
            name = name.partition("(")[0]
            found.append(Kernel(name, architecture, int(registers), int(stack), *_block(name)))
    return sorted(found)


def _block(name: str) -> tuple[int, int]:
    """Warps of a full block, and the bytes of shared memory that it uses."""
    c = kernel_constants()
    size = 8 if re.search(r"<double", name) else 4
    if name.startswith("apply_adjoint"):
        return c["kAdjointWarps"], c["kAdjointWarps"] * c["kMaxSegment"] * 32 * size
    if name.startswith("apply"):
        return c["kScanWarps"], 0
    if name.startswith("carry"):
        return c["kCarryWarps"], c["kCarryWarps"] * 32 * 2 * size
    if name.startswith("reduce"):
        return c["kScanWarps"], c["kScanWarps"] * 32 * 2 * size
    scalar = "double" if size == 8 else "float"
    rows, width, halo = c[f"{scalar}.kRows"], c[f"{scalar}.kWidth"], 2 * c["kRadius"]
    return rows, (rows + halo) * (width + halo) * 32 * size


def over_budget(kernels: list[Kernel]) -> list[str]:
    """A sentence for each kernel that spills registers or uses more than the budget."""
    problems = []
    for kernel in kernels:
        budget = REGISTER_BUDGET["double" if "<double" in kernel.name else "float"]
        at = f"{kernel.name} on {kernel.architecture}"
        if kernel.stack_bytes:
            problems.append(f"{at} spills: {kernel.stack_bytes} bytes of stack")
        if kernel.registers > budget:
            problems.append(f"{at} has {kernel.registers} registers, more than {budget}")
    return problems


def resource_table(kernels: list[Kernel]) -> str:
    """Registers, stack, shared memory and occupancy of every kernel, as Markdown."""
    by_name: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel in kernels:
        by_name[kernel.name][kernel.architecture] = kernel
    architectures = sorted({kernel.architecture for kernel in kernels}, key=float)
    rows = []
    for name, row in by_name.items():
        any_kernel = next(iter(row.values()))
        cells = [
            f"{k.registers}, {k.occupancy:.0%}"
            + (f", SPILLS {k.stack_bytes}" if k.stack_bytes else "")
            for k in (row[architecture] for architecture in architectures)
        ]
        shared_kib = f"{any_kernel.shared_bytes / 1024:.0f}"
        rows.append([name, str(32 * any_kernel.warps), shared_kib, *cells])
    return markdown_table(["kernel", "threads", "shared KiB", *architectures], rows)
