"""Every operator, every kernel, against the float64 reference and its autograd."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.depthwise_conv3x3 import reference as conv_reference
from spatial_mamba_d2.ops.depthwise_conv3x3_stride2 import reference as stride2_reference
from spatial_mamba_d2.ops.gated_layer_norm import reference as norm_reference
from spatial_mamba_d2.ops.selective_scan import eager as scan_eager
from spatial_mamba_d2.ops.selective_scan import reference as scan_reference
from spatial_mamba_d2.ops.state_fusion import reference as fusion_reference
from spatial_mamba_d2.ops.structure_aware_ssm import reference as ssm_reference
from spatial_mamba_d2.ops.structure_aware_ssm_from_dt import reference as from_dt_reference

from . import emulator
from .conftest import GRADIENT_TOLERANCE, TOLERANCE, relative_error

# (batch, height, width, channels): tiny, odd, slightly more than a chunk, several levels of chunks,
# more channels than a warp of a CUDA kernel has
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 7, 3),
    (1, 9, 1, 5),
    (2, 5, 6, 8),
    (1, 7, 7, 4),
    (3, 3, 16, 4),
    (1, 11, 13, 17),
    (1, 2, 331, 2),
    (2, 40, 33, 6),
    (1, 2, 3, 131),
    (1, 3, 5, 260),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REFERENCES = {
    "selective_scan": scan_reference,
    "state_fusion": fusion_reference,
    "structure_aware_ssm": ssm_reference,
    "structure_aware_ssm_from_dt": from_dt_reference,
    "depthwise_conv3x3": conv_reference,
    "depthwise_conv3x3_stride2": stride2_reference,
    "gated_layer_norm": norm_reference,
}
# name of a case -> operator, and the arguments after its tensors
CASES: dict[str, tuple[str, tuple]] = {
    "selective_scan": ("selective_scan", ()),
    "state_fusion": ("state_fusion", ()),
    "structure_aware_ssm": ("structure_aware_ssm", ()),
    "structure_aware_ssm_from_dt": ("structure_aware_ssm_from_dt", ()),
    "depthwise_conv3x3 residual": ("depthwise_conv3x3", (True,)),
    "depthwise_conv3x3 silu": ("depthwise_conv3x3", (False,)),
    "depthwise_conv3x3_stride2": ("depthwise_conv3x3_stride2", ()),
    "gated_layer_norm": ("gated_layer_norm", (1e-5,)),
}
KEEPS_DTYPE = (
    "structure_aware_ssm",
    "structure_aware_ssm_from_dt",
    "depthwise_conv3x3",
    "depthwise_conv3x3_stride2",
    "gated_layer_norm",
)


@pytest.fixture(params=["eager", "native", "emulated CUDA", "CUDA", "eager on CUDA"], autouse=True)
def kernels(request, monkeypatch):
    """The kernels that run: plain PyTorch, and compiled kernels of each kind."""
    kind = request.param
    if kind == "native" and _extension.WHY_NOT_COMPILED:
        pytest.skip(f"no compiled kernels: {_extension.WHY_NOT_COMPILED}")
    if "CUDA" in kind and kind != "emulated CUDA":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if kind == "CUDA" and _extension.why_no_cuda():
            pytest.skip(f"no CUDA kernels: {_extension.why_no_cuda()}")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setattr(_extension, "FORCED_BACKEND", "native")  # no falling back
    contexts = {
        "eager": _extension.without_compiled_kernels,
        "eager on CUDA": _extension.without_compiled_kernels,
        "emulated CUDA": emulator.emulated_cuda,
    }
    with contexts.get(kind, nullcontext)():
        yield kind


@pytest.fixture
def device(kernels):
    """The device of the inputs."""
    return torch.device("cuda" if kernels in ("CUDA", "eager on CUDA") else "cpu")


def roundings(kernels, dtype) -> int:
    """How much larger errors of 16 bits may be: PyTorch's operations round what they hand on.

    Gradients of parameters are sums of such values, which cancel.
    """
    return 4 if kernels == "eager on CUDA" and dtype.itemsize == 2 else 1


def arguments(case, inputs):
    """The tensors that ``case`` takes, from the inputs of ``structure_aware_ssm``."""
    u, delta, A, B, _, D, bias, taps = inputs
    if case == "selective_scan":
        return [u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), bias]
    if case == "state_fusion":
        return [u, taps]
    if case.startswith("depthwise_conv3x3"):
        return [u, taps[:9].T.reshape(-1, 1, 3, 3).contiguous(), bias]
    if case == "gated_layer_norm":
        return [u, delta / 2, D, bias]
    if case == "structure_aware_ssm_from_dt":
        return [u, *factors(u), *inputs[2:]]
    return inputs


def rank_of(dim):
    """Of step sizes for ``dim`` channels: one, or several times what kernels read at once."""
    return 1 + dim // 3


def factors(u):
    """``dt`` and ``dt_weight``; their product covers the linear branch of softplus."""
    dim = u.shape[-1]
    rank = rank_of(dim)
    g = torch.Generator().manual_seed(rank)
    dt = 6 * torch.randn(*u.shape[:-1], rank, generator=g, dtype=torch.float64)
    weight = torch.randn(dim, rank, generator=g, dtype=torch.float64) / rank**0.5
    return dt.to(u), weight.to(u)


def call(case, tensors, of=ops):
    op, others = CASES[case]
    return getattr(of, op)(*tensors, *others)


def truth(case, args):
    """Output, cotangent and gradients of the reference in float64."""
    leaves = [x.detach().cpu().double().requires_grad_() for x in args]
    output = call(case, leaves, REFERENCES[CASES[case][0]])
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(args[0].dtype).double()  # rounded as for the kernels
    return output.detach(), cotangent, torch.autograd.grad(output, leaves, cotangent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_threads_than_blocks(shape, dtype, ssm_inputs, kernels):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 16):
            torch.set_num_threads(threads)
            results.append(ops.structure_aware_ssm(*ssm_inputs(*shape, dtype)))
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if "eager" in kernels else 0
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, shape, dtype, ssm_inputs, kernels):
    if case == "gated_layer_norm":  # the norm of one or two channels is constant
        shape = (*shape[:3], shape[3] + 3)
    args = arguments(case, ssm_inputs(*shape, dtype))
    output, cotangent, gradients = truth(case, args)
    leaves = [x.clone().requires_grad_() for x in args]
    actual = call(case, leaves)
    assert actual.shape == output.shape
    assert actual.is_contiguous()
    keeps_dtype = CASES[case][0] in KEEPS_DTYPE or dtype == torch.float64
    assert actual.dtype == (dtype if keeps_dtype else torch.float32)
    times = roundings(kernels, dtype)
    assert relative_error(actual, output) <= times * TOLERANCE[dtype]

    actual_gradients = torch.autograd.grad(actual, leaves, cotangent.to(actual))
    for index, (a, e) in enumerate(zip(actual_gradients, gradients, strict=True)):
        assert a.dtype == dtype and a.shape == e.shape
        error = relative_error(a, e)
        assert error <= times * GRADIENT_TOLERANCE[dtype], f"gradient of input {index}"


@pytest.mark.parametrize("case", CASES)
def test_strided_inputs(case, ssm_inputs, strided):
    args = arguments(case, ssm_inputs(2, 6, 9, 5))
    views = [strided(x).requires_grad_() for x in args]
    plain = [x.clone().requires_grad_() for x in args]
    expected, actual = call(case, plain), call(case, views)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    cotangent = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, views, strided(cotangent)),
        torch.autograd.grad(expected, plain, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["selective_scan", "structure_aware_ssm", "structure_aware_ssm_from_dt"]
)
def test_wider_step_sizes_do_not_widen_the_output(case, ssm_inputs):
    args = arguments(case, ssm_inputs(2, 5, 6, 8, torch.float32))
    expected = call(case, args)
    args[1] = args[1].double()
    actual = call(case, args)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_autocast_does_not_reach_inside(case, ssm_inputs):
    args = [x.requires_grad_() for x in arguments(case, ssm_inputs(1, 8, 9, 16))]
    expected = call(case, args)
    with torch.autocast(args[0].device.type, torch.bfloat16):
        actual = call(case, args)
        gradients = torch.autograd.grad(actual.sum(), args)
    assert torch.equal(actual, expected)
    for a, e in zip(gradients, torch.autograd.grad(expected.sum(), args), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_left_alone(case, ssm_inputs):
    args = arguments(case, ssm_inputs(1, 8, 9, 3))
    before = [x.clone() for x in args]
    leaves = [x.requires_grad_() for x in args]
    output = call(case, leaves)
    cotangent = torch.ones_like(output)
    torch.autograd.grad(output, leaves, cotangent)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))
    assert torch.equal(cotangent, torch.ones_like(output))


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, ssm_inputs):
    args = arguments(case, ssm_inputs(1, 3, 4, 2, torch.float64))
    assert gradcheck(lambda *x: call(case, x), [x.requires_grad_() for x in args])


@pytest.mark.parametrize("case", CASES)
def test_all_derivatives(case, ssm_inputs):
    """Forward mode, second derivatives in each order of modes, and batches of cotangents."""
    args = arguments(case, ssm_inputs(1, 3, 3, 2, torch.float64))
    args = [x.requires_grad_() for x in args]

    def function(*tensors):
        return call(case, tensors)

    assert gradcheck(function, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, args, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_functional_derivatives(case, ssm_inputs):
    """One direction of each input for each sample of a batch, under ``torch.func``."""
    args = arguments(case, ssm_inputs(1, 3, 3, 2, torch.float64))
    directions = [torch.randn(2, *x.shape, dtype=x.dtype, device=x.device) for x in args]

    def of_directions(*tangents):
        return torch.func.jvp(lambda *x: call(case, x), tuple(args), tangents)[1]

    batched = torch.func.vmap(of_directions)(*directions)
    cotangent = torch.randn_like(batched[0])
    _, pull_back = torch.func.vjp(lambda *x: call(case, x), *args)
    for index, output in enumerate(batched):
        one = [x[index] for x in directions]
        expected = sum((g * v).sum() for g, v in zip(pull_back(cotangent), one, strict=True))
        torch.testing.assert_close((output * cotangent).sum(), expected)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, ssm_inputs):
    op, others = CASES[case]
    args = [x.requires_grad_() for x in arguments(case, ssm_inputs(2, 4, 5, 3))]
    torch.library.opcheck(getattr(torch.ops.spatial_mamba, op).default, (*args, *others))


@pytest.mark.parametrize("case", CASES)
def test_opcheck_backward(case, ssm_inputs):
    op, others = CASES[case]
    args = arguments(case, ssm_inputs(2, 4, 5, 3))
    output = call(case, args)
    torch.library.opcheck(
        getattr(torch.ops.spatial_mamba, f"{op}_backward").default,
        (torch.randn_like(output), *args, *others),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_run_to_run(case, ssm_inputs):
    args = [x.requires_grad_() for x in arguments(case, ssm_inputs(2, 20, 31, 16))]
    output = call(case, args)
    first, second = (torch.autograd.grad(output.sum(), args, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_reference_gradients(case, ssm_inputs):
    """What ``SMD2_BACKEND=reference`` registers as the backward kernel."""
    args = arguments(case, ssm_inputs(1, 4, 3, 2, torch.float64))
    _, cotangent, expected = truth(case, args)
    op, others = CASES[case]
    backward = _extension.gradients_of(getattr(REFERENCES[op], op))
    actual = backward(cotangent.to(args[0]), *args, *others)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, **({} if a.is_cuda else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("case", CASES)
def test_every_value_is_written(case, ssm_inputs, monkeypatch):
    """Outputs start as NaN here, so that a value that no kernel writes is found."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        args = [x.requires_grad_() for x in arguments(case, ssm_inputs(2, 7, 13, 21))]
        output = call(case, args)
        results = [output, *torch.autograd.grad(output.sum(), args)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("shape", [(2, 9, 14, 40), (1, 9, 14, 7), (1, 2, 33, 20)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_number_of_threads_changes_nothing(case, shape, ssm_inputs, kernels):
    """Compiled kernels give the same bits, although they divide a map if threads would idle.

    In plain PyTorch, the libraries' convolutions round differently.
    """
    args = [x.requires_grad_() for x in arguments(case, ssm_inputs(*shape))]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            output = call(case, args)
            results.append([output, *torch.autograd.grad(output.sum(), args)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            tolerance = 0 if "eager" not in kernels else 1e-5 * b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_replays(case, ssm_inputs, kernels):
    """No call waits for the device or depends on values."""
    if kernels not in ("CUDA", "eager on CUDA"):
        pytest.skip("CUDA graphs are for GPUs")
    args = arguments(case, ssm_inputs(1, 20, 31, 40))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, and a test of a stream other than the default
        expected = call(case, args, torch.ops.spatial_mamba)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(case, args, torch.ops.spatial_mamba)
    graph.replay()
    assert torch.equal(output, expected)


def test_softplus_is_as_accurate_as_pytorchs():
    x = torch.cat((torch.linspace(-80, 40, 100_001), torch.tensor([20.0, 20.000002])))
    exact = torch.nn.functional.softplus(x.double())
    error = ((scan_eager.softplus(x).double() - exact) / exact).abs().max()
    assert error < 2.5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_values(dtype, device):
    """Steps and rates of any size; a state that is constant and one that grows."""
    values = [-1e30, -200, -87.5, -20, -1e-3, 0, 1, 19.9, 20.1, 87.5, 126, 200, 1e4, 1e30]
    rates = [-1e30, -2e38, -200, -1, -1e-6, -1e-30, 0, 0.1]
    delta = torch.tensor(values, dtype=torch.float64)[None, :, None].expand(1, -1, len(rates))
    u, B, bias = torch.ones_like(delta), torch.ones_like(delta[..., 0]), torch.zeros(len(rates))
    args = [u, delta, torch.tensor(rates, dtype=torch.float64), B, bias]
    # Without the last steps, which make the growing state infinite.
    h = ops.selective_scan(*(x.to(device, dtype) for x in args))[:, :-2]
    expected = scan_reference.selective_scan(*(x.double() for x in args))[:, :-2]
    torch.testing.assert_close(h.cpu().double(), expected, rtol=2e-5, atol=1e-30)
    gate = torch.tensor(values, dtype=torch.float64)[None, None, None]
    y, ones = torch.linspace(-1, 1, len(values))[None, None, None], torch.ones(len(values))
    args = [y, gate, ones, ones]
    out = ops.gated_layer_norm(*(x.to(device, dtype) for x in args))
    expected = norm_reference.gated_layer_norm(*(x.double() for x in args), 1e-5)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("position", range(5))
def test_what_is_not_a_number_is_not_hidden(position, device):
    args = [torch.ones(1, 9, 3), torch.ones(1, 9, 3), -torch.ones(3), torch.ones(1, 9)]
    args.append(torch.ones(3))
    args[position].flatten()[0] = torch.nan
    h = ops.selective_scan(*(x.to(device) for x in args))
    assert h[:, 1:, 0].isnan().all() and (position == 3 or h[:, :, 1:].isfinite().all())


@pytest.mark.parametrize("case", ["structure_aware_ssm", "structure_aware_ssm_from_dt"])
def test_empty_batch(case, ssm_inputs):
    args = [x[:0] if x.dim() > 2 else x for x in arguments(case, ssm_inputs(1, 3, 4, 2))]
    leaves = [x.requires_grad_() for x in args]
    output = call(case, leaves)
    assert output.shape == (0, 3, 4, 2)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize(
    ("index", "replace", "message"),
    [
        (0, lambda x: x[0], r"u must be \[B, H, W, D\].*got \[4, 5, 3\]"),
        (0, lambda x: x[:, :0], r"u must be .* no empty axis"),
        (1, lambda x: x[..., :2], r"delta must be \[B, H, W, D\] = \[2, 4, 5, 3\], got"),
        (2, lambda x: x[:2], r"A must be \[D\] = \[3\], got \[2\]"),
        (3, lambda x: x[:1], r"B must be \[B, H, W\]"),
        (4, lambda x: x.unsqueeze(-1), r"C must be \[B, H, W\]"),
        (6, lambda x: x.int(), r"delta_bias must be floating point, got torch.int32"),
        (7, lambda x: x[:24], r"taps must be \[25, D\] = \[25, 3\], got \[24, 3\]"),
    ],
)
def test_bad_arguments_are_named(index, replace, message, ssm_inputs):
    args = ssm_inputs(2, 4, 5, 3)
    args[index] = replace(args[index])
    with pytest.raises(ValueError, match=message):
        ops.structure_aware_ssm(*args)
