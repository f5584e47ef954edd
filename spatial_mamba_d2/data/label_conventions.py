"""Label maps of well-known data sets: what their files store, their classes and colours."""

from __future__ import annotations

from spatial_mamba_d2.data.class_indices import IGNORE

# Of cityscapesScripts, labels.py: label id -> class of the benchmark; all other ids are ignored.
_CITYSCAPES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
_CITYSCAPES_LAST = 33
_LICENSE_PLATE = (-1, 255)  # 255 in files of 8 bits

_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
_VOC_VOID = 255


def voc_color(index: int) -> tuple[int, int, int]:
    """Entry of Pascal VOC's palette: bits of the index, the lowest ones to the highest places."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]


def _packed(color: tuple[int, int, int]) -> int:
    red, green, blue = color
    return red << 16 | green << 8 | blue


def _cityscapes_values() -> tuple[tuple[int, int], ...]:
    classes = {label: index for index, (label, _, _) in enumerate(_CITYSCAPES)}
    labels = (*range(_CITYSCAPES_LAST + 1), *_LICENSE_PLATE)
    return tuple((label, classes.get(label, IGNORE)) for label in labels)


def _voc_indices() -> tuple[tuple[int, int], ...]:
    return (*((index, index) for index in range(len(_VOC))), (_VOC_VOID, IGNORE))


# name -> (stored value, class) and (colour as r << 16 | g << 8 | b, class) pairs
LABEL_MAPS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]] = {
    "cityscapes": (_cityscapes_values(), ()),
    "voc": (
        _voc_indices(),
        tuple((_packed(voc_color(stored)), index) for stored, index in _voc_indices()),
    ),
}

# name -> names and RGB colours of the classes
CLASSES: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
    "cityscapes": (
        tuple(name for _, name, _ in _CITYSCAPES),
        tuple(color for _, _, color in _CITYSCAPES),
    ),
    "voc": (tuple(_VOC), tuple(voc_color(index) for index in range(len(_VOC)))),
}
