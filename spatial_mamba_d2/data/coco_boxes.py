"""Statistics over the boxes of a COCO file: whether they are what COCO says, x, y, width, height.

A file with ``[x1, y1, x2, y2]``, with centres, or with fractions of the image's size is no COCO
file, but each single box of it may look like a valid one. Over all boxes it shows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Boxes may reach beyond the image by that much: of rounding, or as pixels counted from 1.
SLACK_PX = 2.0
# Below this share of boxes inside the image (or equal to their masks), another reading is tried.
SUSPECT = 0.8
# So many boxes have to reach out of their images; fewer may be of objects that are cut off.
MIN_LEAVING = 10
# Another reading is believed if it fits this share of boxes.
CONVINCING = 0.95


class BoxStatistics(NamedTuple):
    """Attributes:
    problem: why all boxes of the file are wrong; None if they are not.
    notes: what is unusual about single ones.
    """

    problem: str | None
    notes: list[str]


@np.errstate(over="ignore", invalid="ignore")  # numbers may be absurd
def examine_boxes(
    bbox: np.ndarray, sizes: np.ndarray, areas: np.ndarray, mask_boxes: np.ndarray
) -> BoxStatistics:
    """What the boxes of a file look like together.

    Args:
        bbox: float[N, 4], the field of that name of each annotation that is no crowd.
        sizes: int[N, 2], height and width of its image, in pixels.
        areas: float[N], its field ``area``, NaN if there is none.
        mask_boxes: float[N, 4], x1, y1, x2, y2 of its mask, NaN if there is none.
    """
    if not len(bbox):
        return BoxStatistics(None, [])
    height, width = sizes.T  # [N] each
    if bbox.max() <= 1 and sizes.min() > 4:
        return BoxStatistics(
            f"all {len(bbox)} boxes have numbers of at most 1, such as {_shown(bbox[0])}: these "
            "are fractions of the image's size, and COCO has pixels",
            [],
        )
    xywh, others = _readings(bbox)
    inside = boxes_inside(xywh, width, height)
    fits = {name: [boxes_inside(box, width, height).mean()] for name, box in others.items()}
    problems = []
    notes = []

    num_leaving = int((~inside).sum())
    if num_leaving:
        notes.append(
            f"{num_leaving} of {len(bbox)} boxes reach out of their image by more than "
            f"{SLACK_PX:g} px"
        )
        if num_leaving >= MIN_LEAVING and inside.mean() < SUSPECT:
            problems.append(notes[-1])

    has_mask = np.isfinite(mask_boxes).all(axis=1)
    weighty = has_mask.mean() >= 0.5  # a few masks may be wrong themselves
    agree = np.ones(0, bool)
    if has_mask.any():
        agree = boxes_agree(xywh[has_mask], mask_boxes[has_mask])
        if weighty:
            for name, box in others.items():
                fits[name].append(boxes_agree(box[has_mask], mask_boxes[has_mask]).mean())
        num_other = int((~agree).sum())
        if num_other:
            notes.append(f"{num_other} of {has_mask.sum()} boxes disagree with their masks")
            if weighty and agree.mean() < SUSPECT:
                problems.append(notes[-1])
    if not weighty:
        given = (areas > 0) & ~has_mask
        if given.any():
            same = _same_area(xywh[given], areas[given])
            read_otherwise = {
                name: _same_area(box[given], areas[given]).mean() for name, box in others.items()
            }
            are_corners = read_otherwise["x1, y1, x2, y2"] >= CONVINCING
            is_other = same.mean() < 1 - CONVINCING and are_corners
            if is_other:
                problems.append(f"{(~same).sum()} of {len(same)} boxes disagree with their area")
            if is_other or same.mean() >= CONVINCING:
                for name, share in read_otherwise.items():
                    fits[name].append(share)

    if not problems:
        return BoxStatistics(None, notes)
    name, fit = max(fits.items(), key=lambda item: min(item[1]))
    if min(fit) >= CONVINCING:
        return BoxStatistics(
            f"{'; '.join(problems)}; they do fit as [{name}], and COCO has [x, y, width, height] "
            f"with the upper left corner: {_shown(bbox[0])}",
            [],
        )
    # Boxes of complete objects may be larger than masks of what is visible, but not nearly all.
    if weighty and agree.mean() < 0.1:
        return BoxStatistics(
            f"{'; '.join(problems)}; bbox must be [x, y, width, height] in pixels of the image "
            "whose size is recorded",
            [],
        )
    return BoxStatistics(None, notes)


def _readings(bbox: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """x1, y1, x2, y2 of each box, float[N, 4], if read as COCO says, and as other tools write."""
    first, second = bbox[:, :2], bbox[:, 2:]
    return np.hstack((first, first + second)), {
        "x1, y1, x2, y2": bbox,
        "x of the centre, y of the centre, width, height": np.hstack(
            (first - second / 2, first + second / 2)
        ),
        "y1, x1, y2, x2": bbox[:, [1, 0, 3, 2]],
    }


def boxes_inside(box: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Whether each box has an area and is inside its image: bool[N]."""
    x1, y1, x2, y2 = box.T
    low = (x1 >= -SLACK_PX) & (y1 >= -SLACK_PX)
    high = (x2 <= width + SLACK_PX) & (y2 <= height + SLACK_PX)
    return low & high & (x2 > x1) & (y2 > y1)


def boxes_agree(box: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the sides of each box are those of the other one, by 2 px or a tenth: bool[N]."""
    tolerance = np.maximum(SLACK_PX, 0.1 * (other[:, 2:] - other[:, :2]).max(axis=1))
    return np.abs(box - other).max(axis=1) <= tolerance


def _same_area(box: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Whether each box has that area, to one percent: bool[N]."""
    sides = box[:, 2:] - box[:, :2]
    return np.abs(sides.prod(axis=1) - area) <= 0.01 * area


def _shown(box: np.ndarray) -> str:
    return str([round(float(number), 3) for number in box])
