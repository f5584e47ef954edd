"""Old names of modules, which keep working for one version with a ``DeprecationWarning``.

``import spatial_mamba_d2`` imports this module, which therefore does without ``importlib.abc``:
importing that takes several times as long as all the rest.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "spatial_mamba_d2"
REMOVED_IN = "0.2"

#: old name -> new name, without the package; several where a module was divided
NEW_NAMES: dict[str, str | tuple[str, ...]] = {
    "allocator": "system.allocator",
    "analysis": ("profiling.model_size", "profiling.model_report"),
    "atomic": "system.atomic",
    "benchmark": tuple(
        f"profiling.{n}"
        for n in ("benchmark", "benchmark_report", "candidates", "gemm_peak", "memory")
    ),
    "classification.run": "classification.train",
    "conversion": "models.checkpoints.convert",
    "cuda_report": tuple(
        f"profiling.{n}" for n in ("cuda_report", "dram_model", "kernel_resources")
    ),
    "data.stream": "data.samplers",
    "data.workers": "system.workers",
    "detection.datasets": "detection.data",
    "detection.loader": "detection.data",
    "detection.run": "detection.train",
    "models.flops": "profiling.flops",
    "models.inference": "models.optimized",
    "models.reading": "models.checkpoints.reading",
    "models.weights": tuple(f"models.checkpoints.{n}" for n in ("loading", "names", "reading")),
    "ops.low_rank_structure_aware_ssm": "ops.structure_aware_ssm_from_dt",
    "optimization": "models.param_groups",
    "segmentation.pictures": "segmentation.visualize",
    "segmentation.run": "segmentation.train",
    "training.launch": "training.fit",
}


def _new_names(old_name: str) -> list[str]:
    new = NEW_NAMES[old_name.removeprefix(PACKAGE + ".")]
    return [f"{PACKAGE}.{name}" for name in ((new,) if isinstance(new, str) else new)]


def _new_modules(old_name: str) -> list[ModuleType]:
    return [importlib.import_module(name) for name in _new_names(old_name)]


def _warn(old_name: str) -> None:
    """Warn at the line that called the caller, not counting frames of the import system."""
    new = " and ".join(_new_names(old_name))
    warnings.warn(
        f"{old_name} is now {new}; the old name will be removed in {REMOVED_IN}",
        DeprecationWarning,
        stacklevel=3,
    )


class _RenamedModule(ModuleType):
    """Stands for a module under its old name; its attributes are those of the new module."""

    def __getattr__(self, name: str) -> object:
        modules = _new_modules(self.__name__)
        home = next((module for module in modules if hasattr(module, name)), modules[0])
        value = getattr(home, name)
        # Here too, because only the first import of a module in a process reaches the finder; but
        # names such as __path__ are looked up by the import system, not by the user.
        if not name.startswith("__"):
            _warn(self.__name__)
        return value

    def __dir__(self) -> list[str]:
        return sorted({name for module in _new_modules(self.__name__) for name in dir(module)})


class RenamedModuleFinder:
    """Finds and loads modules by their old names; an entry of ``sys.meta_path``."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old_name = name.partition(".")
        if package != PACKAGE or old_name not in NEW_NAMES:
            return None
        return ModuleSpec(name, cls())  # type: ignore[arg-type]  # not derived from Loader, see above

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _RenamedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        _warn(module.__name__)
        _new_modules(module.__name__)


def install() -> None:
    """Make the old names importable. The finder comes last: it sees only what no other finds."""
    if RenamedModuleFinder not in sys.meta_path:
        sys.meta_path.append(RenamedModuleFinder)
