"""Reading of checkpoint files without running code from them.

A PyTorch checkpoint is a pickle, and a pickle can call anything. Here tensors come from safetensors
or through ``torch.load(weights_only=True)``, which calls PyTorch's own rebuilding functions only.
Real checkpoints also carry objects of foreign classes (configurations, logs, dates). These are
never imported: whatever belongs to a known package becomes :class:`OpaqueObject`, and a file that
refers to anything else is refused. So is one that would unpack to many times its size. And where
its weights are picked, those that are not finite numbers are refused, which no training makes that
went well; other numbers in a file, such as a best score of minus infinity, do not matter.
"""

from __future__ import annotations

import _compat_pickle  # where Python itself keeps how Python 2 called its modules
import hashlib
import io
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from spatial_mamba_d2.system.missing import no_such

# Objects of these packages occur in published checkpoints next to the weights.
_OPAQUE_PACKAGES = (
    "addict", "argparse", "datetime", "fvcore", "lightning", "mmcv", "mmengine", "numpy",
    "omegaconf", "pathlib", "pytorch_lightning", "typing", "yacs",
)  # fmt: skip
# Of these only what configurations and logs refer to; ``getattr`` is how a method is pickled.
_OPAQUE_NAMES = {
    "collections.defaultdict",
    *(
        f"builtins.{name}"
        for name in ("bool", "bytes", "dict", "float", "frozenset", "getattr", "int", "list")
    ),
    *(f"builtins.{name}" for name in ("object", "range", "slice", "str", "tuple", "type")),
}
# Subclasses of dict among them; PyTorch's safe unpickler fills exact dictionaries only.
_OPAQUE_MAPPINGS = ("AttributeDict", "CfgNode", "ConfigDict", "Dict", "defaultdict")
# What PyTorch's safe unpickler builds by default, in addition to names of its own.
_PLAIN_NAMES = {
    "_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.set",
    "collections.Counter", "collections.OrderedDict",
}  # fmt: skip

# Keys under which checkpoints hold the state dict, in the order of preference.
_WRAPPERS = (
    "state_dict", "model", "model_ema", "model_state_dict", "state_dict_ema", "ema_state_dict",
    "params", "params_ema", "net", "network", "module",
)  # fmt: skip
_MAX_WRAPPERS = 4  # around one another
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before PyTorch 1.6
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages
# PyTorch does not compress. Files that another program did may unpack to a few times their size.
_MAX_EXPANSION, _MAX_UNPACKED = 4, 64 << 20  # bytes; the larger limit counts
_NEWEST_PROTOCOL = 3  # of those that PyTorch's safe unpickler understands
# How files begin that were downloaded and are no checkpoints.
_NO_CHECKPOINTS = (
    ((b"<!doctype", b"<html", b"<?xml"), "is a web page, not a checkpoint; download it again"),
    ((b"version https://git-lfs",), "is a Git LFS pointer, not a checkpoint; run `git lfs pull`"),
)


class WeightsError(ValueError):
    """A checkpoint cannot be read, recognised, or loaded as it is."""


