"""Where the package's folders lie, and the compiled operators; pyproject.toml has the rest."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def native_build():
    """Arguments of ``setup()`` that compile the CPU operators, where that is possible.

    The operators run without, in plain PyTorch. ``SMD2_BUILD_NATIVE=0`` does not even try, ``=1``
    makes a failure an error.
    """
    wish = os.environ.get("SMD2_BUILD_NATIVE", "")
    compiler = os.environ.get("CXX", "c++")
    try:
        if wish == "0":
            raise RuntimeError("SMD2_BUILD_NATIVE is 0")
        if sys.platform == "win32":
            raise RuntimeError("the sources need GCC or Clang, and this is Windows")
        if not shutil.which(compiler.split()[0]):
            raise RuntimeError(f"no C++ compiler {compiler}; install one, or set CXX")
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return explain(
            wish, f"{error}: pip needs --no-build-isolation to see the installed PyTorch"
        )
    except RuntimeError as error:
        return explain(wish, error)

    class BuildNative(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # whatever a compiler can do wrong
                explain(wish, f"compiling failed: {error}")
                self.extensions = []

    extension = CppExtension(
        "spatial_mamba_d2.ops._C",
        [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("ops/*/cpu.cpp"))],
        depends=[path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("ops/*/*.h"))],
        extra_compile_args=[
            "-O3",
            "-Wno-psabi",  # vectors are passed between inlined functions only
            "-Wno-ignored-attributes",
            *([] if sys.platform == "darwin" else ["-fopenmp"]),
        ],
        extra_link_args=[] if sys.platform == "darwin" else ["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


def explain(wish, reason):
    message = f"spatial_mamba_d2: operators are not compiled: {reason}"
    if wish == "1":
        raise SystemExit(message)
    print(message, file=sys.stderr)
    return {}


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
