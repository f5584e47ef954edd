"""DRAM traffic of our CUDA launches, by a model.

Each launch reads every byte that it needs from DRAM once and writes every byte once. Caches keep
all that blocks of one launch share, and nothing from one launch to the next. The same rule holds
for the authors' launches (:mod:`.authors_traffic`). These bytes over a device's bandwidth bound the
time from below.

Each launch lists the tensors that it reads and writes by name and shape, in the notation of the
kernels' argument structs (``ops/*/cuda.h``, ``ops/*/*.cuh``), and the bytes follow. For our kernels
the tests compare them with the bytes that the kernels touch in the emulator. Tile sizes come from
the launch code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from spatial_mamba_d2.models.variants import VARIANTS
from spatial_mamba_d2.ops.cuda.team import Team
from spatial_mamba_d2.ops.depthwise_conv3x3 import cuda as conv_cuda
from spatial_mamba_d2.ops.depthwise_conv3x3_stride2 import cuda as stride2_cuda
from spatial_mamba_d2.ops.gelu_gradients import cuda as gelu_cuda
from spatial_mamba_d2.ops.selective_scan import cuda as scan_cuda
from spatial_mamba_d2.ops.state_fusion import cuda as fusion_cuda
from spatial_mamba_d2.ops.state_fusion.cuda import Tiles
from spatial_mamba_d2.ops.state_fusion.taps import RADIUS, TAPS
from spatial_mamba_d2.ops.structure_aware_ssm import cuda as ssm_cuda

# From NVIDIA's data sheets of the A100 with 40 GB and of the H100 SXM.
BANDWIDTH_TB_S = {"A100": 1.555, "H100": 3.35}
NUM_MULTIPROCESSORS = {"A100": 108, "H100": 132}
SHARED_BYTES = {"A100": 163 * 1024, "H100": 227 * 1024}  # of a block, at most


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Operand(NamedTuple):
    """A tensor in DRAM."""

    name: str
    shape: tuple[int, ...]
    element_bytes: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.element_bytes


@dataclass(frozen=True)
class Launch:
    """One kernel launch, and the tensors that it reads from and writes to DRAM."""

    name: str
    reads: Sequence[Operand]
    writes: Sequence[Operand]

    @property
    def read_bytes(self) -> int:
        return sum(operand.num_bytes for operand in self.reads)

    @property
    def written_bytes(self) -> int:
        return sum(operand.num_bytes for operand in self.writes)

    @property
    def num_bytes(self) -> int:
        return self.read_bytes + self.written_bytes


class Problem(NamedTuple):
    """The size of one call: a map of tokens, and the bytes of an element of u, delta and y."""

    num_images: int
    height: int
    width: int
    dim: int
    element_bytes: int = 4
    multiprocessors: int = NUM_MULTIPROCESSORS["H100"]
    shared_bytes: int = SHARED_BYTES["H100"]

    @property
    def num_values(self) -> int:
        """Elements of u."""
        return self.num_images * self.height * self.width * self.dim

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of an element of states, sums and small tensors."""
        return max(self.element_bytes, 4)

    @property
    def num_channel_blocks(self) -> int:
        return _ceil_div(self.dim, 32)

    def activation(self, name: str) -> Operand:
        """A map in the dtype of the inputs."""
        shape = (self.num_images, self.height, self.width, self.dim)
        return Operand(name, shape, self.element_bytes)

    def accumulator(self, name: str, *shape: int) -> Operand:
        """A tensor in the accumulation dtype."""
        return Operand(name, shape, self.accumulator_bytes)

    def accumulator_map(self, name: str) -> Operand:
        """A map in the accumulation dtype."""
        return self.accumulator(name, self.num_images, self.height, self.width, self.dim)

    def per_token(self, name: str) -> Operand:
        """A number per token, as B and C."""
        return self.accumulator(name, self.num_images, self.height, self.width)

    def per_channel(self, name: str) -> Operand:
        """A number per channel, as A, D and the bias of delta."""
        return self.accumulator(name, self.dim)

    def taps(self) -> Operand:
        return self.accumulator("taps", TAPS, self.dim)


def cut(p: Problem) -> Tiles:
    """How the launch code of ``state_fusion`` cuts the map."""
    map_ = (p.num_images, p.height, p.width, p.dim)
    return fusion_cuda.cut(map_, p.accumulator_bytes, p)


class Segments(NamedTuple):
    """How the launch code of ``selective_scan`` cuts the sequences of all images.

    Attributes:
        num_rows, per_row: of the segments; those at the end of a sequence may be empty.
        num_used: segments with a token.
    """

    num_rows: int
    per_row: int
    num_used: int


