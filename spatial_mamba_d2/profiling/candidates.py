"""What the benchmark times: our operators, detector and UPerNet, and others' next to them.

Candidates that must agree are compared before any is returned. Each is a call without arguments,
on the default device of PyTorch (``with torch.device(...)``). Those of backbones are in
:mod:`.backbone_candidates`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spatial_mamba_d2.model_zoo import get_config
from spatial_mamba_d2.models import (
    build_upernet,
    optimize_for_inference,
    quantize_for_inference,
)
from spatial_mamba_d2.models.quantized import why_not_int8
from spatial_mamba_d2.ops import _extension, structure_aware_ssm
from spatial_mamba_d2.profiling.detector_layers import forward_all_layers
from spatial_mamba_d2.profiling.timing import InContext

Candidates = dict[str, Callable[[], Any]]

NATIVE, EAGER = "ours, compiled operators", "ours, plain PyTorch operators"
OPTIMISED = "ours, optimised"
#: Largest difference between two candidates, relative to the largest value. In bfloat16, with 8
#: significant bits, the rounding errors of a backbone's layers add up.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def is_float32(name: str) -> bool:
    """Whether the candidate of this name computes in float32."""
    return not any(other in name for other in ("bfloat16", "int8", "TF32"))


def check_agreement(
    outputs: dict[str, Tensor], tolerance: float = TOLERANCE[torch.float32]
) -> None:
    """Compare all outputs with the first one.

    Raises:
        RuntimeError: one differs by more than ``tolerance``, relative to the largest value.
    """
    (first_name, first), *others = outputs.items()
    for name, value in others:
        error, largest = (value - first).abs().max().item(), first.abs().max().item()
        if not error <= tolerance * largest:  # also true for NaN
            relative = error / largest if largest else math.inf
            raise RuntimeError(
                f"{name} differs from {first_name} by {relative:.1e} of the largest value"
            )


def outputs_of(candidates: Mapping[str, Callable[[], Any]]) -> dict[str, Tensor]:
    return {name: candidate() for name, candidate in candidates.items()}


def in_int8(model: nn.Module, run: Callable[[nn.Module], Any]) -> Candidates:
    """``run`` on ``model`` with products in 8 bits, calibrated by itself, where the CPU can."""
    if torch.get_default_device().type != "cpu" or why_not_int8():
        return {}
    return {f"{OPTIMISED}, int8": partial(run, quantize_for_inference(model, run))}


def implementations() -> list[str]:
    """Implementations of our operators on the default device."""
    on_cuda = torch.get_default_device().type == "cuda"
    why_not = _extension.why_no_cuda() if on_cuda else _extension.WHY_NOT_COMPILED
    return [EAGER] if why_not else [NATIVE, EAGER]


def using(implementation: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """``function`` with plain PyTorch operators if the name is ``EAGER``, else as it is."""
    if implementation != EAGER:
        return function
    return InContext(function, _extension.without_compiled_kernels)


def operator_candidates(batch: int, height: int, width: int, dim: int) -> Candidates:
    """The fused operator on a map ``[batch, height, width, dim]``, forward and backward."""
    u, delta = torch.randn(2, batch, height, width, dim)
    B, C = torch.randn(2, batch, height, width)
    A, D, bias = -torch.rand(dim), torch.randn(dim), torch.randn(dim) - 3
    inputs = [u, delta, A, B, C, D, bias, 0.2 * torch.randn(25, dim)]
    leaves = [x.requires_grad_() for x in map(torch.clone, inputs)]
    cotangent = torch.randn_like(u)

    def forward() -> Tensor:
        with torch.no_grad():
            return structure_aware_ssm(*inputs)

    def backward() -> Tensor:
        return torch.autograd.grad(structure_aware_ssm(*leaves), leaves, cotangent)[0]

    candidates: Candidates = {}
    for part, function in (("forward", forward), ("forward and backward", backward)):
        named = {f"{name}: {part}": using(name, function) for name in implementations()}
        check_agreement(outputs_of(named))
        candidates |= named
    y = torch.empty_like(u)
    same_bytes = partial(torch.add, u, delta, out=y)
    return {**candidates, "u + delta, the same bytes in one pass": same_bytes}


def detector_candidates(batch: int, height: int, width: int) -> Candidates:
    """All layers of Mask R-CNN, ours and Detectron2's with a ResNet-50; needs Detectron2."""
    from spatial_mamba_d2.detection import build_model

    zoo_name = "mask_rcnn_spatial_mamba_t"
    device = ["MODEL.DEVICE", torch.get_default_device().type]
    resnet = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    resnet += ["MODEL.RESNETS.OUT_FEATURES", str(["res2", "res3", "res4", "res5"])]
    ours = build_model(get_config(zoo_name, device)).eval()
    other = build_model(get_config(zoo_name, device + resnet)).eval()
    images = torch.randn(batch, 3, height, width)

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return forward_all_layers(model, images)[0][0][0]  # objectness on the finest level

    candidates = {name: using(name, partial(forward, ours)) for name in implementations()}
    candidates[OPTIMISED] = partial(forward, optimize_for_inference(ours))
    check_agreement(outputs_of(candidates))
    return {**candidates, "Detectron2 ResNet-50": partial(forward, other)}


