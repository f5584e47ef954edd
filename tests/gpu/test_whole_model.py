"""The whole model on a GPU: what the operators' conformance tests do not see."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from spatial_mamba_d2.models import build_backbone, optimize_for_inference, optimized
from spatial_mamba_d2.ops.cuda.kernels import OPENERS
from spatial_mamba_d2.profiling.first_hour_steps import pattern_loss
from spatial_mamba_d2.profiling.gpu import graphed, launch_times, peak_gpu_mb
from spatial_mamba_d2.profiling.memory import saved_bytes
from tests.ops.conftest import relative_error

SIZE = (33, 50)


@pytest.fixture
def backbone(test_variant) -> nn.Module:
    """On the CPU; every stage of it has odd sizes."""
    torch.manual_seed(0)
    return build_backbone(test_variant, drop_path_rate=0.0).eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def loss_of(features) -> torch.Tensor:
    return pattern_loss(features.values())


@pytest.fixture
def expected(backbone, image):
    """Features, loss and gradients of the CPU's own kernels; before the emulator takes over."""
    assert "cpu" not in OPENERS
    features = backbone(image)
    loss = loss_of(features)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in backbone.named_parameters()}
    backbone.zero_grad()
    return {name: x.detach() for name, x in features.items()}, loss.item(), gradients


def test_features_and_gradients_are_those_of_the_cpu(expected, backbone, image, device):
    features, _, gradients = expected
    backbone.to(device)
    actual = backbone(image.to(device))
    for name, x in features.items():
        assert relative_error(actual[name].detach(), x) < 1e-4
    loss_of(actual).backward()
    for name, p in backbone.named_parameters():
        assert relative_error(p.grad, gradients[name]) < 1e-3, name


def test_the_models_use_the_kernels(backbone, image, device):
    """All of them: a path that is not taken is not tested."""
    backbone.to(device).train()
    with launch_times(device) as times:
        loss_of(backbone(image.to(device))).backward()
        with torch.no_grad():
            optimize_for_inference(backbone)(image.to(device))
    assert {name.partition("<")[0] for name in times} == {
        *("reduce", "carry", "fuse_tiles", "grad_input_tiles", "apply_adjoint", "add_bias"),
        *("conv3x3", "conv3x3_backward", "conv3x3_stride2", "conv3x3_stride2_backward"),
        *("conv3x3_norm", "gated_norm", "gated_norm_backward"),
        *("gelu_gradients", "layer_norm_gradients"),
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str
)
def test_an_optimised_model_computes_the_same(expected, backbone, image, device, dtype, tolerance):
    model = optimize_for_inference(backbone.to(device), dtype)
    with torch.no_grad():
        actual = model(image.to(device))
    for name, x in expected[0].items():
        assert actual[name].dtype == torch.float32
        assert relative_error(actual[name], x) < tolerance


def test_torch_compile(backbone, image, device, kernels):
    """On a GPU with Inductor; the emulator's kernels are called from a graph as well."""
    torch._dynamo.reset()
    backend = "inductor" if kernels == "CUDA" else "aot_eager"
    results = []
    for compiled in (False, True):
        model = copy.deepcopy(backbone).to(device)
        parts = [model.stem, model.stages[0], model.stages[0].downsample]

        def run(x, parts=parts):
            for part in parts:
                x = part(x)
            return x

        if compiled:
            run = torch.compile(run, backend=backend, dynamic=False)
        output = run(image.to(device))
        loss_of({"output": output}).backward()
        weights = [p for part in parts for p in part.parameters()]
        results.append((output.detach(), [p.grad for p in weights]))
    (expected, gradients), (actual, others) = results
    assert relative_error(actual, expected) < 1e-4
    for a, e in zip(others, gradients, strict=True):
        assert relative_error(a, e) < 1e-3


def test_a_graph_of_inference_replays(backbone, image, device, kernels):
    model, static = optimize_for_inference(backbone.to(device)), image.to(device)

    def call():
        with torch.no_grad():
            return model(static)

    replay = graphed(call) if kernels == "CUDA" else call
    for factor in (1.0, -0.5):
        static.copy_(factor * image)
        features = {name: x.clone() for name, x in replay().items()}
        for name, x in call().items():
            assert torch.equal(features[name], x)