def sequence_segments(p: Problem) -> Segments:
    """Rows and segments of a sequence that is not an image."""
    segments = scan_cuda.sequence_segments(p.height * p.width)
    num_used = p.num_images * _ceil_div(p.height * p.width, segments.step)
    return Segments(p.num_images * segments.rows, segments.per_row, num_used)


def image_segments(p: Problem) -> Segments:
    """A row of the map is a row, and each tile begins a segment."""
    segments = ssm_cuda.image_segments(cut(p))
    num_rows = p.num_images * segments.rows
    return Segments(num_rows, segments.per_row, num_rows * segments.per_row)


def scan_inputs(p: Problem) -> list[Operand]:
    """What every launch of a scan reads: u, delta, A, B, bias."""
    channels = [p.per_channel("A"), p.per_channel("delta_bias")]
    return [p.activation("u"), p.activation("delta"), p.per_token("B"), *channels]


def _segment_maps(p: Problem, s: Segments) -> Operand:
    """For each segment, decay and state of the affine map of the row's segments before it."""
    return p.accumulator("segment_maps", s.num_rows, s.per_row, p.dim, 2)


def _row_maps(p: Problem, s: Segments) -> Operand:
    """Decay and state of the affine map of each row."""
    return p.accumulator("row_maps", s.num_rows, p.dim, 2)


def _row_states(p: Problem, s: Segments) -> Operand:
    """The state before each row."""
    return p.accumulator("row_states", s.num_rows, p.dim)


def _states_before(p: Problem, s: Segments) -> list[Operand]:
    """What gives the state before any segment."""
    return [_segment_maps(p, s), _row_states(p, s)]


def _carries(p: Problem, s: Segments, reads: list[Operand]) -> list[Launch]:
    """The two launches after which a recursion can start in every segment at once."""
    row_maps = _row_maps(p, s)
    return [
        Launch("reduce", reads=reads, writes=[_segment_maps(p, s), row_maps]),
        Launch("carry", reads=[row_maps], writes=[_row_states(p, s)]),
    ]


def scan_forward(p: Problem) -> list[Launch]:
    """``selective_scan``."""
    segments, inputs = sequence_segments(p), scan_inputs(p)
    return [
        *_carries(p, segments, inputs),
        Launch(
            "apply",
            reads=[*inputs, *_states_before(p, segments)],
            writes=[p.accumulator_map("h")],
        ),
    ]


def scan_backward(p: Problem) -> list[Launch]:
    """``selective_scan_backward``, which computes the states again."""
    segments = sequence_segments(p)
    return [*_carries(p, segments, scan_inputs(p)), *_scan_adjoint(p, segments)]


def _scan_adjoint(p: Problem, s: Segments, *, observed: bool = False) -> list[Launch]:
    """Gradients from that of the states; with ``observed`` also those of ``D u`` in y."""
    grad_h = p.accumulator_map("grad_h")
    recursion = [p.activation("delta"), grad_h, p.per_channel("A"), p.per_channel("delta_bias")]
    reads = [*scan_inputs(p), grad_h]
    # Of the recursion and of its adjoint; empty segments are passed over.
    reads += 2 * [p.accumulator("segment_maps", s.num_used, p.dim, 2), _row_states(p, s)]
    writes = [
        p.activation("grad_u"),
        p.activation("grad_delta"),
        p.accumulator("grad_B", p.num_channel_blocks, p.num_images, p.height, p.width),
        p.accumulator("grad_A", s.num_rows, p.dim),
        p.accumulator("grad_delta_bias", s.num_rows, p.dim),
    ]
    if observed:
        reads += [p.activation("grad_y"), p.per_channel("D")]
        writes += [p.accumulator("grad_D", s.num_rows, p.dim)]
    return [*_carries(p, s, recursion), Launch("apply_adjoint", reads=reads, writes=writes)]


def fusion_forward(p: Problem) -> list[Launch]:
    """``state_fusion``."""
    return [
        Launch("fuse_tiles", reads=[p.activation("h"), p.taps()], writes=[p.accumulator_map("out")])
    ]


def fusion_backward(p: Problem) -> list[Launch]:
    """``state_fusion_backward``."""
    grad_out = p.accumulator_map("grad_out")
    return [
        Launch("grad_input_tiles", reads=[grad_out, p.taps()], writes=[p.activation("grad_h")]),
        Launch(
            "fuse_tiles, gradient of the taps",
            reads=[p.activation("h"), grad_out],
            writes=[_grad_taps(p)],
        ),
    ]


def _grad_taps(p: Problem) -> Operand:
    """Partial sums, one for each block of threads."""
    tiles = cut(p)
    return p.accumulator("grad_taps", tiles.parts, TAPS, p.dim)


