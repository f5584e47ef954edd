"""What is changed in a graph for a runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_mamba_d2.export import formats

openvino = pytest.importorskip("openvino", reason="openvino is not installed")


@pytest.mark.parametrize("precision", ["f32", "bf16"])  # bf16: where the processor has it
def test_softplus_keeps_small_values_in_openvino(precision):
    """Its own is off by 80 % at -16, which is the bias of a delta of 1e-7."""
    x = openvino.opset13.parameter([-1, 4])
    model = openvino.Model([openvino.opset13.softplus(x)], [x])
    formats._replace_softplus(model)
    assert "SoftPlus" not in {node.get_type_name() for node in model.get_ops()}
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    values = np.linspace(-30, 30, 4000, dtype=np.float32).reshape(-1, 4)
    expected = torch.nn.functional.softplus(torch.from_numpy(values).double(), threshold=99)
    actual = torch.from_numpy(compiled(values)[0]).double()
    rtol = 1e-6 if precision == "f32" else 0.02
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
