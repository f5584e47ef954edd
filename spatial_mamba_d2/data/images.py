"""Image files: the one way in which they are found, read and written.

An image is read as 8-bit channels, by default RGB, and turned upright as its EXIF data say;
:mod:`.pixels` says what becomes of other depths and channels. ImageNet classification is the
exception: as in torchvision and the authors' code, its images stay as they are stored.

``SMD2_MAX_PIXELS``, an environment variable, is the largest number of pixels that an image or a
label may have, by default 178956970, as for Pillow: a small file can unpack to any size.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from spatial_mamba_d2.data import tiff
from spatial_mamba_d2.data.faults import InaccessibleFileError
from spatial_mamba_d2.data.outputs import (
    check_outputs,
    common_folder,
    name_outputs,
    same_folder,
)
from spatial_mamba_d2.data.pixels import (
    ImageFormatError,
    Layout,
    PixelRange,
    TooManyPixelsError,
    check_layout,
    read_layout,
    read_pixels,
)
from spatial_mamba_d2.system.missing import no_such

ENDINGS = (".png", "_label.png")  # of what is written for NAME: the drawing, and predicted labels
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_FORMATS = "JPEG, PNG, BMP, WebP, TIFF"
_MARKS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF", *tiff.MARKS)  # of these
# What operating systems leave in folders, in addition to names that begin with a dot.
_LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}
_DEFAULT_MAX_PIXELS = 178_956_970
_BROKEN = (  # what Pillow and OpenCV raise about the content of a file
    SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError,
    struct.error, zlib.error, cv2.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


class StoredImage(Protocol):
    """An image that is no file of its own; ``str()`` names it in errors."""

    def open(self) -> BinaryIO: ...


class UnknownFormatError(ValueError):
    """Bytes are no image in a format that is read from anyone."""


@contextmanager
def naming_file(kind: str, path: str | Path | StoredImage) -> Iterator[None]:
    """Turns Pillow's and OpenCV's errors into ones that name the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded; :class:`~.faults.InaccessibleFileError`: or not be read.
    """
    if os.environ.get("SMD2_MAX_PIXELS"):
        Image.MAX_IMAGE_PIXELS = (max_pixels() + 1) // 2  # Pillow refuses twice as many
    try:
        yield
    except InaccessibleFileError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"no {kind} file {Path(str(path)).absolute()}") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{kind} file {path} cannot be decoded: it is no image in a known format"
        ) from None
    except OSError as error:
        # Only the system's errors have a number; those of Pillow are about the content.
        kind_of_error = ValueError if error.errno is None else InaccessibleFileError
        raise kind_of_error(f"{kind} file {path} cannot be decoded: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(
            f"{kind} file {path} has too many pixels; the environment variable SMD2_MAX_PIXELS "
            f"sets the limit ({error})"
        ) from error
    except ImageFormatError as error:
        raise type(error)(f"{kind} file {path} {error}") from None
    except MemoryError:
        raise ValueError(f"{kind} file {path} does not fit into the memory") from None
    except _BROKEN as error:
        raise ValueError(f"{kind} file {path} cannot be decoded: {error}") from error


def max_pixels() -> int:
    """``SMD2_MAX_PIXELS``, or its default.

    Raises:
        ValueError: it is not an integer above 0.
    """
    text = os.environ.get("SMD2_MAX_PIXELS") or str(_DEFAULT_MAX_PIXELS)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"SMD2_MAX_PIXELS must be an integer above 0, got {text!r}")
    return int(text)


@contextmanager
def _opened(
    path: str | Path | StoredImage, num_channels: int, value_range: PixelRange | None
) -> Iterator[tuple[BinaryIO, Layout]]:
    """The file and its layout, which is one that can be read."""
    with (
        naming_file("image", path),
        open(path, "rb") if isinstance(path, (str, Path)) else path.open() as file,
    ):
        try:
            layout = read_layout(file, max_pixels())
        except TooManyPixelsError as error:
            raise TooManyPixelsError(
                f"{error} (the environment variable SMD2_MAX_PIXELS)"
            ) from None
        check_layout(layout, num_channels, value_range)
        yield file, layout


def open_image(
    path: str | Path, *, upright: bool = True, value_range: PixelRange | None = None
) -> Image.Image:
    """Read an image file as Pillow's RGB; see :func:`read_image`.

    Args:
        upright: apply the EXIF orientation.
    """
    with _opened(path, 3, value_range) as (file, layout):
        return Image.fromarray(read_pixels(file, layout, 3, value_range, upright))


def read_image(
    path: str | Path | StoredImage, num_channels: int = 3, value_range: PixelRange | None = None
) -> np.ndarray:
    """Read an image file, upright, into ``uint8[H, W, num_channels]``, by default RGB.

    Pillow rather than OpenCV, which takes a truncated JPEG for a complete one, except for what
    Pillow cannot hold.

    Args:
        num_channels: 1 or 3, grey or RGB, which are converted into each other; or as many bands as
            the file must have.
        value_range: for files of more than 8 bits: the values that become 0 and 255. None: the
            range of their type, if they use it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, is damaged or cut off, or (``ImageFormatError``) has
            values or channels that cannot be read right.
    """
    with _opened(path, num_channels, value_range) as (file, layout):
        return read_pixels(file, layout, num_channels, value_range, upright=True)


def read_image_bytes(
    content: bytes,
    num_channels: int = 3,
    value_range: PixelRange | None = None,
    limit: int | None = None,
) -> np.ndarray:
    """Like :func:`read_image`, from the content of a file that is not trusted.

    Only the formats of files with :data:`SUFFIXES` are tried: some of the others, such as
    PostScript, make Pillow start a program.

    Args:
        limit: the most pixels that the image may have; None: ``SMD2_MAX_PIXELS``. It is compared
            with the header, before a pixel is decoded.

    Raises:
        UnknownFormatError: it does not begin as such a file does.
        TooManyPixelsError: it has more pixels than ``limit``.
        ValueError: see :func:`read_image`.
    """
    if not content.startswith(_MARKS):
        raise UnknownFormatError(f"image must be one of {_FORMATS}, got {content[:4]!r}...")
    with naming_file("image", "in memory"), io.BytesIO(content) as file:
        layout = read_layout(file, max_pixels() if limit is None else min(limit, max_pixels()))
        check_layout(layout, num_channels, value_range)
        return read_pixels(file, layout, num_channels, value_range, upright=True)


def read_size(
    path: str | Path | StoredImage, num_channels: int = 3, value_range: PixelRange | None = None
) -> tuple[int, int]:
    """Height and width that :func:`read_image` would return, from the file's header.

    A file of more than 8 bits is also decoded: its values decide whether it can be read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, or it can be said so far that it cannot be read.
    """
    with _opened(path, num_channels, value_range) as (file, layout):
        if layout.is_deep:
            read_pixels(file, layout, num_channels, value_range, upright=True)
        return layout.size


def orientation_hint(path: str | Path, size: Sequence[int] | None = None) -> str:
    """Words to append to an error about the size of an image, or "" if they explain nothing.

    An image that is stored lying on its side is turned upright when it is read; labels and sizes
    that another program wrote may be those of the stored pixels.

    Args:
        size: height and width that were expected.
    """
    with suppress(OSError, ValueError), naming_file("image", path), open(path, "rb") as file:
        layout = read_layout(file)
        stored = layout.height, layout.width
        if layout.orientation >= 5 and (size is None or tuple(size) == stored):
            return (
                f"; the image is stored as {stored[0]}x{stored[1]} and turned by its EXIF "
                f"orientation {layout.orientation}, which the other size probably ignores: remove "
                "the orientation from the image, or turn what belongs to it"
            )
    return ""


def is_litter(path: Path | str) -> bool:
    """Whether operating systems leave such files and folders: hidden ones, ``Thumbs.db``, ...

    Args:
        path: a path, or a name.
    """
    name = path if isinstance(path, str) else path.name
    return name.startswith(".") or name.lower() in _LITTER


def is_image(path: Path, root: Path) -> bool:
    """Whether ``path``, which is in or below ``root``, is an image by its name, and no litter."""
    is_hidden = any(map(is_litter, path.relative_to(root).parts))
    return path.suffix.lower() in SUFFIXES and not is_hidden


def find_images(
    paths: Iterable[Path],
    *,
    leave_out: Path | None = None,
    key: str = "input",
    suffixes: Container[str] = SUFFIXES,
) -> list[Path]:
    """The files among ``paths``, and the images in and below the folders among them, sorted.

    What is in folders and no image by its suffix is counted and said.

    Args:
        leave_out: a folder in one of those, such as the one that results are written to.
        key: what names them, for errors.
        suffixes: of images in folders, in small letters.

    Raises:
        FileNotFoundError: one does not exist, or there is no image at all.
    """
    paths = list(paths)
    files: dict[str, Path] = {}
    passed_over: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            for file in _walk(path, leave_out):
                if file.suffix.lower() in suffixes:
                    files.setdefault(os.path.abspath(file), file)
                else:
                    passed_over[file.suffix.lower() or "no suffix"] += 1
        elif path.is_file():
            files.setdefault(os.path.abspath(path), path)
        elif path.is_symlink():
            raise FileNotFoundError(
                f"{key}: {path} is a link to {os.readlink(path)}, which is gone"
            )
        else:
            raise no_such(key, path, "file or folder")
    words = ""
    if passed_over:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(8))
        words = f"passed over, no images: {passed_over.total()} files ({kinds})"
    if not files:
        raise FileNotFoundError(
            f"{key}: no image in {', '.join(map(str, paths))}" + (words and f"; {words}")
        )
    if words:
        print(words)
    return list(files.values())


def files_below(folder: Path) -> list[Path]:
    """All files in and below ``folder``, sorted, without litter, with links to nowhere."""
    return sorted(_walk(folder, None))


def _walk(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    """The files in and below ``folder``, without litter, following links but no circles of them."""
    left_out = os.path.realpath(leave_out) if leave_out else None
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(
            name
            for name in folders
            if not is_litter(name)
            and (real := os.path.realpath(Path(parent, name))) not in seen
            and real != left_out
        )
        yield from (Path(parent, name) for name in sorted(names) if not is_litter(name))


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """The content of a file that ends with ``suffix``; see :func:`write_image`."""
    # cv2.imwrite does not accept every path on Windows, and gives no reason when it fails.
    _, encoded = cv2.imencode(suffix, image[..., ::-1] if image.ndim == 3 else image)
    return encoded.tobytes()


def write_image(path: Path, image: np.ndarray) -> None:
    """Write RGB ``uint8[H, W, 3]`` or grey ``uint8[H, W]``; creates the folder if needed.

    The file appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        content = encode_image(image, path.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except (OSError, cv2.error) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write image {path}: {error}") from error


# RGB uint8[H, W, 3] and OUTPUT/NAME, a path without suffix for additional files -> the drawing, RGB
# uint8[H', W', 3], and a summary in a few words.
Draw = Callable[[np.ndarray, Path], tuple[np.ndarray, str]]


@dataclass(frozen=True)
class Drawer:
    """A :data:`Draw` that says how :func:`read_image` has to read its images."""

    draw: Draw
    num_channels: int = 3
    value_range: PixelRange | None = None

    def __call__(self, image: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
        return self.draw(image, path)


def visualize_images(
    inputs: Iterable[Path],
    output: Path,
    build_draw: Callable[[], Draw],
    *,
    overwrite: bool = False,
    label_folder: Path | None = None,
) -> list[Path]:
    """Draw something for each image, into ``output/NAME.png``; broken images are reported.

    The tree below a single folder, or below what several inputs have in common, stays the same in
    ``output``; :func:`~.outputs.name_outputs` explains the names.

    Args:
        inputs: images and folders.
        build_draw: called once the images are found: loads a model, for example.
        overwrite: replace drawings and other files in ``output``, but never an input.
        label_folder: where ``build_draw`` also writes a ``NAME.png`` of each image, if anywhere.

    Returns:
        the drawings' paths.

    Raises:
        FileNotFoundError: see :func:`find_images`.
        ValueError: a drawing would be written over another file, see
            :func:`~.outputs.check_outputs`; or no image could be drawn.
        OSError: a drawing cannot be written.
    """
    inputs = list(inputs)
    files = find_images(inputs, leave_out=output)
    for path in inputs:
        if path.is_dir() and same_folder(path, output):
            raise ValueError(
                f"output: must be another folder than the input {path}, such as {path / 'drawings'}"
                f": drawings would replace {files[0].name}, or be the next call's inputs"
            )
    names = name_outputs(files, common_folder(inputs), output, ENDINGS)
    planned = [name.with_name(f"{name.name}{ending}") for name in names for ending in ENDINGS]
    if label_folder is not None:
        if same_folder(label_folder, output):
            raise ValueError(f"output: drawings and label maps need two folders, got {output}")
        planned += [label_folder / f"{name.relative_to(output)}.png" for name in names]
    check_outputs(planned, files, overwrite=overwrite)
    draw = build_draw()
    read = partial(
        read_image,
        num_channels=getattr(draw, "num_channels", 3),
        value_range=getattr(draw, "value_range", None),
    )
    written: list[Path] = []
    for file, name in zip(files, names, strict=True):
        try:
            image = read(file)
        except (FileNotFoundError, ValueError) as error:
            print(f"skipped: {error}")
            continue
        drawing, summary = draw(image, name)
        path = name.with_name(f"{name.name}.png")
        write_image(path, drawing)
        print(f"{file}: {summary} -> {path}")
        written.append(path)
    num_skipped = len(files) - len(written)
    if not written:
        raise ValueError(f"input: none of {num_skipped} files could be read as an image")
    print(
        f"{len(written)} images in {output}" + (f", {num_skipped} skipped" if num_skipped else "")
    )
    return written


def visualize_by_arguments(
    args: Namespace, build_draw: Callable[[str, Sequence[str]], Draw]
) -> list[Path]:
    """:func:`visualize_images` by a command line.

    Args:
        args: of :func:`~spatial_mamba_d2.system.cli.build_visualization_parser`.
        build_draw: from the configuration's file and ``KEY VALUE`` pairs.
    """
    build = partial(build_draw, args.config_file, args.opts)
    return visualize_images(args.input, args.output, build, overwrite=args.overwrite)
