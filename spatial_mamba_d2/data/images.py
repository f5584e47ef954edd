"""Image files: the one way in which they are found, read and written.

An image is read as 8-bit RGB and turned upright as its EXIF data say. ImageNet classification is
the exception: as in torchvision and the authors' code, its images stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from spatial_mamba_d2.data.faults import InaccessibleFileError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange height and width


@contextmanager
def naming_file(kind: str, path: str | Path) -> Iterator[None]:
    """Turns Pillow's errors into ones that name the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded; :class:`~.faults.InaccessibleFileError`: or not be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"no {kind} file {path}") from None
    except OSError as error:
        # Only the system's errors have a number; those of Pillow are about the content.
        kind_of_error = ValueError if error.errno is None else InaccessibleFileError
        raise kind_of_error(f"{kind} file {path} cannot be decoded: {error}") from error
    except (SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{kind} file {path} cannot be decoded: {error}") from error


def open_image(path: str | Path, *, upright: bool = True) -> Image.Image:
    """Read an image file as Pillow's RGB.

    Pillow rather than OpenCV, which takes a truncated JPEG for a complete one.

    Args:
        upright: apply the EXIF orientation.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, or is damaged or cut off.
    """
    with naming_file("image", path), Image.open(path) as image:
        turned = ImageOps.exif_transpose(image) if upright else image
        return turned.convert("RGB")


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file, upright, into RGB ``uint8[H, W, 3]``; raises as :func:`open_image`."""
    return np.array(open_image(path))


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width that :func:`read_image` would return, from the file's header alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image.
    """
    with naming_file("image", path), Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
    return (width, height) if turned else (height, width)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among ``paths``, and the images in the folders among them, sorted.

    Raises:
        FileNotFoundError: one does not exist, or there is no image at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"input: no such file or folder: {path}")
    if not files:
        raise FileNotFoundError(f"input: no image in {', '.join(map(str, paths))}")
    return files


def write_image(path: Path, image: np.ndarray) -> None:
    """Write RGB ``uint8[H, W, 3]`` or grey ``uint8[H, W]``; creates the folder if needed.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image):
        raise OSError(f"cannot write image {path}")


# RGB uint8[H, W, 3] and OUTPUT/NAME, a path without suffix for additional files -> the drawing, RGB
# uint8[H', W', 3], and a summary in a few words.
Draw = Callable[[np.ndarray, Path], tuple[np.ndarray, str]]


def visualize_images(
    inputs: Iterable[Path], output: Path, build_draw: Callable[[], Draw]
) -> list[Path]:
    """Draw something for each image, into ``output/NAME.png``; broken images are reported.

    Args:
        inputs: images and folders.
        build_draw: called once the images are found: loads a model, for example.

    Returns:
        the drawings' paths.

    Raises:
        FileNotFoundError: see :func:`find_images`.
    """
    files = find_images(inputs)
    draw = build_draw()
    written: list[Path] = []
    for file in files:
        try:
            image = read_image(file)
        except ValueError as error:
            print(f"skipped: {error}")
            continue
        drawing, summary = draw(image, output / file.stem)
        path = output / f"{file.stem}.png"
        write_image(path, drawing)
        print(f"{file}: {summary} -> {path}")
        written.append(path)
    num_skipped = len(files) - len(written)
    print(
        f"{len(written)} images in {output}" + (f", {num_skipped} skipped" if num_skipped else "")
    )
    return written
