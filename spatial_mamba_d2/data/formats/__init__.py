"""Labelled images in the formats that annotation tools write: recognised by content, and read.

Whatever the format, :func:`read_data` gives one of three forms, which our checks and loaders take:
COCO's records, pairs of images and label maps, or images of classes. Nothing is copied.
"""

from spatial_mamba_d2.data.formats.reading import read_data
from spatial_mamba_d2.data.formats.recognition import FORMATS, Candidate, recognise
from spatial_mamba_d2.data.formats.records import (
    TASKS,
    Instances,
    LabelledData,
    Split,
    UnusableDataError,
)
from spatial_mamba_d2.data.formats.splitting import split_data
from spatial_mamba_d2.data.formats.training_files import write_training_files

__all__ = [
    "FORMATS", "TASKS", "Candidate", "Instances", "LabelledData", "Split", "UnusableDataError",
    "read_data", "recognise", "split_data", "write_training_files",
]  # fmt: skip
