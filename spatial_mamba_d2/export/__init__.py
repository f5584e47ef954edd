"""Models as graphs of standard operators: ONNX, OpenVINO, and ``torch.export``.

:mod:`.portable` writes our operators in plain PyTorch, :mod:`.exportable` describes what is
exported, :mod:`.formats` writes and runs files, and :mod:`.checks` compares them with PyTorch. Each
task has an ``export.py``; :mod:`spatial_mamba_d2.deploy` puts all of this together.
"""
