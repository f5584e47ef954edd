"""Mistakes planted in the kernels: the comparison with the references must notice each of them."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest
import torch

from spatial_mamba_d2.ops.cuda import kernels

from . import emulator
from .conftest import GRADIENT_TOLERANCE, TOLERANCE, relative_error
from .test_conformance import arguments, call, truth
from .test_cuda_emulator import FOR_INFERENCE

# Of the shapes of the conformance tests: odd and even sizes, packed channels or not, several tiles.
SHAPES = [(2, 5, 6, 8), (1, 11, 13, 17), (2, 40, 33, 6)]


class Mistake(NamedTuple):
    """``old`` in a file of ``ops/`` becomes ``new``; ``case`` launches a kernel that has it."""

    header: str
    old: str
    new: str
    case: str
    dtype: torch.dtype = torch.float32


CONV = "depthwise_conv3x3/conv.cuh"
STRIDE2 = "depthwise_conv3x3_stride2/conv_stride2.cuh"
NORM = "gated_layer_norm/norm.cuh"
CONV_NORM = "depthwise_conv3x3_layer_norm/conv_norm.cuh"
FUSION = "state_fusion/fusion.cuh"
SCAN = "selective_scan/scan.cuh"
STEPS = "selective_scan/steps.cuh"
MISTAKES = {
    "conv: wrong tap": Mistake(
        CONV, "taps[k][(2 - i) * 3 + j]", "taps[k][i * 3 + j]", "depthwise_conv3x3 silu"
    ),
    "conv: no row below the band": Mistake(
        CONV,
        "y <= place.y1; y++) {\n    Acc row",
        "y < place.y1; y++) {\n    Acc row",
        "depthwise_conv3x3 residual",
    ),
    "conv: a column outside": Mistake(
        CONV,
        "return x >= 0 && x < width;",
        "return x >= 0 && x + 1 < width;",
        "depthwise_conv3x3 silu",
    ),
    "conv: too few rows above the band in backward": Mistake(
        CONV,
        "place.y0 - (kResidual ? 1 : 3)",
        "place.y0 - (kResidual ? 1 : 2)",
        "depthwise_conv3x3 silu",
    ),
    "conv: tokens of the gradient are not apart": Mistake(
        CONV,
        "above += a.grad_x_stride;",
        "above += a.map.dim;",
        "depthwise_conv3x3_gradients_",
    ),
    "conv: rows of the gradient are not apart": Mistake(
        CONV,
        "(at - width + 1) * a.grad_x_stride",
        "(at - width + 1) * a.map.dim",
        "depthwise_conv3x3_gradients_",
    ),
    "stride 2: wrong parity": Mistake(
        STRIDE2,
        "const int left = 2 * place.x0 - 1;",
        "const int left = 2 * place.x0;",
        "depthwise_conv3x3_stride2",
    ),
    "stride 2: the last column": Mistake(
        STRIDE2, "x + c < place.width;", "x + c < place.width - 1;", "depthwise_conv3x3_stride2"
    ),
    "stride 2: no row after the band": Mistake(
        STRIDE2,
        "for (int y = place.y0; y <= place.y1; y++)",
        "for (int y = place.y0; y < place.y1; y++)",
        "depthwise_conv3x3_stride2",
    ),
    "stride 2: no slope of the first ReLU": Mistake(
        STRIDE2,
        "rows[0][c + 1][k] <= Acc(0) ? Acc(0) : upper",
        "false ? Acc(0) : upper",
        "depthwise_conv3x3_stride2",
    ),
    "stride 2: the halo counts twice": Mistake(
        STRIDE2, "y < place.y1 ? grad[0][k] : Acc(0)", "grad[0][k]", "depthwise_conv3x3_stride2"
    ),
    "gate: weight for bias": Mistake(
        NORM, "* weight[k] + bias[k]) * silu", "* weight[k] + weight[k]) * silu", "gated_layer_norm"
    ),
    "gate: tokens of its gradient are not apart": Mistake(
        NORM, "token * a.grad_z_stride", "token * dim", "gated_layer_norm_gradients_"
    ),
    "gate: no output": Mistake(NORM, "if (a.out) {", "if (false) {", "gated_layer_norm_gradients_"),
    "gate: the output before the gate": Mistake(
        NORM, "out[k] = affine * silu(gate[k]);", "out[k] = affine;", "gated_layer_norm_gradients_"
    ),
    "gate: sums in 16 bits": Mistake(
        "cuda/team.cuh",
        "sums[i] += values[i][k];",
        "sums[i] = float(c10::BFloat16(float(sums[i] + values[i][k])));",
        "gated_layer_norm",
        torch.float32,
    ),
    "conv and norm: one channel too many": Mistake(
        "cuda/team.cuh",
        "Acc(1) / Acc(channels.dim)",
        "Acc(1) / Acc(channels.dim + 1)",
        "depthwise_conv3x3_layer_norm",
    ),
    "GELU: its output for its slope": Mistake(
        "cuda/activations.cuh", "*slope = below +", "*slope = x * below +", "gelu_gradients"
    ),
    "GELU: a sum of one token in two": Mistake(
        "gelu_gradients/gelu.cuh",
        "sums[k] += grads[k];",
        "sums[k] += threadIdx.y % 2 ? Acc(0) : grads[k];",
        "gelu_gradients",
    ),
    "GELU: sums of another part": Mistake(
        "gelu_gradients/gelu.cuh",
        "token += a.parts * kGeluWarps",
        "token += (a.parts + 1) * kGeluWarps",
        "gelu_gradients",
    ),
    "norm's gradients: no residual": Mistake(
        "layer_norm_gradients/gradients.cuh",
        "grad[k] = other[k] + scale[0] *",
        "grad[k] = scale[0] *",
        "layer_norm_gradients",
    ),
    "norm's gradients: not along the norm": Mistake(
        "layer_norm_gradients/gradients.cuh",
        "share * (sums[0] + normal[0][k] * sums[1])",
        "share * sums[0]",
        "layer_norm_gradients",
    ),
    "norm's gradients: the bias's by the weight": Mistake(
        "layer_norm_gradients/gradients.cuh",
        "grads[2 * k + 1] += grad[k];",
        "grads[2 * k + 1] += grad[k] * weight[k];",
        "layer_norm_gradients",
    ),
    "bias: of the next channel": Mistake(
        "add_bias/bias.cuh", "sums[k] += bias[k]", "sums[k] += bias[(k + 1) % count]", "add_bias_"
    ),
    "window: a token late": Mistake(
        FUSION,
        "values[dy + kRadius][dx + 1 + kRadius] = read(dy, dx);",
        "values[dy + kRadius][dx + 1 + kRadius] = read(dy, dx + 1);",
        "state_fusion",
    ),
    "window: one row stands still": Mistake(
        FUSION,
        "row[dx] = row[dx + 1];",
        "row[dx] = row[dx + (dy != -3)];",
        "structure_aware_ssm",
    ),
    "window: not mirrored in backward": Mistake(
        FUSION,
        "window.at(-offset.dy, -offset.dx)",
        "window.at(offset.dy, offset.dx)",
        "state_fusion",
    ),
    "window: over the border in backward": Mistake(
        FUSION,
        "inner ? larger(place.x0, 1) : place.x1",
        "inner ? place.x0 : place.x1",
        "state_fusion",
    ),
    "ring: a column too few": Mistake(
        FUSION,
        "+ 2 * kRadius) * kLanes) {",
        "+ 2 * kRadius - 1) * kLanes) {",
        "state_fusion",
    ),
    "scan: the tile's tokens without its left halo": Mistake(
        "structure_aware_ssm/ssm.cuh",
        "* place.width + begin;",
        "* place.width + place.x0;",
        "structure_aware_ssm",
    ),
    "carry: rows are shared wrongly": Mistake(
        SCAN, "warp * share + smaller(warp, more)", "warp * share + more", "structure_aware_ssm"
    ),
    "scan: steps of the adjoint in the order of the recursion": Mistake(
        SCAN, "kReverse ? count - 1 - i : i", "i", "structure_aware_ssm_from_dt"
    ),
    "low rank: one factor for all": Mistake(
        STEPS,
        "sum += weights[r] * values[r];",
        "sum += weights[r] * values[0];",
        "structure_aware_ssm_from_dt",
    ),
    "low rank: the first weights again": Mistake(
        STEPS,
        "read_weights(first, valid, weights);",
        "read_weights(0, valid, weights);",
        "structure_aware_ssm_from_dt",
    ),
    "low rank: a token too many": Mistake(
        SCAN, "k + j < count", "k + j <= count", "structure_aware_ssm_from_dt"
    ),
    "low rank: of one token for all": Mistake(
        STEPS,
        "product(tokens[j], first, weights)",
        "product(tokens[0], first, weights)",
        "structure_aware_ssm_from_dt",
    ),
}


def _library(mistake: Mistake, tmp_path):
    """The emulator, whose kernels have the mistake."""
    mutant = tmp_path / "mutant"
    shutil.copytree(emulator.ROOT / "ops", mutant / "ops", ignore=shutil.ignore_patterns("*.so"))
    copy = mutant / "ops" / mistake.header
    text = copy.read_text()
    assert text.count(mistake.old) >= 1, "the kernels have changed"
    copy.write_text(text.replace(mistake.old, mistake.new, 1))
    return emulator.load_variant(mutant, mistake.header, mistake.dtype)


def _is_noticed(case: str, shape, dtype, inputs) -> bool:
    """Whether an output or a gradient deviates more than the conformance tests allow."""
    if case in FOR_INFERENCE:
        suite = FOR_INFERENCE[case]
        tensors = [x.to(dtype) for x in suite.arguments(*inputs)]
        expected = suite.call([x.double() for x in tensors], suite.reference)
        try:
            outputs = suite.call(tensors)
        except AssertionError:  # it has written next to its output
            return True
        limits = [*suite.tolerances(dtype), 4 * TOLERANCE[dtype]]  # the last: a norm's
        pairs = zip(outputs, expected, limits, strict=False)
        return any(not relative_error(a, e) <= limit for a, e, limit in pairs)
    args = arguments(case, inputs)
    output, cotangent, gradients = truth(case, args)
    leaves = [x.clone().requires_grad_() for x in args]
    actual = call(case, leaves)
    if not relative_error(actual, output) <= TOLERANCE[dtype]:
        return True
    found = torch.autograd.grad(actual, leaves, cotangent.to(actual))
    return any(
        not relative_error(a, e) <= GRADIENT_TOLERANCE[dtype]
        for a, e in zip(found, gradients, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name, tmp_path, ssm_inputs, monkeypatch, request):
    mistake = MISTAKES[name]
    library = _library(mistake, tmp_path)
    monkeypatch.setattr(emulator, "load", lambda: library)
    kernels.unload()
    request.addfinalizer(kernels.unload)
    with emulator.emulated_cuda():
        noticed = any(
            _is_noticed(mistake.case, shape, mistake.dtype, ssm_inputs(*shape, mistake.dtype))
            for shape in SHAPES
        )
    assert noticed