def ssm_forward(p: Problem) -> list[Launch]:
    """``structure_aware_ssm``, the SSM core from u, delta, B, C to y, in training as well."""
    segments, inputs = image_segments(p), scan_inputs(p)
    observation = [p.per_token("C"), p.per_channel("D"), p.taps()]
    return [
        *_carries(p, segments, inputs),
        Launch(
            "fuse_tiles, of a scan",
            reads=[*inputs, *_states_before(p, segments), *observation],
            writes=[p.activation("y")],
        ),
    ]


def ssm_backward(p: Problem) -> list[Launch]:
    """``structure_aware_ssm_backward``, which computes the states again."""
    segments, inputs = image_segments(p), scan_inputs(p)
    observation = [p.activation("grad_y"), p.per_token("C"), p.taps()]
    grad_C = p.accumulator("grad_C", p.num_channel_blocks, p.num_images, p.height, p.width)
    return [
        *_carries(p, segments, inputs),
        Launch(
            "fuse_tiles, gradients of taps and C",
            reads=[*inputs, *_states_before(p, segments), *observation],
            writes=[grad_C, _grad_taps(p)],
        ),
        Launch("grad_input_tiles", reads=observation, writes=[p.accumulator_map("grad_h")]),
        *_scan_adjoint(p, segments, observed=True),
    ]


def ssm_from_dt_forward(p: Problem, rank: int) -> list[Launch]:
    """``structure_aware_ssm_from_dt``: step sizes are products of rank ``rank``."""
    return _from_dt(ssm_forward(p), p, rank)


def ssm_from_dt_backward(p: Problem, rank: int) -> list[Launch]:
    """``structure_aware_ssm_from_dt_backward``, without the products for the factors' gradients."""
    return _from_dt(ssm_backward(p), p, rank)


def _from_dt(launches: list[Launch], p: Problem, rank: int) -> list[Launch]:
    """What reads delta reads its factors instead."""
    padded = 4 * _ceil_div(rank, 4)
    dt = Operand("dt", (p.num_images, p.height, p.width, padded), p.element_bytes)
    factors = [dt, p.accumulator("dt_weight", padded, p.dim)]

    def with_factors(launch: Launch) -> Launch:
        if all(operand.name != "delta" for operand in launch.reads):
            return launch
        kept = [operand for operand in launch.reads if operand.name != "delta"]
        return Launch(launch.name, reads=[*kept, *factors], writes=launch.writes)

    return [with_factors(launch) for launch in launches]


def _accumulation_dtype(p: Problem) -> torch.dtype:
    return torch.float64 if p.accumulator_bytes == 8 else torch.float32


def _conv_weights(p: Problem) -> list[Operand]:
    return [p.accumulator("weight", p.dim, 9), p.per_channel("bias")]


def conv_forward(p: Problem) -> list[Launch]:
    """``depthwise_conv3x3``."""
    reads = [p.activation("x"), *_conv_weights(p)]
    return [Launch("conv3x3", reads=reads, writes=[p.activation("out")])]


def conv_backward(p: Problem) -> list[Launch]:
    """``depthwise_conv3x3_backward`` and ``depthwise_conv3x3_gradients_``."""
    shape = (p.num_images, p.height, p.width, p.dim)
    acc = _accumulation_dtype(p)
    packed = p.dim % conv_cuda.backward_channels_of_thread(acc, packed=True) == 0
    count = conv_cuda.backward_channels_of_thread(acc, packed)
    _, num_parts, _ = conv_cuda.cut_backward(shape, p.dim, count, p.multiprocessors)
    return [
        Launch(
            "conv3x3_backward",
            reads=[p.activation("x"), p.activation("grad_out"), *_conv_weights(p)],
            writes=[
                p.activation("grad_x"),
                p.accumulator("grad_weight", num_parts, p.dim, 9),
                p.accumulator("grad_bias", num_parts, p.dim),
            ],
        )
    ]


def _halved(p: Problem) -> Problem:
    """The output of a convolution of stride 2."""
    return p._replace(height=_ceil_div(p.height, 2), width=_ceil_div(p.width, 2))


def conv_stride2_forward(p: Problem) -> list[Launch]:
    """``depthwise_conv3x3_stride2``."""
    reads = [p.activation("x"), *_conv_weights(p)]
    return [Launch("conv3x3_stride2", reads=reads, writes=[_halved(p).activation("out")])]


def conv_stride2_backward(p: Problem) -> list[Launch]:
    """``depthwise_conv3x3_stride2_backward``."""
    acc = _accumulation_dtype(p)
    packed = p.dim % conv_cuda.backward_channels_of_thread(acc, packed=True) == 0
    count = conv_cuda.backward_channels_of_thread(acc, packed)
    shape = (p.num_images, p.height, p.width, p.dim)
    _, num_parts, _ = stride2_cuda.cut_backward(shape, p.dim, count, p.multiprocessors)
    return [
        Launch(
            "conv3x3_stride2_backward",
            reads=[p.activation("x"), _halved(p).activation("grad_out"), *_conv_weights(p)],
            writes=[
                p.activation("grad_x"),
                p.accumulator("grad_weight", num_parts, p.dim, 9),
                p.accumulator("grad_bias", num_parts, p.dim),
            ],
        )
    ]


