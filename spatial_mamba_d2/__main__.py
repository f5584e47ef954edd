"""``spatial-mamba-d2 TOOL ...``: the scripts of ``tools/`` and ``datasets/``, without a checkout.

    spatial-mamba-d2 train_seg --config-file configs/upernet_spatial_mamba_t.yaml --eval-only \\
        MODEL.WEIGHTS upernet_tiny.pth

is ``python tools/train_seg.py ...`` of a checkout, with the same arguments and results. Recipes are
found in the package, unless there is such a file. ``torchrun -m spatial_mamba_d2 TOOL ...`` starts
it in several processes.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser
from spatial_mamba_d2.system.package_files import top_level_folder


def find_tools() -> dict[str, Path]:
    """Name of each tool -> its script."""
    tools = {"doctor": Path(__file__).with_name("doctor.py")}
    for folder in ("tools", "datasets"):
        scripts = sorted(top_level_folder(folder).glob("*.py"))
        tools |= {script.stem: script for script in scripts}
    return tools


def summary(script: Path) -> str:
    """The first line of its docstring."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def main() -> None:
    tools, words = find_tools(), sys.argv[1:]
    if words and words[0] in tools:
        script = str(tools[words[0]])
        sys.argv = [script, *words[1:]]
        # As the interpreter would run it, because further processes are started by its name.
        runpy.run_path(script, run_name="__main__")
        return
    parser = build_parser("Run a tool of spatial_mamba_d2; TOOL --help explains each.")
    lines = [f"  {name:24}{summary(script)}" for name, script in tools.items()]
    parser.epilog = "\n".join(["tools:", *lines])
    parser.add_argument("tool", metavar="TOOL", choices=tools, help="one of those below")
    parser.add_argument("args", nargs="*", help="its arguments")
    parser.parse_args(words)


if __name__ == "__main__":
    main()
