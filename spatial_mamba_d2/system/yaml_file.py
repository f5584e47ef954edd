"""Configuration files: plain YAML without surprises, and the files that it inherits from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spatial_mamba_d2.system.missing import no_such
from spatial_mamba_d2.system.unicode_text import decode_unicode

BASE = "_BASE_"
MAX_VALUES = 100_000  # of one file, counting what an alias repeats


_NO_CODE = (
    "\nSuch a tag runs code, which is refused; write the values that it stands for, such as "
    "SIZES: [[32, 40, 50], [64, 80, 101]]"
)


class Document(NamedTuple):
    """The content of one file, without ``_BASE_``."""

    path: Path
    content: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which a key may not occur twice in a section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: not a key")
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} occurs twice, in lines {lines[key]} and {line}"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> list[Document]:
    """A file and what it inherits from, in the order in which they count: the file itself is last.

    ``_BASE_`` names one file or a list of files, relative to the file in which it stands.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not UTF-8, not plain YAML, empty, no mapping, or its own base.
    """
    return _read(Path(path), (), "config file")


def _read(path: Path, readers: tuple[Path, ...], what: str) -> list[Document]:
    if path.is_dir():
        raise ValueError(f"{what}: must be a file, got the folder {path.absolute()}")
    if not path.exists():
        raise no_such(what, path)
    if path.resolve() in map(Path.resolve, readers):
        chain = " -> ".join(map(str, (*readers, path)))
        raise ValueError(f"{path}: {BASE} leads back to the file itself: {chain}")
    content = parse_yaml(path.read_bytes(), path)
    bases = content.pop(BASE, [])
    documents = []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise ValueError(f"{path}: {BASE} must name a file or a list of files, got {base!r}")
        base_path = path.parent / Path(base).expanduser()
        documents += _read(base_path, (*readers, path), f"{path}: {BASE}")
    return [*documents, Document(path, content)]


def parse_yaml(data: bytes, source: object) -> dict[str, Any]:
    """The content of a file, or of a text such as a checkpoint's configuration.

    Args:
        source: what names it in errors.

    Raises:
        ValueError: it is not UTF-8, not plain YAML, empty or no mapping.
    """
    try:
        content = yaml.load(decode_unicode(data), _Loader)  # derived from SafeLoader: runs no code
        _check_aliases(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: must be text in UTF-8: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: impossible dates
        hint = _NO_CODE if "tag:yaml.org,2002:python/" in str(error) else ""
        raise ValueError(f"{source}: not plain YAML: {error}{hint}") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply") from None
    if content is None:
        raise ValueError(f"{source}: is empty; it must hold KEY: VALUE, at least {BASE}: FILE")
    if not isinstance(content, dict):
        raise ValueError(
            f"{source}: must hold KEY: VALUE, got {type(content).__name__} {str(content)[:60]!r}"
        )
    return content


def _check_aliases(content: Any) -> None:
    """Raises ValueError if a value contains itself, or aliases repeat values without end."""
    num_values = 0

    def visit(value: Any, outer: frozenset[int]) -> None:
        nonlocal num_values
        num_values += 1
        if num_values > MAX_VALUES:
            raise ValueError(f"must have at most {MAX_VALUES} values; aliases (*) repeat them")
        if not isinstance(value, (dict, list)):
            return
        if id(value) in outer:
            raise ValueError("a value contains itself, by an alias (*)")
        for element in value.values() if isinstance(value, dict) else value:
            visit(element, outer | {id(value)})

    visit(content, frozenset())