def add_bias(p: Problem, *, residual: bool = False) -> list[Launch]:
    """``add_bias_``."""
    reads = [p.activation("x"), p.per_channel("bias")]
    reads += [p.activation("residual")] if residual else []
    return [Launch("add_bias", reads=reads, writes=[p.activation("x")])]


def conv_norm_forward(p: Problem) -> list[Launch]:
    """``depthwise_conv3x3_layer_norm``."""
    norm = [p.per_channel("norm_weight"), p.per_channel("norm_bias")]
    return [
        Launch(
            "conv3x3_norm",
            reads=[p.activation("x"), *_conv_weights(p), *norm],
            writes=[p.activation("y"), p.activation("norm")],
        )
    ]


def gate_forward(p: Problem) -> list[Launch]:
    """``gated_layer_norm``."""
    reads = [p.activation("y"), p.activation("z"), p.per_channel("weight"), p.per_channel("bias")]
    return [Launch("gated_norm", reads=reads, writes=[p.activation("out")])]


def gate_backward(p: Problem) -> list[Launch]:
    """``gated_layer_norm_backward``."""
    (forward,) = gate_forward(p)
    return [
        Launch(
            "gated_norm_backward",
            reads=[*forward.reads, p.activation("grad_out")],
            writes=[p.activation("grad_y"), p.activation("grad_z"), *_norm_sums(p)],
        )
    ]


def gate_gradients(p: Problem) -> list[Launch]:
    """``gated_layer_norm_gradients_``: the output is written in addition."""
    (backward,) = gate_backward(p)
    return [Launch(backward.name, backward.reads, [*backward.writes, p.activation("out")])]


def _norm_sums(p: Problem) -> list[Operand]:
    """Partial sums of the gradients of a norm's parameters."""
    team = Team.of(p.dim, _accumulation_dtype(p))
    num_parts = team.backward_blocks(p.num_values // p.dim, p.multiprocessors)
    return [p.accumulator(name, num_parts, p.dim) for name in ("grad_weight", "grad_bias")]


def gelu_gradients(p: Problem) -> list[Launch]:
    """``gelu_gradients``."""
    acc = _accumulation_dtype(p)
    num_parts, _ = gelu_cuda.cut(p.num_values // p.dim, p.dim, acc, p.multiprocessors)
    return [
        Launch(
            "gelu_gradients",
            reads=[p.activation("x"), p.activation("grad_out")],
            writes=[
                p.activation("grad_x"),
                p.activation("out"),
                p.accumulator("grad_sum", num_parts, p.dim),
            ],
        )
    ]


def layer_norm_gradients(p: Problem) -> list[Launch]:
    """``layer_norm_gradients``."""
    maps = [p.activation("x"), p.activation("grad_out"), p.activation("residual")]
    return [
        Launch(
            "layer_norm_gradients",
            reads=[*maps, p.per_channel("weight"), p.per_channel("bias")],
            writes=[p.activation("grad_x"), p.activation("out"), *_norm_sums(p)],
        )
    ]


def halo_bytes(p: Problem) -> int:
    """What the last launch of :func:`ssm_forward` reads more than once if no cache has it.

    That is the halos of u and delta, and u again where ``D u`` is added.
    """
    tiles, radius = cut(p), RADIUS
    columns = sum(
        min((i + 1) * tiles.tile_width + radius, p.width) - max(i * tiles.tile_width - radius, 0)
        for i in range(tiles.tiles)
    )
    rows = sum(
        min((i + 1) * tiles.band_height + radius, p.height) - max(i * tiles.band_height - radius, 0)
        for i in range(tiles.bands)
    )
    num_with_halos = p.num_images * columns * rows * p.dim
    return (2 * (num_with_halos - p.num_values) + p.num_values) * p.element_bytes


def total_bytes(launches: Iterable[Launch]) -> int:
    """Bytes that all of them read and write."""
    return sum(launch.num_bytes for launch in launches)


def stage_problems(height: int = 800, width: int = 1280, variant: str = "tiny") -> list[Problem]:
    """The SSM core's problem in each stage of a backbone, for one image of that size."""
    stem_dim = VARIANTS[variant]["embed_dim"]
    return [
        Problem(1, _ceil_div(height, 2**i), _ceil_div(width, 2**i), 2 * stem_dim * 2**stage)
        for stage, i in enumerate(range(2, 6))
    ]