#: Above the scores of most classes with random weights, 1 / (K + 1), so that NMS has as much to do
#: as with trained ones.
_SCORE_MARGIN = 1.07


def prediction_candidates(
    batch: int, height: int, width: int, num_proposals: int = 1000, num_detections: int = 100
) -> Candidates:
    """From images to boxes, classes and masks: Mask R-CNN, ours and torchvision's; Detectron2.

    All have random weights, and at most ``num_proposals`` and ``num_detections`` for each image.
    """
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    from spatial_mamba_d2.detection import build_model

    device = torch.get_default_device().type
    words = ["MODEL.DEVICE", device, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", str(_SCORE_MARGIN / 81)]
    words += ["MODEL.RPN.POST_NMS_TOPK_TEST", str(num_proposals)]
    words += ["TEST.DETECTIONS_PER_IMAGE", str(num_detections)]
    ours = build_model(get_config("mask_rcnn_spatial_mamba_t", words)).eval()
    other = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, min_size=min(height, width),
        max_size=max(height, width), box_score_thresh=_SCORE_MARGIN / 91,
        rpn_post_nms_top_n_test=num_proposals, box_detections_per_img=num_detections,
    ).eval()  # fmt: skip
    images = torch.randint(0, 256, (batch, 3, height, width)).float()
    inputs = [{"image": image} for image in images]

    def detect(model: nn.Module) -> Tensor:
        """Scores, and each side of the boxes, sorted: detections of one score have no order."""
        with torch.no_grad():
            found = [output["instances"] for output in model(inputs)]
        boxes = torch.cat([instances.pred_boxes.tensor for instances in found])
        scores = torch.cat([instances.scores for instances in found])
        return torch.cat((boxes.sort(dim=0).values / max(height, width), scores[:, None]), dim=1)

    def detect_in_torchvision() -> Any:
        with torch.no_grad():
            return other([image / 255 for image in images])

    candidates: Candidates = {
        name: using(name, partial(detect, ours)) for name in implementations()
    }
    candidates[OPTIMISED] = partial(detect, optimize_for_inference(ours))
    check_agreement(outputs_of(candidates))
    low = f"{OPTIMISED}, bfloat16"
    candidates[low] = partial(detect, optimize_for_inference(ours, torch.bfloat16))
    candidates |= in_int8(ours, detect)
    candidates["torchvision maskrcnn_resnet50_fpn_v2"] = detect_in_torchvision
    return candidates


def segmentation_candidates(batch: int, height: int, width: int) -> Candidates:
    """UPerNet, from images to logits."""
    ours = build_upernet("tiny").eval()
    images = torch.randn(batch, 3, height, width)

    def segment(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(images)

    exact = {name: using(name, partial(segment, ours)) for name in implementations()}
    exact[OPTIMISED] = partial(segment, optimize_for_inference(ours))
    check_agreement(outputs_of(exact))
    low = torch.bfloat16
    rough: Candidates = {
        f"{OPTIMISED}, bfloat16": partial(segment, optimize_for_inference(ours, low)),
        **in_int8(ours, segment),
    }
    check_agreement({OPTIMISED: exact[OPTIMISED](), **outputs_of(rough)}, TOLERANCE[low])
    return {**exact, **rough}
