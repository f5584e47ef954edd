"""Spatial-Mamba backbones for detection in Detectron2, semantic segmentation and classification.

Import the subpackage that you need: :mod:`spatial_mamba_d2.models`,
:mod:`spatial_mamba_d2.detection`, :mod:`spatial_mamba_d2.segmentation`, ... Importing the package
alone suffices for loading a saved graph of a model.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"


def _find_installed() -> list[str]:
    """``__path__``: of this package, unless it is a folder of sources that hides an installed one.

    In the folder of the sources, ``python -m`` and an interactive Python find it before the
    installed package. The operators are missing in it, because they are in ``ops/`` next to it: an
    editable installation finds them there; otherwise the installed package is used.
    """
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    if any(finder.find_spec(f"{__name__}.ops", __path__) for finder in finders):
        return __path__
    installed = (Path(entry or ".", __name__).resolve() for entry in sys.path)
    complete = (str(folder) for folder in installed if (folder / "ops/__init__.py").is_file())
    return next(([folder] for folder in complete), __path__)


__path__ = _find_installed()

from spatial_mamba_d2.system import after_import, renamed  # noqa: E402  from the folder that was found


def _define_operators() -> None:
    """Saved graphs (``.pt2``, TorchScript) hold operators of ours, which PyTorch then knows."""
    try:
        import spatial_mamba_d2.ops  # noqa: F401
    except ImportError:
        pass  # of a backend that is not there: an error when a model is built


renamed.install()
after_import.after_import("torch", _define_operators)
