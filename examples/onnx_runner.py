#!/usr/bin/env python3
"""Run an ONNX file of tools/export_model.py; needs onnxruntime, numpy and Pillow, and nothing else.

    python onnx_runner.py model.onnx photo.jpg [more.jpg ...] --output drawings/

It prints the predictions, and draws them if there is an --output. Copy it into your program: files
of all three tasks say in their metadata how images are resized and what the classes are called.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

SHOWN_SCORE = 0.5  # the least one of detections that are printed and drawn
COLORS = [(230, 60, 60), (60, 160, 240), (80, 190, 90), (240, 180, 40), (170, 90, 220)]


class Model:
    """A classifier, UPerNet or detector in a file; calling it predicts for one image."""

    def __init__(self, path, threads=None):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or os.cpu_count()
        providers = onnxruntime.get_available_providers()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        properties = self.session.get_modelmeta().custom_metadata_map
        self.metadata = json.loads(properties["spatial_mamba_d2"])

    def __call__(self, image):
        """uint8[H, W, 3] in RGB -> dictionary of arrays; labels, boxes and masks fit the image."""
        pixels = self.resize(image)
        if self.metadata["channels"] == "BGR":
            pixels = pixels[..., ::-1]
        batches = self.metadata["task"] != "detection"
        feed = {"image": np.ascontiguousarray(pixels[None] if batches else pixels)}
        names = self.metadata["outputs"]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        if batches:
            outputs = {name: value[0] for name, value in outputs.items()}
        if "boxes" in outputs:
            (height, width), (h, w) = image.shape[:2], pixels.shape[:2]
            outputs["boxes"] = outputs["boxes"] * np.float32([width / w, height / h] * 2)
        if "masks" in outputs:
            pairs = zip(outputs["masks"], outputs["boxes"], strict=True)
            masks = [paste(mask, box, *image.shape[:2]) for mask, box in pairs]
            outputs["masks"] = np.array(masks, bool).reshape(-1, *image.shape[:2])
        if "labels" in outputs:  # nearest neighbours
            (height, width), (h, w) = image.shape[:2], outputs["labels"].shape
            rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
            outputs["labels"] = outputs["labels"][rows][:, columns]
        return outputs

    def resize(self, image):
        """To what the network takes."""
        how = self.metadata["resize"]
        height, width = image.shape[:2]
        if "size_px" in how:  # the file is for one size
            return bilinear(image, *how["size_px"])
        if how["filter"] == "bicubic":  # and a centre crop
            short, crop = how["short_px"], how["crop_px"]
            size = [int(short * side / min(height, width)) for side in (width, height)]
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
            top, left = (round((side - crop) / 2) for side in image.shape[:2])
            return image[top : top + crop, left : left + crop]
        if not how["short_px"]:
            return image
        scale = min(how["short_px"] / min(height, width), how["long_px"] / max(height, width))
        return bilinear(image, *(max(1, int(side * scale + 0.5)) for side in (height, width)))


def bilinear(image, height, width):
    """Without antialiasing, as OpenCV does it: uint8[H, W, C] -> uint8[height, width, C]."""
    x = image.astype(np.float32)
    for axis, size in enumerate((height, width)):
        last = x.shape[axis] - 1
        position = np.clip((np.arange(size) + 0.5) * (last + 1) / size - 0.5, 0, last)
        low = position.astype(int)
        weight = np.float32(position - low).reshape([-1] + [1] * (2 - axis))
        x = x.take(low, axis) * (1 - weight) + x.take(np.minimum(low + 1, last), axis) * weight
    return np.rint(x).astype(np.uint8)


def paste(mask, box, height, width):
    """Probabilities float32[M, M] within a box -> bool[height, width], as Detectron2 does it."""
    cells = np.arange(len(mask))

    def weights(side, low, high):
        """Of linear interpolation, [side, M]."""
        position = (np.arange(side) + 0.5 - low) / (high - low) * len(mask) - 0.5
        return np.maximum(0, 1 - np.abs(position[:, None] - cells))

    return weights(height, box[1], box[3]) @ mask @ weights(width, box[0], box[2]).T >= 0.5


def describe(outputs, classes):
    """One line for each of the five likeliest classes, the classes in a map, or the objects."""
    if "probabilities" in outputs and outputs["probabilities"].ndim == 1:
        best = outputs["probabilities"].argsort()[::-1][:5]
        return [f"{classes[i]} {outputs['probabilities'][i]:.1%}" for i in best]
    if "boxes" in outputs:
        found = zip(outputs["boxes"], outputs["scores"], outputs["classes"], strict=True)
        return [
            f"{classes[c]} {score:.2f} at {', '.join(f'{side:.1f}' for side in box)}"
            for box, score, c in found
            if score >= SHOWN_SCORE
        ]
    labels = outputs["labels"] if "labels" in outputs else outputs["probabilities"].argmax(0)
    shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    return [f"{classes[i]} {shares[i]:.1%}" for i in shares.argsort()[::-1] if shares[i]]


def draw(image, outputs, metadata):
    """The image with labels, boxes and masks; with lines of text for a classifier."""
    picture = image.astype(np.float32)
    if "labels" in outputs:
        picture = (picture + np.array(metadata["palette"])[outputs["labels"]]) / 2
    shown = [i for i, score in enumerate(outputs.get("scores", ())) if score >= SHOWN_SCORE]
    for i in shown:
        if "masks" in outputs:
            inside = outputs["masks"][i]
            picture[inside] = (picture[inside] + COLORS[i % len(COLORS)]) / 2
    picture = Image.fromarray(picture.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for i in shown:
        pen.rectangle(outputs["boxes"][i].tolist(), outline=COLORS[i % len(COLORS)])
        name = metadata["classes"][outputs["classes"][i]]
        pen.text(outputs["boxes"][i][:2].tolist(), name, fill=COLORS[i % len(COLORS)])
    if metadata["task"] == "classification":
        pen.text((2, 2), "\n".join(describe(outputs, metadata["classes"])), fill=(255, 255, 0))
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="folder for drawings")
    args = parser.parse_args()
    model = Model(args.model)
    for path in args.images:
        image = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        outputs = model(image)
        print(f"{path}: {'; '.join(describe(outputs, model.metadata['classes'])) or 'nothing'}")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            draw(image, outputs, model.metadata).save(args.output / f"{path.stem}.png")


if __name__ == "__main__":
    main()
