"""Generated data trees: written once, and never over anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spatial_mamba_d2.system.atomic import new_folder

Parameters = dict[str, Any]


def create_tree(
    root: Path,
    parameters: Parameters,
    *,
    write: Callable[[Path], None],
    read_parameters: Callable[[Path], Iterable[Any]],
) -> None:
    """Generate the data in ``root`` unless they are there already, made with ``parameters``.

    The tree appears under its name only when it is complete, so an interrupted call leaves no
    incomplete tree; it may leave a hidden folder ``.NAME-*`` next to it.

    Args:
        root: the folder to create. It may exist if it is empty or holds the very same data.
        write: writes the tree into an empty folder; ``read_parameters`` must find
            ``parameters`` in it.
        read_parameters: reads what a tree says that it was made with. ``OSError``, ``ValueError``,
            ``KeyError`` and ``TypeError`` mean that the folder holds something else.

    Raises:
        ValueError: ``root`` holds anything else.
    """
    if _is_complete(root, parameters, read_parameters):
        return
    with new_folder(root) as tree:
        write(tree)
    # Another process may have created the tree meanwhile, with other parameters.
    _is_complete(root, parameters, read_parameters)


def _is_complete(
    root: Path, parameters: Parameters, read_parameters: Callable[[Path], Iterable[Any]]
) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = list(read_parameters(root))
    except (OSError, ValueError, KeyError, TypeError):
        found = ["something else"]
    for other in found:
        if other != parameters:
            raise ValueError(
                f"root must be absent, empty, or hold sample data made with {parameters}; {root} "
                f"holds {other}. Delete it, or name another folder"
            )
    return True
