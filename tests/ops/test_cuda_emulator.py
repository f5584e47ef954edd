"""The CUDA kernels under sanitizers, and a check that the emulator finds bugs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from spatial_mamba_d2.profiling import dram_model

from . import emulator

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


def build_program(main: Path, kernels: tuple[Path, ...], sanitizer: str) -> Path:
    """``main``, the kernels and the emulator's runtime, linked; skips without a compiler."""
    of_kernels, of_runtime, of_linker = SANITIZERS[sanitizer]
    objects = emulator.compile_all((main, *kernels), "-O1", "-g1", *of_kernels)
    objects += emulator.compile_all(
        (emulator.EMULATOR / "simt_emulator.cpp",), "-O1", "-g1", *of_runtime
    )
    return emulator.link(objects, *of_linker)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [program, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_have_nothing_to_report(sanitizer):
    program = build_program(emulator.EMULATOR / "exercise.cpp", emulator.KERNELS, sanitizer)
    done = run(program, *([] if sanitizer == "thread" else ["orders"]))
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


@pytest.mark.parametrize("element", [4, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 25, 40, 64), (2, 37, 33, 35)])
def test_the_model_of_dram_bytes_is_what_kernels_touch(shape, element):
    """Byte by byte, for every launch of the model in spatial_mamba_d2.profiling.dram_model."""
    sources = (emulator.EMULATOR / "trace.cpp", emulator.EMULATOR / "simt_emulator.cpp")
    objects = emulator.compile_all(sources, "-O1")
    objects += emulator.compile_all(emulator.KERNELS, "-O1", "-fsanitize=thread")
    dtype = {4: "float32", 2: "bfloat16"}[element]
    done = run(emulator.link(objects), *map(str, shape), dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.split(" ", 2) for line in done.stdout.splitlines())
    touched = [(name, int(read), int(written)) for read, written, name in lines]
    problem = dram_model.Problem(*shape, element_bytes=element, num_multiprocessors=4)
    launches = [
        *dram_model.scan_forward(problem),
        *dram_model.scan_backward(problem),
        *dram_model.fusion_forward(problem),
        *dram_model.fusion_backward(problem),
        *dram_model.ssm_forward(problem),
        *dram_model.ssm_backward(problem),
    ]
    assert touched == [(x.name, x.read_bytes, x.written_bytes) for x in launches]


BARRIER = "__syncthreads();"
BARRIERS = [
    (path.relative_to(emulator.ROOT).as_posix(), number)
    for path in sorted(emulator.ROOT.glob("ops/**/*.cuh"))
    for number in range(path.read_text().count(BARRIER))
]


@pytest.mark.slow
@pytest.mark.parametrize(("header", "number"), BARRIERS)
def test_every_barrier_is_missed(header, number, tmp_path):
    """If any one of the kernels' barriers is removed, ThreadSanitizer reports a race."""
    of_kernels, of_runtime, of_linker = SANITIZERS["thread"]
    flags = ("-O1", "-g1", *of_kernels)
    sources = (emulator.EMULATOR / "exercise.cpp", *emulator.KERNELS)
    objects = emulator.compile_all(sources, *flags)
    objects += emulator.compile_all(
        (emulator.EMULATOR / "simt_emulator.cpp",), "-O1", "-g1", *of_runtime
    )
    shutil.copytree(emulator.ROOT / "ops", tmp_path / "ops", ignore=shutil.ignore_patterns("*.so"))
    copy = tmp_path / header
    parts = copy.read_text().split(BARRIER)
    copy.write_text(BARRIER.join(parts[: number + 1]) + BARRIER.join(parts[number + 1 :]))
    folder = "state_fusion" if "fusion" in header else "selective_scan"
    # The linker takes the first of several definitions of a kernel.
    mutant = emulator.compile_object(tmp_path / f"ops/{folder}/cuda.cu", *flags)
    kept = [path for path in objects if not path.name.startswith(f"{folder}-cuda-")]
    done = run(emulator.link([mutant, *kept], *of_linker))
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.parametrize("name", emulator.OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_threads_changes_nothing(name, dtype, ssm_inputs):
    """Operators give the same bits: their launches as well as their sums of partial results."""
    emulator.load()
    u, delta, A, B, C, D, bias, taps = ssm_inputs(2, 40, 33, 35, dtype)
    arguments = {
        "selective_scan": [u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), bias],
        "state_fusion": [u, taps],
        "structure_aware_ssm": [u, delta, A, B, C, D, bias, taps],
    }[name.removesuffix("_backward")]
    if name.endswith("_backward"):
        arguments.insert(0, torch.ones_like(arguments[0]))
    results = []
    try:
        for order in emulator.ORDERS:
            torch.ops.spatial_mamba_emulated.set_thread_order(order)
            output = getattr(torch.ops.spatial_mamba_emulated, name)(*arguments)
            results.append(output if isinstance(output, tuple) else (output,))
    finally:
        torch.ops.spatial_mamba_emulated.set_thread_order("forward")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_glue_names_bad_arguments(ssm_inputs):
    emulator.load()
    u, delta, A, B, C, D, bias, taps = ssm_inputs(2, 4, 5, 3)
    with pytest.raises(ValueError, match=r"structure_aware_ssm: C must be \[2, 4, 5\], got \[2\]"):
        torch.ops.spatial_mamba_emulated.structure_aware_ssm(
            u, delta, A, B, C[:, 0, 0], D, bias, taps
        )
    with pytest.raises(ValueError, match=r"selective_scan: u must be \[B, L, D\] with L, D >= 1"):
        torch.ops.spatial_mamba_emulated.selective_scan(u, delta, A, B, bias)