def test_a_graph_of_a_training_step_replays(backbone, image, device, kernels):
    """Losses of four steps with AdamW are those of plain calls."""
    losses = {}
    for use in ("calls", "graph"):
        model = copy.deepcopy(backbone).to(device).train()
        static = image.to(device)
        on_gpu = kernels == "CUDA"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=on_gpu, foreach=True)

        def step(model=model, optimizer=optimizer, static=static):
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(model(static))
            loss.backward()
            optimizer.step()
            return loss.detach()

        warm_ups = [step().item() for _ in range(2)]
        run = graphed(step, num_warm_ups=0) if use == "graph" and on_gpu else step
        losses[use] = warm_ups + [run().item() for _ in range(2)]
    assert losses["graph"] == pytest.approx(losses["calls"], rel=1e-5)
    assert losses["calls"][3] < losses["calls"][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_with_autocast(expected, backbone, image, device, dtype):
    """Three steps with a GradScaler: the first loss is float32's, and all are finite."""
    model = backbone.to(device).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()  # as in ``expected``
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=dtype == torch.float16)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = loss_of(model(image.to(device)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected[1], rel=0.02)
    assert losses[2] < losses[0]
    assert not scaler.is_enabled() or scaler.get_scale() == 256.0  # no step was skipped


def test_autocast_converts_no_map_to_float32(backbone, image, device):
    """Inside of a block: the residual stream and the norms stay in 16 bits."""
    model, seen = backbone.to(device), {}
    block = model.stages[1].blocks[0]
    for name in ("cpe1", "ln1", "ssm", "cpe2", "ln2", "mlp"):
        block.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.dtype})
        )
    with torch.autocast(device, torch.bfloat16):
        model(image.to(device))
    assert set(seen.values()) == {torch.bfloat16}, seen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_outputs_are_channels_last_for_any_input(backbone, image, device, memory_format):
    model = backbone.to(device, memory_format=memory_format)
    features = model(image.to(device).contiguous(memory_format=memory_format))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in features.values())


def test_streams_and_threads(backbone, image, device, kernels):
    """Each thread, on a stream of its own if there is a GPU, gets the bits of a single call."""
    model, x = backbone.to(device), image.to(device)
    with torch.no_grad():
        expected = model(x)
    results = [None] * 3
    # The emulator runs one kernel at a time.
    guard = threading.Lock()

    def run(number):
        if kernels != "CUDA":
            with guard, torch.no_grad():
                results[number] = model(x)
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            results[number] = model(x)
        stream.synchronize()

    if kernels == "CUDA":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for features in results:
        assert all(torch.equal(features[name], x) for name, x in expected.items())


def test_distributed_data_parallel(expected, backbone, image, device, tmp_path):
    """One rank, by NCCL (on CPUs by gloo): gradients as without, and no complaint of strides."""
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        ids = [0] if device == "cuda" else None
        model = nn.parallel.DistributedDataParallel(backbone.to(device), device_ids=ids)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message="Grad strides do not match bucket view strides"
            )
            loss_of(model(image.to(device))).backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, p in backbone.named_parameters():
        assert relative_error(p.grad, expected[2][name]) < 1e-3, name


def test_memory_of_training(backbone, image, device, kernels):
    """What is kept for the backward pass; on a GPU, the peak is not far above it."""
    model, x = backbone.to(device).train(), image.to(device)
    dim = model.dims[0]
    kept = saved_bytes(model, lambda: loss_of(model(x)))
    stage_maps = 4 * len(x) * 9 * 13 * dim  # bytes of a map of the first stage
    blocks = sum(len(stage.blocks) / 2**i for i, stage in enumerate(model.stages))
    assert kept < 13 * stage_maps * blocks + 30 * stage_maps * 4  # the stem's maps are larger
    if kernels == "CUDA":
        loss_of(model(x)).backward()
        peak = peak_gpu_mb(lambda: loss_of(model(x)).backward())
        assert peak < 3 * kept / 1e6 + 20


def test_tiles_are_for_cpus(kernels, image, device):
    assert optimized._tile_bytes(image.to(device)) > 2**40
