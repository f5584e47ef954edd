"""Registers, shared memory and occupancy of the CUDA kernels, without a GPU.

NVRTC compiles the kernels and reports them. The sizes of blocks are those of the launch code.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spatial_mamba_d2.ops.cuda import nvrtc
from spatial_mamba_d2.ops.cuda.arguments import LANES
from spatial_mamba_d2.ops.cuda.channels import channels_of_thread
from spatial_mamba_d2.ops.cuda.kernels import CPP_TYPES, KernelSet
from spatial_mamba_d2.ops.cuda.source import bundle, constants
from spatial_mamba_d2.ops.cuda.team import Team
from spatial_mamba_d2.ops.depthwise_conv3x3 import cuda as conv_cuda
from spatial_mamba_d2.ops.selective_scan.cuda import constant
from spatial_mamba_d2.ops.state_fusion.cuda import tile_bytes, tile_shape, widest_tile
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


CONVOLUTIONS = ("conv3x3", "conv3x3_backward", "conv3x3_stride2", "conv3x3_stride2_backward")
NORM_GRADIENTS = ("gated_norm_backward", "layer_norm_gradients")
NORMS = ("conv3x3_norm", "gated_norm", *NORM_GRADIENTS)
REGISTERS = 65536  # of a multiprocessor of every architecture
LIMITS = {
    "7.0": Limits(2048, 32, 96, 0),
    "7.2": Limits(2048, 32, 96, 0),
    "7.5": Limits(1024, 16, 64, 0),
    "8.0": Limits(2048, 32, 164, 1),
    "8.6": Limits(1536, 16, 100, 1),
    "8.9": Limits(1536, 24, 100, 1),
    "8.7": Limits(1536, 16, 164, 1),
    "8.8": Limits(1536, 16, 100, 1),
    "9.0": Limits(2048, 32, 228, 1),
    "10.0": Limits(2048, 32, 228, 1),
    "10.1": Limits(1536, 24, 228, 1),
    "10.3": Limits(2048, 32, 228, 1),
    "11.0": Limits(1536, 24, 228, 1),
    "12.0": Limits(1536, 24, 100, 1),
    "12.1": Limits(1536, 24, 100, 1),
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


def compile_all(
    architectures: Sequence[int], dtypes: Sequence[torch.dtype] = tuple(CPP_TYPES)
) -> list[Kernel]:
    """All kernels, compiled for some architectures (such as 90), by name and architecture.

    Raises:
        UnavailableError: NVRTC is missing, or does not compile for one of them.
    """
    names: dict[str, set[str]] = defaultdict(set)  # of each source
    for kernel_set in KernelSet.ALL:
        for dtype in dtypes:
            names[kernel_set.source].update(kernel_set.cpp_names(dtype))
    found = set()
    for architecture in architectures:
        for source, of_source in names.items():
            image = nvrtc.compile_kernels(
                bundle(source), sorted(of_source), architecture, "--ptxas-options=-v", title=source
            )
            found.update(_read_log(image, architecture))
    return sorted(found)


def _read_log(image: nvrtc.Image, architecture: int) -> list[Kernel]:
    """What the compiler reports of each kernel."""
    usage = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers",
        image.log,
        re.S,
    )
    by_symbol = {symbol: (int(registers), int(stack)) for symbol, stack, registers in usage}
    kernels = []
    for name, symbol in image.symbols.items():
        short = name.replace("c10::", "")
        shown = f"{architecture // 10}.{architecture % 10}"
        kernels.append(Kernel(short, shown, *by_symbol[symbol], *_block(short, LIMITS[shown])))
    return kernels


def _block(name: str, limits: Limits) -> tuple[int, int]:
    """Warps of a full block, and the bytes of shared memory that it uses at most."""
    acc = torch.float64 if "<double" in name else torch.float32
    size = acc.itemsize
    map_bytes = 2 * size * LANES
    kernel = name.partition("<")[0]
    if kernel == "apply_adjoint":
        warps = constant("kAdjointWarps")
        return warps, warps * constant("kMaxSegment") * LANES * size
    if kernel == "apply":
        return constant("kScanWarps"), 0
    if kernel in ("carry", "reduce"):
        warps = constant("kCarryWarps" if kernel == "carry" else "kScanWarps")
        return warps, warps * map_bytes
    if kernel in ("fuse_tiles", "grad_input_tiles"):
        width, _ = widest_tile(size, 1024 * (limits.shared_kib - limits.reserved_kib))
        return tile_shape(size)[0], tile_bytes(width, size)
    if kernel == "add_bias":
        return constants("add_bias/bias.cuh")["kBiasWarps"], 0
    if kernel in CONVOLUTIONS:
        warps = conv_cuda.constant("kConvWarps")
        count = conv_cuda.backward_channels_of_thread(acc, packed=name.split(", ")[1] == "true")
        return warps, warps * LANES * 10 * count * size if "backward" in kernel else 0
    if kernel == "gelu_gradients":
        warps = constants("gelu_gradients/gelu.cuh")["kGeluWarps"]
        return warps, warps * channels_of_thread(acc) * LANES * size
    if kernel in NORMS:  # of 128 channels
        team = Team.of(1, acc)
        count = 2 * channels_of_thread(acc) if kernel in NORM_GRADIENTS else 0
        return team.block_warps, team.shared_bytes_with_sums(count, acc)
    raise ValueError(f"the size of blocks is unknown, add it to {__name__}: {name}")


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
        sizes = [row[architecture].shared_bytes for architecture in architectures]
        shared_kib = ", ".join(dict.fromkeys(f"{size / 1024:.0f}" for size in sizes))
        rows.append([name, str(32 * any_kernel.warps), shared_kib, *cells])
    return markdown_table(["kernel", "threads", "shared KiB", *architectures], rows)
