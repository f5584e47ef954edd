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

#: old name -> new name, without the package
NEW_NAMES = {
    "allocator": "system.allocator",
    "analysis": "profiling.model_size",
    "atomic": "system.atomic",
    "benchmark": "profiling.benchmark",
    "classification.run": "classification.train",
    "conversion": "models.checkpoints.convert",
    "cuda_report": "profiling.cuda_report",
    "cuda_toolkit": "system.cuda_toolkit",
    "data.stream": "data.samplers",
    "data.workers": "system.workers",
    "detection.datasets": "detection.data",
    "detection.loader": "detection.data",
    "detection.run": "detection.train",
    "models.flops": "profiling.flops",
    "models.inference": "models.optimized",
    "models.reading": "models.checkpoints.reading",
    "models.weights": "models.checkpoints.loading",
    "optimization": "models.param_groups",
    "segmentation.pictures": "segmentation.visualize",
    "segmentation.run": "segmentation.train",
    "training.launch": "training.fit",
}


def _new_name(old_name: str) -> str:
    return f"{PACKAGE}.{NEW_NAMES[old_name.removeprefix(PACKAGE + '.')]}"


def _warn(old_name: str) -> None:
    """Warn at the line that called the caller, not counting frames of the import system."""
    warnings.warn(
        f"{old_name} is now {_new_name(old_name)}; the old name will be removed in {REMOVED_IN}",
        DeprecationWarning,
        stacklevel=3,
    )


class _RenamedModule(ModuleType):
    """Stands for a module under its old name; its attributes are those of the new module."""

    def __getattr__(self, name: str) -> object:
        value = getattr(importlib.import_module(_new_name(self.__name__)), name)
        # Here too, because only the first import of a module in a process reaches the finder; but
        # names such as __path__ are looked up by the import system, not by the user.
        if not name.startswith("__"):
            _warn(self.__name__)
        return value

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(_new_name(self.__name__)))


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
        importlib.import_module(_new_name(module.__name__))


def install() -> None:
    """Make the old names importable. The finder comes last: it sees only what no other finds."""
    if RenamedModuleFinder not in sys.meta_path:
        sys.meta_path.append(RenamedModuleFinder)
