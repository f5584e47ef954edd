"""Checks of labelled images before any training: objects, label maps, classes, and the files."""

from spatial_mamba_d2.data.checks.checking import check_data
from spatial_mamba_d2.data.checks.report import DataReport

__all__ = ["DataReport", "check_data"]
