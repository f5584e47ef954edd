"""What the CUDA kernels cost, without a GPU: resources from the compiler, DRAM bytes from a model.

The model: a launch reads every byte that it needs from DRAM once and writes every byte once. Caches
keep all that blocks of one launch share, and nothing from one launch to the next. The same rule
holds for our launches and for the authors'. Time is bounded below by these bytes over the device's
bandwidth. Nothing here was timed on a GPU.

Sizes of tiles and blocks are read from the kernels' sources, so this needs a checkout.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.models.variants import VARIANTS
from spatial_mamba_d2.system import cuda_toolkit

OPS = Path(ops.__file__).parent
TAPS = 25
BANDWIDTH_TB_S = {"A100": 1.555, "H100": 3.35}
MULTIPROCESSORS = {"A100": 108, "H100": 132}

#: The most registers that a thread may have: with 128, a multiprocessor holds two blocks of 256
#: threads. Kernels for float64 are for checks, and have what a thread can have.
REGISTER_BUDGET = {"float": 128, "double": 255}


class Limits(NamedTuple):
    """Of one multiprocessor."""

    threads: int
    blocks: int
    shared_kib: int
    reserved_kib: int  # of shared memory, by each block


REGISTERS = 65536  # the same on all
LIMITS = {
    "7.5": Limits(1024, 16, 64, 0),
    "8.0": Limits(2048, 32, 164, 1),
    "8.6": Limits(1536, 16, 100, 1),
    "8.9": Limits(1536, 24, 100, 1),
    "9.0": Limits(2048, 32, 228, 1),
    "10.0": Limits(2048, 32, 228, 1),
    "12.0": Limits(1536, 24, 100, 1),
}


# Resources


class Kernel(NamedTuple):
    """A kernel for one architecture, as ptxas left it."""

    name: str
    architecture: str
    registers: int  # a thread
    stack_bytes: int  # a thread: spilled registers go there, and nothing else of ours does
    warps: int  # of a block
    shared_bytes: int  # of a block

    @property
    def occupancy(self) -> float:
        """Resident threads over the most that a multiprocessor can hold."""
        limits = LIMITS[self.architecture]
        registers = 256 * math.ceil(self.registers * 32 / 256)  # of a warp
        blocks = min(
            limits.blocks,
            limits.threads // (32 * self.warps),
            REGISTERS // registers // self.warps,
            limits.shared_kib * 1024 // (self.shared_bytes + limits.reserved_kib * 1024 or 1),
        )
        return blocks * self.warps * 32 / limits.threads


@cache
def constants() -> dict[str, int]:
    """Compile-time numbers of the kernels by name; those of tiles as ``float.kRows`` and so on."""
    text = "".join(path.read_text() for path in sorted(OPS.glob("*/*.h*")))
    text += "".join(path.read_text() for path in sorted(OPS.glob("*/*.cuh")))
    if "struct TileShape" not in text:
        raise FileNotFoundError(f"{OPS} has no CUDA sources: run this in a checkout")
    found = {}
    shapes = re.findall(r"struct TileShape(?:<double>)? {(.*?)};", text, re.S)
    for scalar, body in zip(("float", "double"), shapes, strict=True):
        for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", body):
            found[f"{scalar}.{name}"] = int(value)
    for name, value in re.findall(r"^constexpr int (k\w+) = (\d+);", text, re.M):
        found[name] = int(value)
    return found


def _block(name: str) -> tuple[int, int]:
    """Warps of a full block, and its bytes of shared memory."""
    c = constants()
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


def find_cuobjdump() -> str | None:
    """NVIDIA's tool that reads compiled kernels: of the toolkit, or the one that triton brings."""
    candidates = []
    try:
        candidates.append(cuda_toolkit.find_toolkit(torch.version.cuda).home / "bin/cuobjdump")
    except cuda_toolkit.NoToolkitError:
        pass
    site = Path(torch.__file__).parents[1]
    candidates.append(site / "triton/backends/nvidia/bin/cuobjdump")
    found = next((str(path) for path in candidates if path.exists()), None)
    return found or shutil.which("cuobjdump")


