"""The package's folders and the compiled operators; everything else is in pyproject.toml.

Without compiled operators, plain PyTorch ones are used. A compilation that is impossible or fails
is therefore explained in one line and does not fail the installation, unless requested otherwise:

``SMD2_BUILD_NATIVE=0`` compiles nothing; ``=1`` makes it an error if the operators cannot be
compiled. Kernels for CUDA are not compiled here, but at their first call (``ops/cuda``).
"""

import os
import re
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def from_pyproject(pattern):
    """The group of the line that matches; Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (value,) = re.findall(f"^{pattern}$", text, re.MULTILINE)
    return value


# Older ones describe the schema of pyproject.toml instead of saying so.
REQUIRED = from_pyproject(r'requires = \["(setuptools>=.*)"\]')
if int(setuptools.__version__.split(".")[0]) < int(re.findall(r"\d+", REQUIRED)[0]):
    raise SystemExit(
        f"spatial_mamba_d2 needs {REQUIRED}, but this is setuptools {setuptools.__version__}: "
        f"{sys.executable} -m pip install '{REQUIRED}'"
    )


# Top-level folders that are installed as subpackages, next to ops
BESIDE_THE_PACKAGE = ("configs", "tools", "datasets")
# Python's own flags ask for it, which nearly doubles the time of compilation, and makes the library
# 15 times as large.
NO_DEBUG_INFO = "-g0"


def native_build():
    """The arguments of ``setup()`` that compile the operators, if possible."""
    try:
        check_compiler()
        check_torch()
        from setuptools.command.bdist_wheel import bdist_wheel
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        reason = f"{error}: pip needs --no-build-isolation to see the installed PyTorch"
        return explain(reason)
    except RuntimeError as error:
        return explain(error)

    class BuildNative(BuildExtension):
        """Leaves out the library if it cannot be compiled.

        It does not depend on Python, so its name does not say for which one it was compiled.
        """

        def get_ext_filename(self, fullname):
            return f"{fullname.replace('.', os.sep)}.so"

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # compilers fail in many ways
                explain(f"compiling failed: {error}")
                self.extensions = []

    class AnyPython(bdist_wheel):
        """A wheel for one platform and every Python."""

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    commands = {"build_ext": BuildNative, "bdist_wheel": AnyPython}
    return {"ext_modules": [cpu_extension()], "cmdclass": commands}


def check_compiler():
    """Raise ``RuntimeError`` if compilation is disabled or impossible."""
    compiler = os.environ.get("CXX", "c++")
    if os.environ.get("SMD2_BUILD_NATIVE") == "0":
        raise RuntimeError("SMD2_BUILD_NATIVE is 0")
    if sys.platform == "win32":
        raise RuntimeError("not supported on Windows, because the sources need GCC or Clang")
    if not shutil.which(compiler.split()[0]):
        raise RuntimeError(f"no C++ compiler {compiler}; install one, or set CXX")


def check_torch():
    """Raise ``RuntimeError`` if the stable ABI of the installed PyTorch has too little."""
    import torch

    text = (ROOT / "ops/stable.h").read_text(encoding="utf-8")
    oldest = re.findall(r"\((\d+)ULL << ", text)
    if [*map(int, torch.__version__.split(".")[:2])] < [*map(int, oldest)]:
        raise RuntimeError(
            f"they need PyTorch {'.'.join(oldest)} or newer, but this is {torch.__version__}"
        )


def sources(*patterns):
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def cpu_extension():
    from setuptools import Extension
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "spatial_mamba_d2.ops._C",
        sources("ops/*/cpu*.cpp", "ops/schemas.cpp"),
        depends=sources("ops/**/*.h"),
        language="c++",
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args=[
            "-O3",
            NO_DEBUG_INFO,
            f"-fmacro-prefix-map={ROOT}/=",  # error messages name files of this repository
            "-fvisibility=hidden",  # as that of the stable ABI, which would warn
            "-Wno-psabi",  # vectors are passed only between inlined functions
            "-Wno-ignored-attributes",
        ],
        py_limited_api=True,  # so that nothing of Python's is linked
    )


def public_page():
    """The arguments of ``setup()`` about the package's page, whose links work on any host."""
    repository = from_pyproject(r'repository = "(.*)"').rstrip("/")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)"

    def absolute(link):
        image, label, path = link.groups()
        if not repository:
            return "" if image else label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/main/{path})"

    page = {
        "long_description": re.sub(relative, absolute, text),
        "long_description_content_type": "text/markdown",
    }
    if repository:
        page["project_urls"] = {
            "Repository": repository,
            "Documentation": f"{repository}/tree/main/docs",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }
    return page


def explain(reason):
    """Print in one line why nothing is compiled, or exit if it was requested."""
    message = f"spatial_mamba_d2: operators are not compiled: {reason}"
    if os.environ.get("SMD2_BUILD_NATIVE") == "1":
        raise SystemExit(message)
    print(message, file=sys.stderr)
    return {}


setup(
    packages=[
        *find_packages(include=["spatial_mamba_d2", "spatial_mamba_d2.*"]),
        "spatial_mamba_d2.ops",
        *(f"spatial_mamba_d2.ops.{name}" for name in find_packages("ops")),
        *(f"spatial_mamba_d2.{name}" for name in BESIDE_THE_PACKAGE),
    ],
    package_dir={f"spatial_mamba_d2.{name}": name for name in ("ops", *BESIDE_THE_PACKAGE)},
    **public_page(),
    **native_build(),
)
