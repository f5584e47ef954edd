"""timm's own model tests, over our names in timm and over the model of ``examples/timm``.

Adapted from ``tests/test_models.py`` of timm 1.0.31 (Copyright Ross Wightman, Apache-2.0), where
all models are real ones. Here, what computes is narrow and shallow, and the real ones have no data.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm.models import (
    FeatureInfo,
    get_notrace_functions,
    get_notrace_modules,
    group_parameters,
)
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import spatial_mamba_d2.models  # noqa: F401  # registers our models

VARIANTS = ("tiny", "small", "base")
FAMILIES = ("spatial_mamba", "spatialmamba")  # ours, the example's
DEPTHS = {"tiny": (2, 4, 8, 4), "small": (2, 4, 21, 5), "base": (2, 4, 21, 5)}
META = {"device": "meta", "dtype": torch.float32}

pytestmark = pytest.mark.usefixtures("timm_example")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_name = pytest.mark.parametrize("name", [f"{f}_{v}" for f in FAMILIES for v in VARIANTS])


def narrow(family, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f"{family}_tiny", embed_dim=8, depths=(1, 1, 1, 1), **kwargs)


def image(batch=1, size=64):
    return torch.randn(batch, 3, size, size)


def feature_graph(model):
    """A graph of torch.fx as timm's tests make it: from the image to the last node."""
    how = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=how)
    return create_feature_extractor(
        model,
        train_return_nodes=train_nodes[-1:],
        eval_return_nodes=eval_nodes[-1:],
        tracer_kwargs=how,
    )


@each_family
def test_forward_and_gradient_checkpointing(family):
    model = narrow(family).eval()
    x = image()
    outputs = model(x)
    assert outputs.shape == (1, 1000) and outputs.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), outputs, rtol=1e-4, atol=1e-5)


@each_family
@pytest.mark.parametrize("graph", [False, True], ids=["model", "fx"])
def test_backward_reaches_all_parameters(family, graph):
    model = narrow(family, num_classes=42).train()
    model = feature_graph(model) if graph else model
    outputs = model(image(2))
    (outputs,) = outputs.values() if graph else (outputs,)
    assert outputs.shape == (2, 42) and outputs.isfinite().all()
    outputs.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@each_family
def test_a_graph_computes_the_same(family):
    model = narrow(family).eval()
    x = image()
    with torch.inference_mode():
        (outputs,) = feature_graph(model)(x).values()
        torch.testing.assert_close(outputs, model(x), rtol=1e-4, atol=1e-5)


@each_family
@pytest.mark.parametrize("graph", [False, True], ids=["model", "fx"])
def test_torchscript(family, graph):
    model = narrow(family).eval()
    x = image()
    with torch.inference_mode():
        scripted = torch.jit.script(feature_graph(model) if graph else model)
        outputs = scripted(x)
        (outputs,) = outputs.values() if graph else (outputs,)
        torch.testing.assert_close(outputs, model(x), rtol=1e-4, atol=1e-5)


@each_name
def test_default_configuration(name):
    """At the real widths, on the meta device."""
    create = partial(timm.create_model, name, depths=(1, 1, 1, 1), **META)
    model = create().eval()
    cfg, fmt = model.default_cfg, model.output_fmt
    assert model.in_chans == cfg["input_size"][0]
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    state = model.state_dict()
    assert cfg["classifier"] + ".weight" in state and cfg["first_conv"] + ".weight" in state

    x = torch.randn(1, *cfg["input_size"], device="meta")
    features = model.forward_features(x)
    assert fmt == "NHWC" and features.shape == (1, *cfg["pool_size"], model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    model.float().reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == pooled.shape
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert create(num_classes=0)(x).shape == pooled.shape
    assert create(num_classes=0, global_pool="")(x).shape == features.shape


@each_name
def test_api(name):
    with pytest.raises(TypeError):
        timm.create_model(name, **META, not_a_model_arg=1)
    model = timm.create_model(name, **META)
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert len(set(groups.values())) == 1 + sum(DEPTHS[name.rpartition("_")[2]]) + 1
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names

    model.requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    assert not any(p.requires_grad for p in model.parameters())
    model.double().eval().reset_classifier(2, "avg")
    head = list(model.get_classifier().parameters())
    assert head and all((p.device.type, p.dtype) == ("meta", torch.float64) for p in head)
    assert not any(module.training for module in model.modules())


@each_family
def test_features_only(family):
    model = narrow(family, features_only=True).eval()
    outputs = model(image(size=96))
    channels = [8, 16, 32, 64]
    assert model.feature_info.channels() == channels
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for output, width, size in zip(outputs, channels, (24, 12, 6, 3), strict=True):
        assert output.shape == (1, width, size, size)


@each_family
def test_forward_intermediates(family):
    model = narrow(family).eval()
    x = image(size=96)
    final, intermediates = model.forward_intermediates(x)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [y.shape[1] for y in intermediates] == info.channels()
    torch.testing.assert_close(final, model.forward_features(x), rtol=1e-5, atol=1e-8)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], final, rtol=1e-4, atol=1e-5)


@each_family
def test_pruning_to_a_stage(family):
    """What is kept gives the same as before, is used in training, and takes a new classifier."""
    model = narrow(family, drop_path_rate=0.0).eval()
    x = image(2, size=32)
    with torch.no_grad():
        expected = model(x)
        stages = model.forward_intermediates(x, intermediates_only=True)
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers([3], prune_head=False)
        torch.testing.assert_close(kept(x), expected)
    for index in range(4):
        with torch.no_grad():
            early = model.forward_intermediates(
                x, indices=[index], stop_early=True, intermediates_only=True
            )
            torch.testing.assert_close(early[0], stages[index])
            pruned = copy.deepcopy(model)
            taken = pruned.prune_intermediate_layers([index], prune_norm=True)
            features = pruned.forward_features(x).permute(0, 3, 1, 2)
            torch.testing.assert_close(features, stages[index])
        pruned.train()
        chosen = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
        (chosen[0].sum() + pruned.forward_features(x).sum()).backward()
        assert [name for name, p in pruned.named_parameters() if p.grad is None] == []
        pruned.reset_classifier(7, "avg")
        assert pruned(x).shape == (2, 7)
        assert pruned.head_hidden_size == stages[index].shape[1]


@each_family
@pytest.mark.parametrize("pool", ["avg", "catavgmax"])
def test_width_of_the_head(family, pool):
    model = narrow(family, num_classes=0).eval()
    x = image(2, size=32)
    for num_classes in (0, 7):
        model.reset_classifier(num_classes, pool)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert pooled.shape[1] == model.head_hidden_size
        assert model(x).shape[1] == (num_classes or model.head_hidden_size)