def kernels(library: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels in a compiled library, by name and architecture."""
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


def over_budget(found: list[Kernel]) -> list[str]:
    """What breaks the rules: spilled registers, or more of them than the budget."""
    problems = []
    for kernel in found:
        budget = REGISTER_BUDGET["double" if "<double" in kernel.name else "float"]
        at = f"{kernel.name} on {kernel.architecture}"
        if kernel.stack_bytes:
            problems.append(f"{at} spills: {kernel.stack_bytes} bytes of stack")
        if kernel.registers > budget:
            problems.append(f"{at} has {kernel.registers} registers, more than {budget}")
    return problems


# DRAM bytes


class Launch(NamedTuple):
    """One kernel launch, in bytes of DRAM."""

    name: str
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Map(NamedTuple):
    """The tensors of one call: a map of tokens, and the bytes of an element of u, delta and y."""

    images: int
    height: int
    width: int
    dim: int
    element: int = 4
    multiprocessors: int = MULTIPROCESSORS["H100"]

    @property
    def tokens(self) -> int:
        return self.images * self.height * self.width

    @property
    def values(self) -> int:
        return self.tokens * self.dim

    @property
    def accumulate(self) -> int:
        """Bytes of states, sums and small tensors."""
        return max(self.element, 4)

    @property
    def channel_blocks(self) -> int:
        return -(-self.dim // 32)


class Tiles(NamedTuple):
    """How ops/state_fusion/cuda.h cuts a map."""

    tile_width: int
    tiles: int
    band_height: int
    bands: int


def cut(m: Map) -> Tiles:
    """The same as ``cut`` there."""
    c, scalar = constants(), "double" if m.accumulate == 8 else "float"
    rows = c[f"{scalar}.kRows"]
    tiles = -(-m.width // c[f"{scalar}.kWidth"])
    wanted = -(-m.multiprocessors * 3 // (m.images * tiles * m.channel_blocks))
    band_height = max(-(-m.height // wanted), 2 * rows)
    band_height = -(-band_height // rows) * rows
    return Tiles(-(-m.width // tiles), tiles, band_height, -(-m.height // band_height))


def _carries(m: Map, rows: int, per_row: int, read: int) -> list[Launch]:
    """The two launches before a recursion can start everywhere; ``read`` is what it runs over."""
    a = m.accumulate
    return [
        Launch("reduce", read, rows * (per_row + 1) * m.dim * 2 * a),
        Launch("carry", rows * m.dim * 2 * a, rows * m.dim * a),
    ]


def _sequence_rows(m: Map) -> tuple[int, int]:
    """Rows of all images, and segments of a row, of a sequence that is not an image."""
    length, segment = m.height * m.width, constants()["kMaxSegment"]
    width = min(length, 16 * segment)
    return m.images * -(-length // width), -(-width // segment)


def _image_rows(m: Map) -> tuple[int, int]:
    return m.images * m.height, cut(m).tiles


def _scan_inputs(m: Map) -> int:
    """u, delta, B, A, delta_bias."""
    return 2 * m.values * m.element + (m.tokens + 2 * m.dim) * m.accumulate


def _carried(m: Map, rows: int, per_row: int) -> int:
    """What a segment needs to know of the tokens before it."""
    return rows * (2 * per_row + 1) * m.dim * m.accumulate


def scan_forward(m: Map) -> list[Launch]:
    rows = _sequence_rows(m)
    apply = Launch("apply", _scan_inputs(m) + _carried(m, *rows), m.values * m.accumulate)
    return [*_carries(m, *rows, read=_scan_inputs(m)), apply]


def _scan_adjoint(m: Map, rows: int, per_row: int, skip: bool) -> list[Launch]:
    a = m.accumulate
    read = m.values * (m.element + a) + 2 * m.dim * a  # delta, grad_h, A, delta_bias
    apply_read = _scan_inputs(m) + m.values * a + 2 * _carried(m, rows, per_row)
    apply_written = 2 * m.values * m.element  # grad_u, grad_delta
    apply_written += (m.channel_blocks * m.tokens + 2 * rows * m.dim) * a  # of B, A, delta_bias
    if skip:  # grad_y and D; the gradient of D
        apply_read += m.values * m.element + m.dim * a
        apply_written += rows * m.dim * a
    return [
        *_carries(m, rows, per_row, read=read),
        Launch("apply_adjoint", apply_read, apply_written),
    ]


def scan_backward(m: Map) -> list[Launch]:
    """Without the states' first two launches, which are those of :func:`scan_forward`."""
    return _scan_adjoint(m, *_sequence_rows(m), skip=False)


def fusion_forward(m: Map) -> list[Launch]:
    a = m.accumulate
    return [Launch("fuse_tiles", m.values * m.element + TAPS * m.dim * a, m.values * a)]


def _grad_taps(m: Map) -> int:
    t = cut(m)
    return m.images * t.tiles * t.bands * TAPS * m.dim * m.accumulate


def fusion_backward(m: Map) -> list[Launch]:
    a = m.accumulate
    grad_input = m.values * a + TAPS * m.dim * a
    return [
        Launch("grad_input_tiles", grad_input, m.values * m.element),
        Launch("fuse_tiles, gradient of the taps", m.values * (m.element + a), _grad_taps(m)),
    ]


def ssm_forward(m: Map) -> list[Launch]:
    """``structure_aware_ssm``: the SSM core from u, delta, B, C to y, in training as well."""
    a, rows = m.accumulate, _image_rows(m)
    read = _scan_inputs(m) + _carried(m, *rows) + (m.tokens + (TAPS + 1) * m.dim) * a
    return [
        *_carries(m, *rows, read=_scan_inputs(m)),
        Launch("fuse_tiles, of a scan", read, m.values * m.element),
    ]


def ssm_backward(m: Map) -> list[Launch]:
    a, rows = m.accumulate, _image_rows(m)
    grad_y_and_C = m.values * m.element + m.tokens * a
    around = _scan_inputs(m) + _carried(m, *rows) + grad_y_and_C + TAPS * m.dim * a
    around_written = m.channel_blocks * m.tokens * a + _grad_taps(m)
    return [
        *_carries(m, *rows, read=_scan_inputs(m)),
        Launch("fuse_tiles, gradients of taps and C", around, around_written),
        Launch("grad_input_tiles", grad_y_and_C + TAPS * m.dim * a, m.values * a),
        *_scan_adjoint(m, *rows, skip=True),
    ]


def halo_bytes(m: Map) -> int:
    """What the last launch of :func:`ssm_forward` reads more than once, as if no cache had it.

    Halos of u and delta, and u again where it is observed.
    """
    t, radius = cut(m), constants()["kRadius"]
    columns = sum(
        min((i + 1) * t.tile_width + radius, m.width) - max(i * t.tile_width - radius, 0)
        for i in range(t.tiles)
    )
    rows = sum(
        min((i + 1) * t.band_height + radius, m.height) - max(i * t.band_height - radius, 0)
        for i in range(t.bands)
    )
    with_halos = m.images * columns * rows * m.dim
    return (2 * (with_halos - m.values) + m.values) * m.element


def authors_forward(m: Map) -> list[Launch]:
    """The authors' launches for the same in eval mode, in float32, which is all they have.

    ``StructureAwareSSM.forward_core`` and ``StateFusion.forward`` of their repository; tensors are
    [B, D, H, W]. Not counted, in their favour: what the scan saves for a backward pass, the halos
    of the convolution, and the copies to and from channels-first that surround this part.
    """
    values, tokens, dim = 4 * m.values, 4 * m.tokens, 4 * m.dim
    return [
        Launch(
            "selective_scan_fwd: u, delta, A, B, bias -> h", 2 * values + tokens + 2 * dim, values
        ),
        Launch("DepthwiseFunction: 11 x 11, 121 taps", values + 121 * dim, values),
        Launch("h * C", values + tokens, values),
        Launch("u * D", values + dim, values),
        Launch("sum of both", 2 * values, values),
    ]


def authors_training_forward(m: Map) -> list[Launch]:
    """The same in training mode: three padded and dilated convolutions and their weighted sum."""
    scan, _, *observe = authors_forward(m)
    values = 4 * m.values
    fusion = []
    for dilation in (1, 3, 5):
        padded = 4 * m.images * m.dim * (m.height + 2 * dilation) * (m.width + 2 * dilation)
        fusion += [
            Launch(f"replicate by {dilation}", values, padded),
            Launch(f"3 x 3, dilation {dilation}", padded + 9 * 4 * m.dim, values),
            Launch(f"alpha times dilation {dilation}", values, values),
        ]
    sums = [Launch("sum of two", 2 * values, values)] * 2
    return [scan, *fusion, *sums, *observe]


def total(launches: list[Launch]) -> int:
    """Bytes of all of them."""
    return sum(launch.bytes for launch in launches)


def stages(height: int = 800, width: int = 1280, variant: str = "tiny") -> list[Map]:
    """The SSM core's map at each stage of a backbone, for one image of that size."""
    width_of_stem = VARIANTS[variant]["embed_dim"]
    return [
        Map(1, -(-height // 2**i), -(-width // 2**i), 2 * width_of_stem * 2**stage)
        for stage, i in enumerate(range(2, 6))
    ]


# Tables


def _bounds(size: int) -> list[str]:
    return [f"{size / bandwidth / 1e6:.0f}" for bandwidth in BANDWIDTH_TB_S.values()]


def dram_table() -> str:
    """One SSM core per stage, ours beside the authors', as Markdown."""
    devices = [f"{name} >= us" for name in BANDWIDTH_TB_S]
    header = ["stage", "map", "launches", "MB", "ratio", "with halos", *devices]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for number, m in enumerate(stages(), start=1):
        half = m._replace(element=2)
        base = total(authors_forward(m))
        training = total(authors_training_forward(m))
        sequences = [
            ("authors, eval", authors_forward(m), base, None),
            ("authors, training", authors_training_forward(m), training, None),
            ("ours, float32", ssm_forward(m), total(ssm_forward(m)), halo_bytes(m)),
            ("ours, bfloat16", ssm_forward(half), total(ssm_forward(half)), halo_bytes(half)),
        ]
        for name, launches, size, halo in sequences:
            row = [
                f"{number}, {name}",
                f"{m.height} x {m.width} x {m.dim}",
                str(len(launches)),
                f"{size / 1e6:.1f}",
                f"{size / base:.2f}",
                "" if halo is None else f"{(size + halo) / base:.2f}",
                *_bounds(size),
            ]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def launch_table(m: Map) -> str:
    """Each launch of each operator, forward and backward, as Markdown."""
    lines = [
        "| operator | launch | read MB | written MB | A100 >= us | H100 >= us |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    operators = {
        "selective_scan": scan_forward(m),
        "selective_scan_backward": [*scan_forward(m)[:2], *scan_backward(m)],
        "state_fusion": fusion_forward(m),
        "state_fusion_backward": fusion_backward(m),
        "structure_aware_ssm": ssm_forward(m),
        "structure_aware_ssm_backward": ssm_backward(m),
    }
    for operator, launches in operators.items():
        for launch in launches:
            sizes = [f"{size / 1e6:.1f}" for size in (launch.read, launch.written)]
            row = [operator, launch.name, *sizes, *_bounds(launch.bytes)]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def resource_table(found: list[Kernel]) -> str:
    """Registers, stack, shared memory and occupancy of every kernel, as Markdown."""
    by_name: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel in found:
        by_name[kernel.name][kernel.architecture] = kernel
    columns = sorted({kernel.architecture for kernel in found}, key=float)
    lines = [
        f"| kernel | threads | shared KiB | {' | '.join(columns)} |",
        "| --- " * (3 + len(columns)) + "|",
    ]
    for name, row in by_name.items():
        first = next(iter(row.values()))
        cells = [
            f"{k.registers}, {k.occupancy:.0%}"
            + (f", SPILLS {k.stack_bytes}" * bool(k.stack_bytes))
            for k in (row[column] for column in columns)
        ]
        shared = f"{first.shared_bytes / 1024:.0f}"
        lines.append(f"| {name} | {32 * first.warps} | {shared} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(output: Path) -> int:
    """Print the tables and save them and all figures as ``output``/cuda_report.{md,json}.

    Returns:
        0, or 1 where a kernel spills or is over its budget of registers.
    """
    parts = [
        "DRAM bytes of one SSM core, from u, delta, B, C to y (a model; nothing was timed)",
        dram_table(),
        "DRAM bytes of every launch at stage 1 of tiny, 800 x 1280 pixels, float32",
        launch_table(stages()[0]),
    ]
    libraries = sorted(OPS.glob("_cuda*.so"))
    cuobjdump = find_cuobjdump()
    found, problems = [], []
    if libraries and cuobjdump:
        found = kernels(libraries[0], cuobjdump)
        problems = over_budget(found)
        parts += ["Registers a thread, occupancy", resource_table(found), *problems]
    else:
        lack = "no compiled CUDA kernels" if not libraries else "no cuobjdump"
        parts.append(f"No resources: there is {lack} (python -m spatial_mamba_d2.doctor says why).")
    text = "\n\n".join(parts)
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "cuda_report.md").write_text(text + "\n")
    figures = {
        "kernels": [{**k._asdict(), "occupancy": k.occupancy} for k in found],
        "stages": [
            {"map": m._asdict(), "ours": ssm_forward(m), "authors": authors_forward(m)}
            for m in stages()
        ],
    }
    (output / "cuda_report.json").write_text(json.dumps(figures, indent=2))
    return 1 if problems else 0
