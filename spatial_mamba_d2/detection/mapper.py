"""From a record of an image and its annotations to an input of Detectron2's models."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as d2_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from fvcore.transforms.transform import TransformList

from spatial_mamba_d2.data.images import orientation_hint, read_image
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.detection.augmentation import build_augmentation
from spatial_mamba_d2.detection.panoptic import read_semantic
from spatial_mamba_d2.system.seeding import seeded

Record = dict[str, Any]


def to_input_format(image: np.ndarray, input_format: str) -> np.ndarray:
    """``uint8[H, W, C]`` in the order of channels that the network gets: ``INPUT.FORMAT``."""
    return image[..., ::-1] if input_format == "BGR" else image


def objects_in_view(
    annotations: list[dict[str, Any]], transforms: TransformList, image_shape: tuple[int, int]
) -> list[dict[str, Any]]:
    """Those whose boxes, by a margin of two pixels, are in what augmentation has left of an image.

    The others would be dropped after their masks were transformed, which takes most of the time
    where a crop shows a hundred objects of thousands.

    Args:
        annotations: with ``bbox`` and ``bbox_mode`` of Detectron2.
        image_shape: height and width after ``transforms``.
    """
    if len({annotation["bbox_mode"] for annotation in annotations}) != 1:
        return annotations
    boxes = np.array([annotation["bbox"] for annotation in annotations], float)
    boxes = BoxMode.convert(boxes, annotations[0]["bbox_mode"], BoxMode.XYXY_ABS)
    left, top, right, bottom = transforms.apply_box(boxes).T
    height, width = image_shape
    is_near = (right > -2) & (bottom > -2) & (left < width + 2) & (top < height + 2)
    return [annotation for annotation, near in zip(annotations, is_near, strict=True) if near]


class Mapper(DatasetMapper):
    """Detectron2's mapper with our reading of images, our augmentation, and errors with names.

    Args:
        flip_indices: int[K], which keypoint each one becomes in the mirror image.
    """

    def __init__(self, cfg: CfgNode, is_train: bool, flip_indices: np.ndarray | None = None):
        super().__init__(
            is_train,
            augmentations=build_augmentation(cfg, is_train),
            image_format=cfg.INPUT.FORMAT,
            use_instance_mask=cfg.MODEL.MASK_ON,
            use_keypoint=cfg.MODEL.KEYPOINT_ON,
            instance_mask_format=cfg.INPUT.MASK_FORMAT,
            keypoint_hflip_indices=flip_indices,
            # As in Detectron2, where these crops are the only ones: boxes of what is left of masks
            recompute_boxes=is_train
            and cfg.MODEL.MASK_ON
            and (cfg.INPUT.CROP.ENABLED or cfg.INPUT.SCALE_JITTER.ENABLED),
        )
        self.num_channels = cfg.INPUT.CHANNELS
        self.value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)
        semantic = cfg.MODEL.SEM_SEG_HEAD
        self.num_semantic, self.ignored = semantic.NUM_CLASSES, semantic.IGNORE_VALUE

    def __call__(self, record: Record) -> Record:
        return self.transform(*self.read(record))

    def read(self, record: Record) -> tuple[Record, np.ndarray]:
        """A copy of the record, and its image in ``INPUT.FORMAT``.

        Raises:
            FileNotFoundError: the image is missing.
            ValueError: it is truncated, no image, or of another size than its record says; or its
                label map is.
        """
        image = read_image(record["file_name"], self.num_channels, self.value_range)
        record = copy.deepcopy(record)
        try:
            d2_utils.check_image_size(record, image)
        except d2_utils.SizeMismatchError as error:
            hint = orientation_hint(record["file_name"], (record["height"], record["width"]))
            raise ValueError(f"image file {record['file_name']}: {error}{hint}") from None
        if path := record.pop("sem_seg_file_name", None):
            size = (record["height"], record["width"])
            record["sem_seg"] = read_semantic(path, size, self.num_semantic, self.ignored)
        return record, to_input_format(image, self.image_format)

    def transform(
        self, record: Record, image: np.ndarray, rng: np.random.Generator | None = None
    ) -> Record:
        """Augment what :meth:`read` gave, into an input of Detectron2's models.

        Args:
            rng: seeds the augmentations, which draw from the global generators; None leaves them.

        Raises:
            ValueError: the annotations do not fit the image or each other.
        """
        aug_input = T.AugInput(image, sem_seg=record.get("sem_seg"))
        with seeded(int(rng.integers(2**32))) if rng else contextlib.nullcontext():
            transforms = self.augmentations(aug_input)
        image = aug_input.image
        if aug_input.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(aug_input.sem_seg.astype("long"))
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
            return record
        if "annotations" not in record:
            return record
        try:
            self._check_masks(record)
            self._transform_annotations(record, transforms, image.shape[:2])
        except ValueError as error:
            raise ValueError(f"annotations of image {record['file_name']}: {error}") from error
        return record

    def _check_masks(self, record: Record) -> None:
        """Detectron2 would stretch a mask of another size."""
        size = [record["height"], record["width"]]
        for annotation in record["annotations"]:
            mask = annotation.get("segmentation")
            if self.use_instance_mask and isinstance(mask, dict) and list(mask["size"]) != size:
                raise ValueError(f"RLE of size {mask['size']} in an image of size {size}")

    def _transform_annotations(
        self, dataset_dict: Record, transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        """Detectron2's, in which ``INPUT.MASK_FORMAT polygon`` does not exclude RLE.

        An image with RLE has bitmasks, which heads and losses take as well as polygons.
        """
        objects = [a for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
        annotations = objects_in_view(objects, transforms, image_shape)
        for annotation in annotations:
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
        has_rle = any(isinstance(a.get("segmentation"), dict) for a in annotations)
        instances = d2_utils.annotations_to_instances(
            [
                d2_utils.transform_instance_annotations(
                    annotation,
                    transforms,
                    image_shape,
                    keypoint_hflip_indices=self.keypoint_hflip_indices,
                )
                for annotation in annotations
            ],
            image_shape,
            mask_format="bitmask" if has_rle else self.instance_mask_format,
        )
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = d2_utils.filter_empty_instances(instances)
