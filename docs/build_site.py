#!/usr/bin/env python3
"""Write the pages of the documentation site, for Zensical to build: ``python3 dev.py docs``.

The pages are README.md, CONTRIBUTING.md, CHANGELOG.md, datasets/README.md and docs/*.md as they
are, with links between them, and four that are generated: configuration keys from the functions
that set their defaults, command lines from ``--help`` of the tools, the API from docstrings, and
the cards of the published models.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import io
import os
import re
import runpy
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "spatial_mamba_d2"
#: files of the repository -> pages of the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "datasets/README.md": "datasets.md",
    **{f"docs/{path.name}": path.name for path in sorted(ROOT.glob("docs/*.md"))},
}
TASKS = ("detection", "segmentation", "classification")
#: what the API page lists: subpackages and modules, and of each its public names
PUBLIC = (
    *("models", "ops", "prediction", "model_zoo", "hub", "deploy"),
    *(f"{task}.{module}" for task in TASKS for module in ("config", "predict")),
)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_SETTING = re.compile(r"^\s+(\w+)\.([A-Z][A-Z0-9_.]*) = (.+)$")


def write_site(folder: Path, commands: bool = True) -> list[Path]:
    """Write all pages, and ``llms.txt``, which lists them for language models.

    Args:
        folder: where to; it is emptied before.
        commands: with the page of command lines.

    Returns:
        the pages.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = {
        page: with_links(source, (ROOT / source).read_text(encoding="utf-8"))
        for source, page in PAGES.items()
    }
    texts["configuration.md"] = configuration_page()
    texts["api.md"] = api_page()
    texts["cards.md"] = cards_page()
    if commands:
        texts["commands.md"] = commands_page()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for image in (*ROOT.glob("docs/*.jpg"), *ROOT.glob("docs/*.png")):
        shutil.copy(image, folder)
    (folder / "llms.txt").write_text(list_for_models(texts), encoding="utf-8")
    return [folder / name for name in texts]


def list_for_models(texts: Mapping[str, str]) -> str:
    """The content of ``llms.txt``, with the addresses that the pages have in the built site."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (summary,) = re.findall("^site_description: (.*)$", settings, re.MULTILINE)
    lines = ["# Spatial-Mamba", "", f"> {summary}", "", "## Pages", ""]
    for name, text in texts.items():
        address = "./" if name == "index.md" else f"{name.removesuffix('.md')}/"
        lines.append(f"- [{_title(text)}]({address})")
    return "\n".join(lines) + "\n"


def _title(text: str) -> str:
    return next(line[2:] for line in text.splitlines() if line.startswith("# "))


def repository() -> str:
    """The address of the repository, or "" as long as none is set."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall('^repository = "(.*)"$', text, re.MULTILINE)[0].rstrip("/")


