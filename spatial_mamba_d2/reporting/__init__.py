"""Reports on trained models: a page and a JSON file from checkpoints and their test data.

``tools/report.py`` is the command line, and docs/own_data.md explains what is reported.
"""

from spatial_mamba_d2.reporting.running import report

__all__ = ["report"]
