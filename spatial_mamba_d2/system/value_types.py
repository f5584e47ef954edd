"""Values of configuration keys: taken where the meaning is clear, else shown in the right form."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAMES: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    list: "a list",
    type(None): "None",
}


class _Mismatch(Exception):
    """The value has no clear meaning as the type."""


def convert_value(key: str, value: Any, default: Any, types: Sequence[type] = ()) -> Any:
    """``value`` as the type of ``default``: a whole number for a float, ``1e3`` for an int, one
    element for a list, and so on.

    Args:
        key: for the error.
        value: a word of the command line, or what YAML made of one.
        default: of the key; the elements of a list follow the first of its elements.
        types: other types that the key accepts, in this order after that of ``default``.

    Raises:
        ValueError: the value cannot be meant for this key.
    """
    if default is None and not types:
        return _literal(value) if isinstance(value, str) else value
    kinds = {type(default), *types}
    for type_ in sorted(kinds, key=lambda kind: kind is str):  # any word is text
        like = default if type(default) is type_ else type_()
        if isinstance(default, str) and isinstance(like, (tuple, list)):
            like = type_([default])  # a list of what the key has one of by default
            value = _literal(value) if isinstance(value, str) and _is_list(value) else value
            if isinstance(value, str):
                continue
        try:
            return _convert(value, like)
        except _Mismatch:
            pass
    raise ValueError(f"{key} must be {_form(default, types)}, got {value!r}")


def _convert(value: Any, like: Any) -> Any:
    if isinstance(like, str):
        return _to_str(value)
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(like, bool):
        return _to_bool(value)
    if isinstance(like, int):
        return _to_int(value)
    if isinstance(like, float):
        return _to_float(value)
    if isinstance(like, (tuple, list)):
        return _to_list(value, like)
    if like is None and value is None:
        return None
    raise _Mismatch


def _literal(word: str) -> Any:
    """What the word is in Python, or else the word."""
    try:
        return ast.literal_eval(word.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


def _is_list(value: Any) -> bool:
    """Whether it is a list, or a word that begins like one."""
    return bool(re.match(r"\s*[(\[]", value)) if isinstance(value, str) else True


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise _Mismatch
    quoted = re.fullmatch(r"(['\"]).*\1", value, re.DOTALL)
    return str(_literal(value)) if quoted else value


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in _BOOLS:
        return _BOOLS[value.lower()]
    raise _Mismatch


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise _Mismatch


def _to_float(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(nan|inf|infinity)", value, re.IGNORECASE):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise _Mismatch


def _to_list(value: Any, like: tuple[Any, ...] | list[Any]) -> Any:
    element = like[0] if like else None
    if not isinstance(value, (tuple, list)):
        # A text that begins like a list, and one element of a list of lists, are typing errors.
        if (
            value is None
            or isinstance(value, (dict, set))
            or isinstance(element, (tuple, list))
            or (isinstance(value, str) and (_is_list(value) or not value.strip()))
        ):
            raise _Mismatch
        value = [value]
    if element is None:
        return type(like)(value)
    # Numbers may be mixed, such as sides of anchors in pixels and fractions.
    mixed = isinstance(element, int) and not isinstance(element, bool)
    return type(like)(_to_number(v) if mixed else _convert(v, element) for v in value)


def _to_number(value: Any) -> int | float:
    try:
        return _to_int(value)
    except _Mismatch:
        return _to_float(value)


def _form(default: Any, types: Sequence[type]) -> str:
    name = " or ".join(_NAMES[t] for t in dict.fromkeys((type(default), *types)))
    if isinstance(default, (tuple, list)) and default:
        return f'{name} such as "{default}"'
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return f"{name} such as {default}"
    if isinstance(default, str) and not types:
        return f"{name} (in YAML: in quotes)"
    return name