def with_links(source: str, text: str) -> str:
    """A page with links to other pages; what is none is linked to the repository, or not at all."""

    def link(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if target.startswith(("http", "#", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        file = os.path.normpath(Path(source).parent / path).replace(os.sep, "/")
        if file in PAGES:
            return f"[{label}]({PAGES[file]}{'#' * bool(anchor)}{anchor})"
        if image:
            return f"![{label}]({Path(file).name})"
        return f"[{label}]({repository()}/blob/main/{file})" if repository() else f"`{file}`"

    return _LINK.sub(link, text)


def configuration_page() -> str:
    """Every key of ours, with its default and the comment next to it."""
    parts = [
        "# Configuration keys",
        "A YAML file or `KEY VALUE` on the command line sets them. An unknown key is an error that "
        "names the nearest one. Detection also has the keys of Detectron2.",
    ]
    files = {"All tasks": "config.py", **{t.capitalize(): f"{t}/config.py" for t in TASKS}}
    for title, file in files.items():
        source = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
        rows = ["| key | default | |", "| --- | --- | --- |"]
        for key, value, comment in settings(source):
            rows.append(f"| `{key}` | `{_cell(value)}` | {_cell(comment)} |")
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def settings(source: str) -> Iterator[tuple[str, str, str]]:
    """Key, default and comment of each statement ``cfg.KEY = value`` in a function that adds keys,
    unless it adds a section.
    """
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    lines = source.splitlines()
    for function in functions:
        if re.fullmatch(r"add_\w+_config|\w+_defaults", function.name):
            yield from _settings(lines[function.lineno : function.end_lineno])


def _settings(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    comment: list[str] = []
    sections = {"cfg": ""}
    for line in lines:
        stripped = line.strip()
        if section := re.match(r"\w+ = cfg\.MODEL\.SPATIAL_MAMBA = ", stripped):
            sections[section[0].split(" ")[0]] = "MODEL.SPATIAL_MAMBA."
        if stripped.startswith("# "):
            comment.append(stripped[2:])
            continue
        if (match := _SETTING.match(line)) and match[1] in sections:
            value, _, trailing = match[3].partition("  # ")
            if not re.fullmatch(r"(node|CfgNode)\(\)", value):
                words = [*comment, trailing] if trailing else comment
                yield sections[match[1]] + match[2], value, " ".join(words)
        comment = []


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands_page() -> str:
    """What ``--help`` of each tool prints."""
    files = [*sorted(ROOT.glob("tools/*.py")), *sorted(ROOT.glob("datasets/prepare_*.py"))]
    parts = ["# Command lines", "Installed, each is also `spatial-mamba-d2 NAME`, without `.py`."]
    for file in files:
        parts += [f"## {file.parent.name}/{file.name}", f"```text\n{_help(file).rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(file: Path) -> str:
    """In this process, which has imported PyTorch already."""
    printed, arguments = io.StringIO(), sys.argv
    sys.argv = [str(file), "--help"]
    sys.path.insert(0, str(file.parent))  # as for a script
    os.environ["COLUMNS"] = "100"
    try:
        with redirect_stdout(printed):
            runpy.run_path(str(file), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{file.name} --help ends with code {ended.code}") from None
    finally:
        sys.argv = arguments
        sys.path.remove(str(file.parent))
    return printed.getvalue()


def api_page() -> str:
    """Signatures and docstrings of the public names."""
    parts = ["# API", "Arguments without a comment are as their names and types say."]
    for name in PUBLIC:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        parts += [f"## `{module.__name__}`", _markdown(inspect.getdoc(module) or "")]
        for attribute, value in public_names(module):
            try:
                signature = str(inspect.signature(value))
            except ValueError:
                signature = "(...)"
            parts.append(f"### `{attribute}`")
            parts.append(f"```python\n{attribute}{signature}\n```")
            parts.append(_markdown(inspect.getdoc(value) or ""))
    return "\n\n".join(parts) + "\n"


def cards_page() -> str:
    """The published models' cards, as :func:`~spatial_mamba_d2.hub.save_pretrained` writes them."""
    from spatial_mamba_d2 import model_card, model_zoo

    parts = [
        "# Model cards",
        "What `hub.save_pretrained` writes next to the authors' weights (`zoo_name=NAME`). For "
        "other weights, a card has the scores that you give instead of the published ones.",
    ]
    for name in model_zoo.list_models():
        entry = model_zoo.get_entry(name)
        facts = model_card.Facts(
            task=entry.task,
            backbone=f"spatial_mamba_{entry.variant}",
            num_parameters=entry.parameters,
            num_classes={"classification": 1000, "detection": 80, "segmentation": 150}[entry.task],
        )
        card = model_card.write(facts, zoo_name=name).partition("\n---\n")[2]  # without metadata
        parts.append(re.sub("^#", "##", card.strip(), flags=re.MULTILINE))
    return "\n\n".join(parts) + "\n"


def public_names(module: ModuleType) -> list[tuple[str, object]]:
    """Functions and classes: those of ``__all__``, or those that the module defines itself."""
    if hasattr(module, "__all__"):
        names = module.__all__
    else:
        tree = ast.parse(inspect.getsource(module))
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    values = ((name, getattr(module, name)) for name in names)
    return [(name, value) for name, value in values if callable(value)]


def _markdown(docstring: str) -> str:
    """Google's sections as lists, and roles and literals as code."""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", docstring.replace("``", "`"))
    lines = []
    in_section = False
    for line in text.splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Raises|Yields):", line):
            in_section = True
            lines += ["", f"**{heading[1]}**", ""]
        elif in_section and re.match(r"    \S", line):
            lines.append(f"- {line.strip()}")
        elif in_section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build/site_pages")
    write_site(parser.parse_args().output)


if __name__ == "__main__":
    main()
