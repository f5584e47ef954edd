"""What is predicted one by one: image files, and what is in video and tar files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spatial_mamba_d2.data.images import read_image, read_size
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.prediction.archives import Member, find_members, is_archive
from spatial_mamba_d2.prediction.sources import ArrayRaster, FileRaster, Raster, open_raster
from spatial_mamba_d2.prediction.videos import Video, is_video

_NUM_SIZES = 4096  # that are remembered
BROKEN = (FileNotFoundError, ValueError)  # what reading raises about an image or a video


@dataclass(frozen=True)
class Item:
    """An image.

    Attributes:
        file: its file, or that of its video or archive.
        frame: number in the video.
        time_s: of the frame, from the first one.
        member: of the archive.
    """

    file: Path
    frame: int | None = None
    time_s: float | None = None
    member: Member | None = None

    @property
    def path(self) -> Path:
        """The file; of a frame, ``VIDEO/000123``; in an archive, ``ARCHIVE/NAME``."""
        if self.member is not None:
            return self.file / self.member.name
        return self.file if self.frame is None else frame_path(self.file, self.frame)


def frame_path(video: Path, number: int) -> Path:
    """What names a frame in results."""
    return video / f"{number:06d}"


class Items:
    """The images of some files, and what a model reads of them.

    Args:
        files: images, videos and archives; one of the latter that cannot be read is one item.
        num_channels, value_range, band_names: what the model takes, see :func:`.open_raster`.
        by_windows: whether large images are read by windows.
    """

    def __init__(
        self,
        files: Sequence[Path],
        num_channels: int,
        value_range: PixelRange | None,
        *,
        by_windows: bool,
        band_names: Sequence[str] = (),
    ):
        self.num_channels, self.value_range = num_channels, value_range
        self.by_windows, self.band_names = by_windows, band_names
        self._last: tuple[Item, Raster] | None = None
        self._video: Video | None = None
        self._sizes: dict[int, tuple[int, int]] = {}
        self.items: list[Item] = []
        for file in files:
            self.items += self._items_of(file)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def has_times(self) -> bool:
        """Whether there are frames of videos."""
        return any(item.frame is not None for item in self.items)

    def _items_of(self, file: Path) -> list[Item]:
        try:
            if is_archive(file):
                return [Item(file, member=member) for member in find_members(file)]
            if is_video(file):
                times = self._open(file).times_s
                return [Item(file, number, time) for number, time in enumerate(times.tolist())]
        except BROKEN:
            pass  # the one item says so when it is read
        return [Item(file)]

    def _source(self, item: Item) -> Path | Member:
        """What an image is read from.

        Raises:
            FileNotFoundError, ValueError: it is in an archive that cannot be read.
        """
        if item.member is None and is_archive(item.file):
            find_members(item.file)
        return item.member or item.file

    def _open(self, file: Path) -> Video:
        """A video; the last one stays open."""
        if self._video is None or self._video.path != file:
            self._video = None
            self._video = Video(file)
        if self.num_channels != 3:
            raise ValueError(
                f"video file {file} has RGB frames, the model takes {self.num_channels} channels"
            )
        return self._video

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, without decoding it if possible.

        Raises:
            FileNotFoundError, ValueError: it cannot be read.
        """
        if index not in self._sizes:
            if len(self._sizes) == _NUM_SIZES:
                self._sizes.clear()
            self._sizes[index] = self._size(index)
        return self._sizes[index]

    def _size(self, index: int) -> tuple[int, int]:
        item = self.items[index]
        if is_video(item.file):
            return self._open(item.file).size
        if self.by_windows:
            return self.raster(index).size
        return read_size(self._source(item), self.num_channels, self.value_range)

    def raster(self, index: int) -> Raster:
        """The image, to be read by windows; the last one stays open.

        Raises:
            FileNotFoundError, ValueError: it cannot be read.
        """
        item = self.items[index]
        if self._last is None or self._last[0] != item:
            self._last = None
            self._last = item, self._raster(item)
        return self._last[1]

    def _raster(self, item: Item) -> Raster:
        if is_video(item.file):
            return ArrayRaster(self._open(item.file).read(item.frame or 0))
        if self.by_windows and item.member is None:
            return open_raster(item.file, self.num_channels, self.value_range, self.band_names)
        return FileRaster(self._source(item), self.num_channels, self.value_range)

    def pixels(self, index: int) -> np.ndarray:
        """``uint8[H, W, C]``.

        Raises:
            FileNotFoundError, ValueError: it cannot be read.
        """
        item = self.items[index]
        if is_video(item.file):
            return self._open(item.file).read(item.frame or 0)
        return read_image(self._source(item), self.num_channels, self.value_range)
