"""The compiled CPU kernels under the address and undefined-behaviour sanitizers.

Compiling them takes minutes: ``python3 dev.py test -m long tests/ops/test_sanitizers.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from spatial_mamba_d2.ops import _extension

OPS = Path(_extension.__file__).parent
HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# The beginning of every source file. The compiler's time is most of this test's: PyTorch's headers
# are compiled once, the kernels are not inlined, which makes six times less code to check, and
# those for float64, which go through memory as those for float32 do, are left out.
PRECOMPILED = """
#include "ops/stable.h"
#include <cmath>
#define always_inline
"""
FLOAT64 = (
    ("cpu/tensors.h", r"THO_DISPATCH_CASE\(ScalarType::Double, __VA_ARGS__\)", 2),
    ("structure_aware_ssm/cpu_forward.cpp", r"template void .*<double>&\);", 1),
)
RUN_AVX512 = "return run_avx512<Kernel>(args);"
# Tiny, odd and narrow maps; several images and rows; full and partial blocks of channels.
PROGRAM = """
import sys, torch
from spatial_mamba_d2 import ops

torch.ops.load_library(sys.argv[1])
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((1, 1, 1, 1), (2, 3, 7, 5), (1, 13, 4, 17), (2, 2, 19, 40), (1, 12, 1, 16)):
        dim = shape[-1]
        def leaf(*shape):
            return torch.randn(shape).to(dtype).requires_grad_()
        u, delta, B, C = leaf(*shape), leaf(*shape), leaf(*shape[:3]), leaf(*shape[:3])
        A, D, bias = leaf(dim), leaf(dim), leaf(dim)
        taps, weight = leaf(25, dim), leaf(dim, 1, 3, 3)
        boxes = torch.tensor([[0, -9.0, -9, 9, 5], [0, 3, 2, 70, 80], [0, 1, 1, 1, 1]])
        for threads in (1, 4):
            torch.set_num_threads(threads)
            outputs = (
                ops.structure_aware_ssm(u, delta, A, B, C, D, bias, taps),
                ops.selective_scan(u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), bias),
                ops.state_fusion(u, taps),
                ops.depthwise_conv3x3(u, weight, bias, True),
                ops.depthwise_conv3x3(u.transpose(1, 2), weight, bias, False),
                ops.depthwise_conv3x3_stride2(u, weight, bias),
                ops.depthwise_conv3x3_stride2(u.transpose(1, 2), weight, bias),
                ops.gated_layer_norm(u, delta, D, bias),
                ops.roi_align(u, boxes, 3, 2, 0.25),
            )
            sum(output.sum().float() for output in outputs).backward()
            with torch.no_grad():
                ops.depthwise_conv3x3_layer_norm(u, weight, bias, A, D)
                steps = (torch.randn(*shape[:3], 3), taps[:3].T)
                ops.structure_aware_ssm_from_dt_(u.clone(), *steps, A, B, C, D, bias, taps)
                kernels, offset = torch.randn(dim + 3, dim, 3, 3), torch.randn(dim + 3)
                ops.winograd_conv3x3(u, ops.winograd_weight(kernels), offset, True)
                ops.quantize_uint8(u, 0.02, 100)
                ops.gelu_gradients(delta, u)
                ops.layer_norm_gradients(delta, u, u, D, bias)
                of_u, of_z = torch.empty(*shape[:3], 2 * dim).to(dtype).chunk(2, -1)
                for residual in (True, False):
                    ops.depthwise_conv3x3_gradients_(of_u, delta, u, weight, bias, residual)
                ops.gated_layer_norm_gradients_(of_z, delta, u, delta, D, bias)
print("clean")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The CPU kernels, compiled as by ``setup.py``, but with sanitizers and for this processor."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or not compiler:
        pytest.skip("needs the sanitizers of g++ on Linux")
    folder = tmp_path_factory.mktemp("sanitized")
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", *SANITIZE]
    flags += ["-Wno-psabi", "-Wno-ignored-attributes"]
    shutil.copytree(OPS, folder / "ops", ignore=shutil.ignore_patterns("*.py", "*.so"))
    for name, pattern, count in FLOAT64:
        text, found = re.subn(pattern, "", (folder / "ops" / name).read_text())
        assert found == count
        (folder / "ops" / name).write_text(text)
    start = folder / "start.h"
    start.write_text(PRECOMPILED)

    def compile(source, target, *more):
        command = [compiler, *flags, *includes, *more, str(source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True)

    done = compile(start, f"{start}.gch", "-x", "c++-header")
    if "sanitize" in done.stderr and done.returncode:
        pytest.skip(f"this g++ has no sanitizers: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    versions = folder / "ops/cpu/multiversion.h"
    if not HAS_AVX512:
        text = versions.read_text()
        assert text.count(RUN_AVX512) == 1
        versions.write_text(text.replace(RUN_AVX512, "break;"))
    sources = sorted(folder.glob("ops/*/cpu*.cpp"))
    objects = [folder / f"{source.parent.name}_{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        options = ("-Winvalid-pch", "-include", str(start), "-c")
        results = pool.map(lambda *files: compile(*files, *options), sources, objects)
    for target, done in zip(objects, results, strict=True):
        assert done.returncode == 0, f"{target.name}: {done.stderr[-3000:]}"
    path = folder / "sanitized.so"
    torch_libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    torch_libraries += ["-ltorch_cpu"]
    command = [compiler, "-shared", *SANITIZE, *objects]
    subprocess.run([*command, *torch_libraries, "-o", path], check=True)
    return path


def runtime(name):
    """The sanitizer's library, which a program compiled without it has to load first."""
    path = subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(path):
        pytest.skip(f"{name} is not installed")
    return path


def test_the_program_calls_every_kernel():
    sources = "".join(path.read_text() for path in OPS.glob("*/cpu.cpp"))
    kernels = re.findall(r'm\.impl\(\s*"(\w+?)(?:_backward)?"', sources)
    missing = [name for name in kernels if f"ops.{name}(" not in PROGRAM]
    assert len(kernels) > 10 and not missing


@pytest.mark.long
@pytest.mark.parametrize("capability", ["avx512", "avx2", "baseline"])
def test_kernels_are_clean(library, capability):
    if capability == "avx512" and not HAS_AVX512:
        pytest.skip("this processor has no AVX-512")
    env = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and PyTorch's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SMD2_BACKEND": "eager",  # so that the package loads no library of its own
        "SMD2_CPU_CAPABILITY": capability,
    }
    command = [sys.executable, "-c", PROGRAM, str(library)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-5000:]
