"""Where the files are that come with the package: recipes, and the scripts of the tools."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def top_level_folder(name: str) -> Path:
    """``configs``, ``tools``, ``datasets``: next to the package, in an installation inside it."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipe_file(name: str) -> Path:
    """``configs/NAME.yaml``."""
    return top_level_folder("configs") / f"{name}.yaml"


def find_recipe(path: str | Path) -> Path:
    """``path``, or the recipe of that name if there is no such file.

    ``NAME.yaml`` and ``configs/NAME.yaml`` name a recipe, so that the documentation's commands work
    in any folder.
    """
    path = Path(path)
    named = path.parent in (Path(), Path("configs"))
    recipe = top_level_folder("configs") / path.name
    return recipe if named and not path.exists() and recipe.is_file() else path
