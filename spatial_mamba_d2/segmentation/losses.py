"""Losses of segmentation, by the keys of ``MODEL``.

Those of pixels are means over all of them, of which the ignored ones contribute 0, as in
mmsegmentation. So the mean over processes and micro-batches is the mean over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.data.class_indices import ignore_index
from spatial_mamba_d2.models.upernet import resize

# logits Tensor[B, K, h, w], target Tensor[B, H, W], weights of classes Tensor[K] or None -> scalar
PixelLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
PIXEL_LOSSES = ("cross_entropy", "focal", "ohem")


def build_pixel_loss(cfg: CfgNode) -> PixelLoss:
    """``MODEL.PIXEL_LOSS``, which both heads have."""
    losses: dict[str, PixelLoss] = {
        "cross_entropy": cross_entropy,
        "focal": partial(focal_loss, gamma=cfg.MODEL.FOCAL_GAMMA),
        "ohem": partial(hard_pixel_loss, share=cfg.MODEL.OHEM_SHARE),
    }
    return losses[cfg.MODEL.PIXEL_LOSS]


def _pixel_losses(logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Cross entropy of each pixel, ``Tensor[B, H, W]``; 0 where it is ignored."""
    logits = resize(logits, target.shape[-2:])
    ignored = ignore_index(logits.shape[1])
    return F.cross_entropy(logits, target.long(), weights, ignore_index=ignored, reduction="none")


def cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over all pixels, of which the ignored ones contribute 0, as in mmsegmentation.

    So the mean over processes and micro-batches is the mean over the batch.

    Args:
        logits: ``Tensor[B, K, h, w]``, resized to the target.
        target: class indices and :func:`~.class_indices.ignore_index`, ``Tensor[B, H, W]``.
        weights: factor for the loss of each class, ``Tensor[K]``.
    """
    return _pixel_losses(logits, target, weights).mean()


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice coefficient of probabilities, the mean over the classes that the target has.

    Args:
        logits, target: see :func:`cross_entropy`; ignored pixels do not count.
    """
    probabilities = resize(logits, target.shape[-2:]).softmax(1)
    num_classes = probabilities.shape[1]
    counted = target != ignore_index(num_classes)
    classes = torch.where(counted, target, 0).long()
    own = (probabilities.gather(1, classes[:, None])[:, 0] * counted).flatten()
    # In double precision: single pixels would get lost in a sum of millions.
    zeros = torch.zeros(num_classes, dtype=torch.float64, device=own.device)
    both = zeros.index_add(0, classes.flatten(), own.double()).to(own.dtype)
    truth = zeros.index_add(0, classes.flatten(), counted.flatten().double()).to(own.dtype)
    either = (probabilities * counted[:, None]).sum((0, 2, 3)) + truth
    present = truth > 0
    losses = torch.where(present, 1 - 2 * both / either.clamp(min=1e-6), 0.0)
    return losses.sum() / present.sum().clamp(min=1)


def balancing_weights(pixels: Sequence[int]) -> list[float]:
    """Weight of each class: the cube root of the median frequency over its own, 0.1 to 10.

    Without the root it is that of Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic
    Labels", arXiv 1411.4734, which finds more of the rare classes and costs IoU: after 250
    iterations on the generated shapes 58.5 %, with the square root 66.4 %, with the cube root
    76.7 %. A class that does not occur has weight 1.
    """
    occurring = sorted(count for count in pixels if count)
    median = occurring[len(occurring) // 2] if occurring else 1
    return [min(10.0, max(0.1, (median / count) ** (1 / 3))) if count else 1.0 for count in pixels]


def focal_loss(
    logits: Tensor, target: Tensor, weights: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Cross entropy times ``(1 - p)^gamma``, of the probability p of the true class.

    Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, of several classes.

    Args:
        logits, target, weights: see :func:`cross_entropy`.
        gamma: at least 0, which is cross entropy.
    """
    losses = _pixel_losses(logits, target, None)
    losses = losses * (1 - torch.exp(-losses)).clamp(min=0) ** gamma
    if weights is not None:
        counted = target != ignore_index(logits.shape[1])
        losses = losses * weights[torch.where(counted, target, 0).long()]
    return losses.mean()


def hard_pixel_loss(
    logits: Tensor, target: Tensor, weights: Tensor | None = None, *, share: float = 0.25
) -> Tensor:
    """Cross entropy of the pixels with the largest losses only (OHEM), as mean over these.

    Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining",
    arXiv 1604.03540, for pixels.

    Args:
        logits, target, weights: see :func:`cross_entropy`.
        share: of the pixels of each image that are not ignored, above 0 and at most 1.
    """
    losses = _pixel_losses(logits, target, weights).flatten(1)
    counted = (target != ignore_index(logits.shape[1])).flatten(1)
    number = (share * counted.sum(1)).ceil().long()  # [B]
    ordered = losses.sort(dim=1, descending=True).values
    kept = torch.arange(ordered.shape[1], device=ordered.device) < number[:, None]
    return (ordered * kept).sum() / kept.sum().clamp(min=1)


def lovasz_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Lovász-Softmax: a convex extension of 1 - IoU, the mean over the classes in the target.

    Berman et al., "The Lovász-Softmax loss", arXiv 1705.08790, over all pixels of the batch.

    Args:
        logits, target: see :func:`cross_entropy`; ignored pixels do not count.
    """
    probabilities = resize(logits, target.shape[-2:]).float().softmax(1)
    counted = target != ignore_index(logits.shape[1])
    probabilities = probabilities.permute(0, 2, 3, 1)[counted]  # [N, K]
    classes = target[counted].long()
    losses = []
    for k in torch.unique(classes).tolist():
        truth = (classes == k).float()
        errors, order = (truth - probabilities[:, k]).abs().sort(descending=True)
        truth = truth[order]
        total = truth.sum()
        jaccard = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
        steps = torch.cat([jaccard[:1], jaccard.diff()])
        losses.append(errors @ steps)
    return torch.stack(losses).mean() if losses else probabilities.sum()