class OpaqueObject:
    """Stands for an object of a foreign class in a checkpoint: keeps nothing, does nothing."""

    def __new__(cls, *args: object) -> OpaqueObject:
        return super().__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _OpaqueMapping:
    """Stands for a foreign subclass of dict: a plain dictionary with its items."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict(*(arg for arg in args if isinstance(arg, Mapping)))


def read_checkpoint(path: str | Path, sha256: str | None = None) -> dict[str, Any]:
    """Read a ``.safetensors`` or PyTorch checkpoint onto the CPU without executing code from it.

    Args:
        path: the file.
        sha256: 64 hexadecimal digits that its content must have. Without, nothing is compared: a
            hash in a file's name (``name-0123abcd.pth``, as torch.hub writes) is only a name,
            which survives conversions and edits of the content.

    Returns:
        the dictionary in the file; foreign objects in it are :class:`OpaqueObject`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: ``sha256`` is no SHA-256.
        WeightsError: truncated, not a checkpoint, of another hash, it refers to code, or would
            unpack to many times its size.
    """
    path = Path(path)
    if not path.is_file():
        raise no_such("weights", path)
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise WeightsError(f"weights: {path} is empty; it was probably never fully written")
    for beginnings, message in _NO_CHECKPOINTS:
        if head.lstrip().lower().startswith(beginnings):
            raise WeightsError(f"weights: {path} {message}")
    if sha256 is not None:
        _verify(path, sha256)
    try:
        if path.suffix == ".safetensors":
            content: dict[str, Any] = _read_safetensors(path)
        else:
            content = _read_pickled(path, head)
        _check_sizes(content, str(path))
        return content
    except WeightsError:
        raise
    except Exception as error:  # a dozen types are raised below here, all of them about this file
        raise _unreadable(path, error) from error


def _check_sizes(content: object, source: str) -> None:
    """Raises WeightsError if any tensor takes far more memory than its file has."""
    waiting: list[tuple[str, object]] = [("", content)]
    seen: set[int] = set()  # what refers to itself ends, too
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_meta:
                continue
            num_bytes = value.numel() * value.element_size()
            stored = value.untyped_storage().nbytes()
            if num_bytes > max(_MAX_UNPACKED, _MAX_EXPANSION * stored):
                raise WeightsError(
                    f"weights: {source} holds {name}, {num_bytes} bytes that repeat {stored}; "
                    "refused"
                )
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{key}".lstrip("."), item) for key, item in pairs]


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises WeightsError if a tensor, batch-norm statistics included, holds NaN or infinity."""
    wrong = [
        name
        for name, tensor in state.items()
        if tensor.layout == torch.strided
        and not tensor.is_meta
        and (tensor.is_floating_point() or tensor.is_complex())
        and not _is_finite(tensor)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(
            f"weights: {source} holds numbers that are not finite, in {len(wrong)} of "
            f"{len(state)} tensors: {', '.join(wrong[:3])}{more}. Its training diverged; take an "
            "earlier checkpoint"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # float8, for which PyTorch has no test
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def unwrap(content: Mapping[str, Any], source: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict in ``content``: bare, or under keys such as ``state_dict`` and ``model``.

    Raises:
        WeightsError: there is none, or it holds numbers that are not finite.
    """
    keys = _way_to_tensors(content)
    for key in keys or ():
        content = content[key]
    if keys is None:
        raise WeightsError(
            f"weights: {source} holds no tensors, neither bare nor under {', '.join(_WRAPPERS)}; "
            f"its keys: {', '.join(map(str, list(content)[:8])) or 'none'}"
        )
    state = {
        name.removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if len(state) < sum(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"weights: {source} holds tensors both with and without 'module.'")
    _check_finite(state, source)
    return state


def _way_to_tensors(content: object, depth: int = _MAX_WRAPPERS) -> tuple[str, ...] | None:
    """The keys that lead to the first mapping with tensors in it; None if there is none."""
    if not isinstance(content, Mapping):
        return None
    for key in _WRAPPERS if depth else ():
        if (rest := _way_to_tensors(content.get(key), depth - 1)) is not None:
            return key, *rest
    return () if any(isinstance(value, Tensor) for value in content.values()) else None


def _verify(path: Path, sha256: str) -> None:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    found = hash_file(path)
    if found != sha256.lower():
        raise WeightsError(
            f"weights: {path} is another file than expected, or damaged: "
            f"its SHA-256 is {found}, must be {sha256.lower()}"
        )


def hash_file(path: str | Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_pickled(path: Path, head: bytes) -> dict[str, Any]:
    is_zip = head.startswith(b"PK")
    if is_zip:
        _check_unpacked_size(path)
    if head.startswith(b"\x80") and not (is_zip or head.startswith(_LEGACY_MAGIC)):
        raise WeightsError(
            f"weights: {path} is a raw pickle, as in Detectron2's model zoo; refused, because "
            "reading it can run code from the file. If you trust it, load it with Detectron2 "
            "and save its tensors with torch.save"
        )
    names = set(_zip_names(path) if is_zip else _legacy_names(path))
    opaque = {name for name in names if _becomes_opaque(name)}
    # A first look, for a plain message; what decides is torch.load, which knows no other name.
    refused = {n for n in names - opaque - _PLAIN_NAMES if not n.startswith("torch.")}
    if refused:
        raise WeightsError(
            f"weights: {path} refers to {', '.join(sorted(refused))}, which is not data; "
            "refused, because loading it would run code from the file"
        )
    stand_ins = [(stand_in(name), name) for name in opaque]
    with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights: {path} must hold a dictionary, got {type(content).__name__}")
    return dict(content)


def _check_unpacked_size(path: Path) -> None:
    """Refuse what would fill the memory: compressed, or with entries that share their data."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(_MAX_UNPACKED, _MAX_EXPANSION * (size := path.stat().st_size)):
        raise WeightsError(
            f"weights: {path} ({size} bytes) would unpack to {unpacked} bytes; refused, because "
            f"checkpoints are not compressed (at most {_MAX_EXPANSION} times are accepted)"
        )


def _becomes_opaque(name: str) -> bool:
    return name.split(".")[0] in _OPAQUE_PACKAGES or name in _OPAQUE_NAMES


def stand_in(name: str) -> type:
    """The class that takes the place of the foreign class ``name`` in safe loading."""
    return _OpaqueMapping if name.rsplit(".", 1)[-1] in _OPAQUE_MAPPINGS else OpaqueObject


def _zip_names(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if entry.rsplit("/", 1)[-1] == "data.pkl":
                yield from _pickled_names(path, io.BytesIO(archive.read(entry)))


def _legacy_names(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            yield from _pickled_names(path, file)


def _pickled_names(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Dotted names of the classes and functions in the pickle that begins here in ``file``."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "PROTO" and int(argument or 0) > _NEWEST_PROTOCOL:
            raise WeightsError(
                f"weights: {path} is pickled with protocol {argument}, which PyTorch cannot read "
                "safely; save it again with the default of torch.save"
            )
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            yield f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _unreadable(path: Path, error: Exception) -> WeightsError:
    reason = str(error).strip().split("\n")[0]
    return WeightsError(
        f"weights: {path} ({path.stat().st_size} bytes) is truncated or not a PyTorch checkpoint: "
        f"{reason}"
    )
