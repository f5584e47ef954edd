"""The package's folders and the compiled operators; everything else is in pyproject.toml.

Without compiled operators, plain PyTorch ones are used. A compilation that is impossible or fails
is therefore explained in one line and does not fail the installation, unless requested otherwise:

* ``SMD2_BUILD_NATIVE=0`` compiles nothing; ``=1`` makes it an error if the CPU operators cannot be
  compiled;
* ``SMD2_BUILD_CUDA=0`` and ``=1`` do the same for the CUDA operators only.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# Older ones describe the schema of pyproject.toml instead of saying so.
(REQUIRED,) = re.findall(
    r'^requires = \["(setuptools>=.*)"\]',
    (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
    re.MULTILINE,
)
if int(setuptools.__version__.split(".")[0]) < int(re.findall(r"\d+", REQUIRED)[0]):
    raise SystemExit(
        f"spatial_mamba_d2 needs {REQUIRED}, but this is setuptools {setuptools.__version__}: "
        f"{sys.executable} -m pip install '{REQUIRED}'"
    )


def load_source(path):
    """A module of these sources, even if another version of the package is installed."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_toolkit = load_source("spatial_mamba_d2/system/cuda_toolkit.py")

# Python's own flags ask for it, which nearly doubles the time of compilation, and makes the library
# 15 times as large.
NO_DEBUG_INFO = "-g0"
SWITCHES = {
    "spatial_mamba_d2.ops._C": ("operators", "SMD2_BUILD_NATIVE"),
    "spatial_mamba_d2.ops._cuda": ("CUDA operators", "SMD2_BUILD_CUDA"),
}


def native_build():
    """The arguments of ``setup()`` that compile as many of the operators as possible."""
    try:
        check_compiler()
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        reason = f"{error}: pip needs --no-build-isolation to see the installed PyTorch"
        return explain_both(reason)
    except RuntimeError as error:
        return explain_both(error)

    class BuildNative(BuildExtension):
        """Compiles the libraries separately, so that each is built even if the other fails."""

        def build_extensions(self):
            wanted, built = self.extensions, []
            for extension in wanted:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:  # compilers fail in many ways
                    explain(extension.name, f"compiling failed: {error}")
            self.extensions = built

    return {
        "ext_modules": [cpu_extension(), *cuda_extensions()],
        "cmdclass": {"build_ext": BuildNative},
    }


def check_compiler():
    """Raise ``RuntimeError`` if compilation is disabled or impossible."""
    compiler = os.environ.get("CXX", "c++")
    if os.environ.get("SMD2_BUILD_NATIVE") == "0":
        raise RuntimeError("SMD2_BUILD_NATIVE is 0")
    if sys.platform == "win32":
        raise RuntimeError("not supported on Windows, because the sources need GCC or Clang")
    if not shutil.which(compiler.split()[0]):
        raise RuntimeError(f"no C++ compiler {compiler}; install one, or set CXX")


def sources(*patterns):
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return CppExtension(
        "spatial_mamba_d2.ops._C",
        sources("ops/*/cpu.cpp", "ops/schemas.cpp"),
        depends=sources("ops/**/*.h"),
        extra_compile_args=[
            "-O3",
            NO_DEBUG_INFO,
            "-Wno-psabi",  # vectors are passed only between inlined functions
            "-Wno-ignored-attributes",
            *openmp,
        ],
        extra_link_args=openmp,
    )


def cuda_extensions():
    """The library for CUDA devices, if a toolkit is found that matches PyTorch."""
    name = "spatial_mamba_d2.ops._cuda"
    try:
        if os.environ.get("SMD2_BUILD_CUDA") == "0":
            raise cuda_toolkit.NoToolkitError("SMD2_BUILD_CUDA is 0")
        import torch

        toolkit = cuda_toolkit.find_toolkit(torch.version.cuda)
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")  # read by PyTorch itself
        names = [] if chosen else cuda_toolkit.architectures(toolkit)
        if not (chosen or names):
            raise cuda_toolkit.NoToolkitError(
                f"CUDA {toolkit.version} supports none of the architectures "
                f"{', '.join(cuda_toolkit.ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST"
            )
    except cuda_toolkit.NoToolkitError as error:
        explain(name, error)
        return []
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit.home)  # its guess may be a wrapper script's folder
    print(f"spatial_mamba_d2: CUDA operators with {toolkit.home}", file=sys.stderr)
    return [
        cpp_extension.CUDAExtension(
            name,
            sources("ops/*/cuda_glue.cpp", "ops/*/cuda.cu", "ops/cuda/build.cpp"),
            depends=sources("ops/**/*.h", "ops/**/*.cuh"),
            define_macros=[("SMD2_CUDA_ARCHITECTURES", f'"{chosen or " ".join(names) + "+PTX"}"')],
            extra_compile_args={
                "cxx": ["-O2", NO_DEBUG_INFO],
                "nvcc": ["-O3", *(cuda_toolkit.architecture_flags(names) if names else [])],
            },
        )
    ]


def explain(extension, reason):
    """Print in one line why something is not compiled, or exit if it was requested."""
    what, switch = SWITCHES[extension]
    message = f"spatial_mamba_d2: {what} are not compiled: {reason}"
    if os.environ.get(switch) == "1":
        raise SystemExit(message)
    print(message, file=sys.stderr)
    return {}


def explain_both(reason):
    if os.environ.get("SMD2_BUILD_CUDA") == "1":
        explain("spatial_mamba_d2.ops._cuda", reason)
    return explain("spatial_mamba_d2.ops._C", reason)


setup(
    packages=[
        *find_packages(include=["spatial_mamba_d2", "spatial_mamba_d2.*"]),
        "spatial_mamba_d2.ops",
        *(f"spatial_mamba_d2.ops.{name}" for name in find_packages("ops")),
        "spatial_mamba_d2.configs",
    ],
    package_dir={"spatial_mamba_d2.ops": "ops", "spatial_mamba_d2.configs": "configs"},
    **native_build(),
)
