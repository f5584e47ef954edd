"""``torch.jit.script`` for the models: it compiles the graph that torch.fx makes of them.

TorchScript cannot compile the modules themselves, which choose in Python what training keeps.
"""

from __future__ import annotations

import torch
from torch import nn


def scriptable_graph(model: nn.Module) -> torch.fx.GraphModule:
    """The graph of ``model``, for ``__prepare_scriptable__``, which ``torch.jit.script`` calls.

    Raises:
        RuntimeError: ``model`` is in ``train()``.
    """
    if model.training:
        raise RuntimeError(
            "torch.jit.script needs the model in eval(): a graph has stochastic depth always or "
            "never"
        )
    traced = torch.fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        node.type = None  # the name of a type, which TorchScript does not look up
    traced.recompile()
    return traced
