"""The CUDA kernels under sanitizers, and a check that the emulator finds bugs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spatial_mamba_d2.ops.cuda.kernels import KernelSet, unload
from spatial_mamba_d2.ops.cuda.source import bundle
from spatial_mamba_d2.ops.state_fusion import cuda as fusion
from spatial_mamba_d2.profiling import dram_model

from . import (
    emulator,
    test_add_bias,
    test_depthwise_conv3x3_gradients,
    test_depthwise_conv3x3_layer_norm,
    test_gated_layer_norm_gradients,
    test_gelu_gradients,
    test_layer_norm_gradients,
)
from .conftest import GRADIENT_TOLERANCE, TOLERANCE, relative_error
from .test_conformance import CASES, arguments, call, rank_of, truth

#: operators that have no gradients
FOR_INFERENCE = {
    suite.name: suite
    for suite in (
        test_add_bias.TestAddBias(),
        test_depthwise_conv3x3_gradients.TestDepthwiseConv3x3Gradients(),
        test_depthwise_conv3x3_layer_norm.TestDepthwiseConv3x3LayerNorm(),
        test_gated_layer_norm_gradients.TestGatedLayerNormGradients(),
        test_gelu_gradients.TestGeluGradients(),
        test_layer_norm_gradients.TestLayerNormGradients(),
    )
}
# Compiler flags of the kernels, of the emulator's runtime, and of the linker.
SANITIZERS = {
    "none": ((), (), ()),
    "address, undefined": (
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        ("-fsanitize=address",),
        ("-fsanitize=address,undefined",),
    ),
    "thread": (("-fsanitize=thread",), ("-DSMD2_TSAN",), ("-fsanitize=thread",)),
}


def build_program(main: Path, kernels: Sequence[Path], sanitizer: str) -> Path:
    """``main``, the kernels and the emulator's runtime, linked; skips without a compiler."""
    _, of_runtime, of_linker = SANITIZERS[sanitizer]
    objects = emulator.compile_all((main, *kernels), *kernel_flags(sanitizer))
    objects += emulator.compile_all(emulator.RUNTIME, "-O1", "-g1", *of_runtime)
    return emulator.link(objects, *of_linker)


def kernel_flags(sanitizer: str) -> tuple[str, ...]:
    """The compiler's; the same in all tests, which share what it makes of them."""
    return "-O1", "-g1", *SANITIZERS[sanitizer][0]


