"""From a folder of labelled images and weights to a training: settings that fit the data.

>>> from spatial_mamba_d2.finetuning import finetune
>>> finetune("my/data", "spatialmamba_tiny.pth", minutes=60)

writes a configuration file that the tools of the tasks take, with a reason for each setting, and
runs it. ``tools/finetune.py`` is the command line, and docs/own_data.md explains it.
"""

from spatial_mamba_d2.finetuning.running import finetune

__all__ = ["finetune"]
