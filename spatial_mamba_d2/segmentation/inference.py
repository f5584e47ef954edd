"""Whole images, sliding windows, several scales and mirror images; as mmsegmentation does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from spatial_mamba_d2.models.upernet import resize

Model = Callable[[Tensor], Tensor]  # Tensor[B, 3, H, W] -> logits Tensor[B, K, H/4, W/4]

# name -> scales, what they scale, and whether each view is also mirrored. Test-time augmentation of
# mmsegmentation 1.x resizes the original image by each factor, not the frame 2048 x 512.
PROTOCOLS: dict[str, tuple[tuple[float, ...], str, bool]] = {
    "ss": ((1.0,), "frame", False),
    "ms": ((0.75, 1.0, 1.25), "image", True),  # the authors'
    "ms_wide": ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "image", True),  # mmsegmentation's
}


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on besides model and data; stored with every score.

    Attributes:
        name: a short word for file names: ``ss``, ``ms``, ``ms_wide`` or ``custom``.
        mode: ``whole`` or ``slide``.
        crop_px, stride_px: of the sliding window.
        scales: factors on what ``scales_of`` says.
        scales_of: ``frame``, the ``short_px`` x ``long_px`` that an image is fitted into, or
            ``image``, its own size.
        flip: also mirror each view, and average.
        ignored: the stored labels that are not evaluated.
        label_map: ``DATASETS.LABEL_MAP``, which says instead what the stored labels mean.
    """

    name: str
    mode: str
    crop_px: int
    stride_px: int
    scales: tuple[float, ...]
    scales_of: str
    flip: bool
    short_px: int
    long_px: int
    ignored: tuple[int, ...]
    label_map: str = ""

    def __str__(self) -> str:
        window = f", crop {self.crop_px}, stride {self.stride_px}" if self.mode == "slide" else ""
        base = (
            "the image"
            if self.scales_of == "image"
            else f"short side {self.short_px}, long <= {self.long_px}"
        )
        labels = f"stored labels {', '.join(map(str, self.ignored)) or 'none'} ignored"
        if self.label_map:
            labels = "stored labels by DATASETS.LABEL_MAP"
        return (
            f"{self.name} ({self.mode}{window}; scales {', '.join(map(str, self.scales))} of {base}"
            f"{'; with flip' if self.flip else ''}; OpenCV bilinear; {labels})"
        )


def build_protocol(cfg: CfgNode) -> Protocol:
    """From ``cfg.TEST``, ``cfg.INPUT`` and ``cfg.DATASETS``."""
    custom = tuple(map(float, cfg.TEST.SCALES)), cfg.TEST.SCALES_OF, cfg.TEST.FLIP
    scales, scales_of, flip = PROTOCOLS.get(cfg.TEST.PROTOCOL, custom)
    return Protocol(
        name=cfg.TEST.PROTOCOL,
        mode=cfg.TEST.MODE,
        crop_px=cfg.TEST.CROP_PX,
        stride_px=cfg.TEST.STRIDE_PX,
        scales=scales,
        scales_of=scales_of,
        flip=flip,
        short_px=cfg.INPUT.SHORT_PX,
        long_px=cfg.INPUT.LONG_PX,
        ignored=() if cfg.DATASETS.LABEL_MAP else tuple(cfg.DATASETS.IGNORE_LABELS),
        label_map=cfg.DATASETS.LABEL_MAP,
    )


def windows(side: int, crop_px: int, stride_px: int) -> Iterator[slice]:
    """Windows that cover ``side``; the last one ends with it."""
    num_windows = max(side - crop_px + stride_px - 1, 0) // stride_px + 1
    for i in range(num_windows):
        end = min(i * stride_px + crop_px, side)
        yield slice(max(end - crop_px, 0), end)


def slide(model: Model, x: Tensor, crop_px: int, stride_px: int) -> Tensor:
    """Logits of ``x``, ``Tensor[B, 3, H, W]``, averaged over windows: ``Tensor[B, K, H, W]``."""
    height, width = x.shape[-2:]
    total: Tensor | None = None
    count = x.new_zeros(height, width)
    for rows in windows(height, crop_px, stride_px):
        for columns in windows(width, crop_px, stride_px):
            logits = whole(model, x[..., rows, columns])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    assert total is not None  # an image has at least one window
    return total.div_(count)


def whole(model: Model, x: Tensor) -> Tensor:
    """Logits of ``x``, ``Tensor[B, 3, H, W]``, in its size: float32 ``Tensor[B, K, H, W]``."""
    return resize(model(x).float(), x.shape[-2:])


def model_inputs(views: Sequence[Tensor], protocol: Protocol) -> list[tuple[Tensor, bool]]:
    """Each view, ``Tensor[B, C, H_s, W_s]``, and whether the model is to see its mirror image.

    Raises:
        ValueError: there is no view.
    """
    if not views:
        raise ValueError("views must hold at least one view, got none")
    flips = (False, True) if protocol.flip else (False,)
    return [(x, flipped) for x in views for flipped in flips]


def segment(
    model: Model, views: Sequence[Tensor], size: Sequence[int], protocol: Protocol
) -> Tensor:
    """Scores of one image for each class and pixel; their argmax is the prediction.

    Args:
        model: in eval mode.
        views: the normalised image in each scale, ``Tensor[C, H_s, W_s]``.
        size: H, W of the scores, which are those of the original image.

    Returns:
        ``Tensor[K, H, W]``: logits for a single view, else the mean of the views' probabilities.
    """
    return segment_batch(model, [x[None] for x in views], size, protocol)[0]


@torch.no_grad()
def segment_batch(
    model: Model, views: Sequence[Tensor], size: Sequence[int], protocol: Protocol
) -> Tensor:
    """:func:`segment` of images of one size: ``Tensor[B, C, H_s, W_s]`` -> ``[B, K, H, W]``."""
    inputs = model_inputs(views, protocol)
    total: Tensor | None = None
    for view, flipped in inputs:
        x = view.flip(-1) if flipped else view
        if protocol.mode == "slide":
            logits = slide(model, x, protocol.crop_px, protocol.stride_px)
        else:
            logits = whole(model, x)
        if flipped:
            logits = logits.flip(-1)
        logits = resize(logits, size)
        if len(inputs) == 1:
            return logits
        total = logits.softmax(1) if total is None else total.add_(logits.softmax(1))
    assert total is not None  # model_inputs returns at least one
    return total.div_(len(inputs))