def record(path: Path, case: str, inputs: list[Tensor]) -> Path:
    """The launches of an operator and its gradients, with outputs that start as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with emulator.emulated_cuda(), emulator.Recording() as recording:
            if case in FOR_INFERENCE:
                suite = FOR_INFERENCE[case]
                suite.call([x.to(inputs[0].dtype) for x in suite.arguments(*inputs)])
            else:
                leaves = [x.requires_grad_() for x in arguments(case, inputs)]
                output = call(case, leaves)
                torch.autograd.grad(output, leaves, torch.ones_like(output))
    finally:
        torch.use_deterministic_algorithms(False)
    return recording.write(path)


def is_for(case: str, shape: tuple[int, int, int, int]) -> bool:
    """Only scans have several segments in a long row, and only norms several warps for a token."""
    _, _, width, dim = shape
    if width > 100:
        return "scan" in case or "ssm" in case
    return dim <= 100 or "norm" in case


@pytest.fixture
def recordings(tmp_path, ssm_inputs, monkeypatch) -> Callable[..., list[str]]:
    """``recordings((shape, dtype), ..., of="")``: files, one for each of the operators' cases.

    With ``of``, a source file of kernels, only cases that launch one of them.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)

    def inputs(case: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
        batch, height, width, dim = shape
        if case == "gated_layer_norm":  # a warp for each token; ThreadSanitizer counts to 8128
            height, width = min(height, 5), min(width, 21)
        return ssm_inputs(batch, height, width, dim, dtype)

    def make(*problems: tuple[tuple[int, int, int, int], torch.dtype], of: str = "") -> list[str]:
        files = [
            record(tmp_path / f"{case} {number}", case, inputs(case, shape, dtype))
            for case in (*CASES, *FOR_INFERENCE)
            for number, (shape, dtype) in enumerate(problems)
            if is_for(case, shape)
        ]
        names = [
            name.encode()
            for kernel_set in KernelSet.ALL
            for name in kernel_set.cpp_names(torch.float32)
            if kernel_set.source == of
        ]
        return [
            str(path)
            for path in files
            if not of or any(name in path.read_bytes() for name in names)
        ]

    return make


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [program, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


# One token; several tiles and bands, an odd number of channels; a sequence of several rows of
# segments; several warps for each token.
PROBLEMS = [
    ((1, 1, 1, 1), torch.float32),
    ((1, 21, 21, 33), torch.float32),
    ((1, 2, 301, 2), torch.float32),
    ((1, 3, 5, 260), torch.float32),
    ((1, 9, 18, 3), torch.bfloat16),
]
# Compiling is most of the time of this test. Kernels of float16 are those of bfloat16 but for the
# conversions, which touch no memory; barriers do not depend on the dtype.
SANITIZED = [
    ("address, undefined", (torch.float32,)),
    pytest.param("address, undefined", (torch.bfloat16, torch.float64), marks=pytest.mark.long),
    ("thread", (torch.float32,)),
    pytest.param("thread", (torch.bfloat16,), marks=pytest.mark.long),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "dtypes"), SANITIZED, ids=str)
def test_sanitizers_have_nothing_to_report(sanitizer, dtypes, recordings):
    kernels = emulator.kernel_sources(dtypes)
    program = build_program(emulator.EMULATOR / "replay.cpp", kernels, sanitizer)
    problems, mode = list(PROBLEMS), "once"
    if sanitizer != "thread":
        problems += [(shape, torch.bfloat16) for shape, _ in PROBLEMS[:3]]
        problems.append(((1, 9, 18, 3), torch.float64))
        mode = "orders"
    done = run(program, mode, *recordings(*(p for p in problems if p[1] in dtypes)))
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert (done.stdout, done.stderr) == ("done\n", "")


PLANTED = [
    ("divergent_barrier", "none", "divergent barrier: block 0 thread"),
    ("exit_before_barrier", "none", "a barrier after a thread|a thread exits while others wait"),
    ("divergent_shuffle", "none", r"shuffle at line \d+: lane \d+ is in the one at line \d+"),
    ("exited_lane", "none", "its mask names lane 3, which does not exist or has exited|deadlock"),
    ("partial_mask", "none", "the caller or its source is not in the mask|deadlock"),
    ("unwritten_shared", "none", "a result is NaN"),
    ("oversized_block", "none", "a block has 1 to 1024 threads, got 1056"),
    ("oversized_shared", "none", "at most 65536 bytes of shared memory, got 66560"),
    ("empty_grid", "none", "1 to 2.31 - 1 blocks, got 0"),
    ("out_of_bounds", "address, undefined", "heap-buffer-overflow"),
    ("out_of_shared", "address, undefined", "heap-buffer-overflow"),
    ("misaligned", "address, undefined", "misaligned address"),
    ("missing_barrier", "thread", "data race"),
    ("race", "thread", "data race"),
    ("race_between_blocks", "thread", "data race"),
]


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize(("bug", "sanitizer", "report"), PLANTED)
def test_a_planted_bug_is_caught(bug, sanitizer, report, order):
    program = build_program(emulator.EMULATOR / "planted_bugs.cpp", (), sanitizer)
    done = run(program, bug, order)
    assert done.returncode != 0
    assert re.search(report, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_a_correct_kernel_is_not(sanitizer, order):
    program = build_program(emulator.EMULATOR / "planted_bugs.cpp", (), sanitizer)
    done = run(program, "correct", order)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


MODEL = {
    "selective_scan": (dram_model.scan_forward, dram_model.scan_backward),
    "state_fusion": (dram_model.fusion_forward, dram_model.fusion_backward),
    "structure_aware_ssm": (dram_model.ssm_forward, dram_model.ssm_backward),
    "depthwise_conv3x3 silu": (dram_model.conv_forward, dram_model.conv_backward),
    "depthwise_conv3x3_stride2": (
        dram_model.conv_stride2_forward,
        dram_model.conv_stride2_backward,
    ),
    "depthwise_conv3x3_gradients_": (dram_model.conv_backward,),
    "add_bias_": (lambda p: dram_model.add_bias(p, residual=True),),
    "gated_layer_norm": (dram_model.gate_forward, dram_model.gate_backward),
    "gated_layer_norm_gradients_": (dram_model.gate_gradients,),
    "depthwise_conv3x3_layer_norm": (dram_model.conv_norm_forward,),
    "gelu_gradients": (dram_model.gelu_gradients,),
    "layer_norm_gradients": (dram_model.layer_norm_gradients,),
    "structure_aware_ssm_from_dt": (
        lambda p: dram_model.ssm_from_dt_forward(p, rank_of(p.dim)),
        lambda p: dram_model.ssm_from_dt_backward(p, rank_of(p.dim)),
    ),
}


@pytest.mark.parametrize("element", [4, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 25, 40, 64), (2, 37, 33, 35)])
@pytest.mark.parametrize("case", MODEL)
def test_the_model_of_dram_bytes_is_what_kernels_touch(case, shape, element, tmp_path, ssm_inputs):
    """Byte by byte, for every launch of the model in spatial_mamba_d2.profiling.dram_model."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[element]
    sources = (emulator.EMULATOR / "trace.cpp", *emulator.RUNTIME)
    objects = emulator.compile_all(sources, "-O1")
    kernels = emulator.kernel_sources([dtype])
    objects += emulator.compile_all(kernels, *kernel_flags("thread"))
    recording = record(tmp_path / "recording", case, ssm_inputs(*shape, dtype))
    done = run(emulator.link(objects), str(recording))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.split(" ", 2) for line in done.stdout.splitlines())
    touched = [(name.partition("<")[0], int(read), int(written)) for read, written, name in lines]
    problem = dram_model.Problem(*shape, element, emulator.EmulatedDevice.multiprocessors)
    launches = [launch for part in MODEL[case] for launch in part(problem)]
    expected = [(x.name.partition(",")[0], x.read_bytes, x.written_bytes) for x in launches]
    assert touched == expected


BARRIER = "__syncthreads();"
BARRIERS = [
    (path.relative_to(emulator.ROOT).as_posix(), number)
    for path in sorted(emulator.ROOT.glob("ops/**/*.cuh"))
    for number in range(path.read_text().count(BARRIER))
]


# How kernels reach the barrier of a header that some include for other functions.
CALLED = {"ops/cuda/device.cuh": "block_sum("}


@pytest.mark.slow
@pytest.mark.parametrize(("header", "number"), BARRIERS)
def test_every_barrier_is_missed(header, number, tmp_path, recordings):
    """If any one of the kernels' barriers is removed, ThreadSanitizer reports a race.

    For a header that several kernels include, in the first of them that reaches the barrier.
    """
    _, of_runtime, of_linker = SANITIZERS["thread"]
    flags = kernel_flags("thread")
    objects = emulator.compile_all((emulator.EMULATOR / "replay.cpp",), *flags)
    objects += emulator.compile_all(emulator.RUNTIME, "-O1", "-g1", *of_runtime)
    mutant = tmp_path / "mutant"
    shutil.copytree(emulator.ROOT / "ops", mutant / "ops", ignore=shutil.ignore_patterns("*.so"))
    copy = mutant / header
    parts = copy.read_text().split(BARRIER)
    copy.write_text(BARRIER.join(parts[: number + 1]) + BARRIER.join(parts[number + 1 :]))
    included = f'#line 1 "{header.removeprefix("ops/")}"'
    changed = [
        source
        for source in emulator.SOURCES
        if included in bundle(source)
        and CALLED.get(header, "") in (emulator.ROOT / "ops" / source).read_text()
    ][:1]
    for source in emulator.SOURCES:
        root = mutant if source in changed else emulator.ROOT
        kernels = emulator.kernel_source(source, torch.float32)
        objects.append(emulator.compile_object(kernels, *flags, root=root))
    problems = [problem for problem in PROBLEMS if problem[1] == torch.float32]
    files = recordings(*problems, of=changed[0])
    assert files
    done = run(emulator.link(objects, *of_linker), "once", *files)
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.parametrize("case", (*CASES, *FOR_INFERENCE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_threads_changes_nothing(case, dtype, ssm_inputs):
    """Operators give the same bits: their launches as well as their sums of partial results."""
    inputs = ssm_inputs(2, 40, 33, 35, dtype)
    suite = FOR_INFERENCE.get(case)
    tensors = suite.arguments(*inputs) if suite else arguments(case, inputs)
    results = []
    for order in emulator.ORDERS:
        with emulator.emulated_cuda(order):
            if suite:
                results.append(suite.call(tensors))
                continue
            leaves = [x.requires_grad_() for x in tensors]
            output = call(case, leaves)
            results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "case", ["state_fusion", "structure_aware_ssm", "structure_aware_ssm_from_dt"]
)
def test_narrow_tiles(case, ssm_inputs, monkeypatch, request):
    """What a GPU with 100 KiB of shared memory runs, and one with more."""
    args = arguments(case, ssm_inputs(1, 13, 25, 3, torch.float32))
    output, cotangent, gradients = truth(case, args)
    leaves = [x.requires_grad_() for x in args]
    widths = []
    for shared_kib in (99, 227):
        monkeypatch.setattr(emulator.EmulatedDevice, "shared_bytes", 1024 * shared_kib)
        unload()
        request.addfinalizer(unload)
        with emulator.emulated_cuda():
            device = fusion.FORWARD.on(torch.device("cpu"), torch.float32)
            widths.append(fusion.cut((1, 13, 25, 3), 4, device).tile_width)
            actual = call(case, leaves)
            found = torch.autograd.grad(actual, leaves, cotangent.to(actual))
        assert relative_error(actual, output) <= TOLERANCE[torch.float32]
        for a, e in zip(found, gradients, strict=True):
            assert relative_error(a, e) <= GRADIENT_TOLERANCE[torch.float32]
    assert widths == [9, 13]


@pytest.mark.parametrize(
    ("element", "shared_kib", "expected"),
    [
        (4, 227, (18, 2)),  # 9.0, 10.0
        (4, 163, (18, 2)),  # 8.0
        (4, 99, (11, 2)),  # 8.6, 8.9, 12.0
        (4, 96, (11, 2)),  # 7.0
        (4, 64, (18, 1)),  # 7.5: two blocks would be mostly halo
        (8, 99, (8, 1)),
        (8, 227, (8, 2)),
    ],
)
def test_tiles_are_as_wide_as_two_blocks_allow(element, shared_kib, expected):
    assert fusion.widest_tile(element, 1024 * shared_kib) == expected
    width, resident = expected
    assert resident * fusion.tile_bytes(width, element) <= 1024 * shared_kib


def test_a_map_that_is_too_long_is_refused():
    """Kernels add offsets of 32 bits within a segment."""
    with pytest.raises(ValueError, match=r"less than 2\^26 rows, columns and channels, got \[1, 1"):
        fusion.cut((1, 1, 2**26, 1), 4, emulator.EmulatedDevice)
    assert fusion.cut((1, 2**26 - 1, 1, 1), 4, emulator.EmulatedDevice).height == 2**26 - 1


def test_addresses_in_a_map_of_more_than_2_31_elements():
    done = run(build_program(emulator.EMULATOR / "large_map.cpp", (), "none"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bad_arguments_are_named(ssm_inputs):
    """Also by the operators themselves, which the functions' checks do not protect."""
    u, delta, A, B, C, D, bias, taps = ssm_inputs(2, 4, 5, 3)
    operators = torch.ops.spatial_mamba
    with emulator.emulated_cuda():
        with pytest.raises(ValueError, match=r"structure_aware_ssm: C must be \[2, 4, 5\], got \["):
            operators.structure_aware_ssm(u, delta, A, B, C[:, 0, 0], D, bias, taps)
        with pytest.raises(ValueError, match=r"selective_scan: u must be \[B, L, D\] with L, D"):
            operators.selective_scan(u, delta, A, B, bias)
        with pytest.raises(ValueError, match="state_fusion: taps must be on cpu, got meta"):
            operators.state_fusion.default.redispatch(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), u, taps.to("meta")
            )


def test_an_argument_of_another_size_is_refused(ssm_inputs):
    """What the launch code passes has the size of the kernel's struct."""
    with emulator.emulated_cuda():
        kernels = fusion.FORWARD.on(torch.device("cpu"), torch.float32)
        with pytest.raises(RuntimeError, match="its argument has 88 bytes, got 8"):
            kernels.fuse(1, 8, 64512, 0)


def test_a_grid_that_is_too_large_is_refused():
    with emulator.emulated_cuda():
        kernels = fusion.FORWARD.on(torch.device("cpu"), torch.float32)
        for blocks in (0, 2**31):
            with pytest.raises(ValueError, match=f"blocks must be 1 to 2.31 - 1, got {blocks}"):
                kernels.fuse(blocks, 8, 0, *([0] * 11))
