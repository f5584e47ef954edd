"""Each recipe learns a few images by heart, resumes exactly, and exports what it has learned.

Minutes each: ``python3 dev.py test -m long tests/detection/test_overfitting.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spatial_mamba_d2.data.shapes import generate_shapes
from spatial_mamba_d2.detection.coco_evaluation import evaluate_coco
from spatial_mamba_d2.detection.train import run
from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.models.variants import VARIANTS
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.loading import load_predictor

# The scores that must be reached; exported are boxes and masks.
AP50 = {
    "faster_rcnn_spatial_mamba_t": ("bbox",),
    "mask_rcnn_spatial_mamba_t": ("bbox", "segm"),
    "mask_rcnn_spatial_mamba_t_lsj": ("bbox", "segm"),
    "cascade_mask_rcnn_spatial_mamba_t": ("bbox", "segm"),
    "cascade_mask_rcnn_spatial_mamba_t_3x": ("bbox", "segm"),
    "point_rend_spatial_mamba_t": ("bbox", "segm"),
    "retinanet_spatial_mamba_t": ("bbox",),
    "keypoint_rcnn_spatial_mamba_t": ("bbox", "keypoints"),
    "panoptic_fpn_spatial_mamba_t": ("bbox", "segm"),
    "panoptic_point_rend_spatial_mamba_t": ("bbox", "segm"),
}
NUM_ITERATIONS = 200
LAST = 12  # iterations that the resumed training repeats: two lines of metrics
SIDE_PX = 96
ANCHORS_PX = (16, 32, 64, 128, 256)
# Narrow heads, few proposals, and small objects
WORDS = (
    "MODEL.FPN.OUT_CHANNELS", 64,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 64,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 200,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 100,
    "MODEL.ROI_HEADS.NUM_CLASSES", 5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 128,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 2,
    "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", 0.0,
    "DATALOADER.NUM_WORKERS", 0,
    "INPUT.MIN_SIZE_TRAIN", (SIDE_PX,),
    "INPUT.MAX_SIZE_TRAIN", SIDE_PX,
    "INPUT.MIN_SIZE_TEST", SIDE_PX,
    "INPUT.MAX_SIZE_TEST", SIDE_PX,
    "SOLVER.IMS_PER_BATCH", 2,
    "SOLVER.BASE_LR", 0.002,
    "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR",
    "SOLVER.STEPS", (),
    "SOLVER.WARMUP_ITERS", 20,
    "SOLVER.MAX_ITER", NUM_ITERATIONS,
    "SOLVER.CHECKPOINT_PERIOD", NUM_ITERATIONS - LAST,
    "SOLVER.CLIP_GRADIENTS.ENABLED", True,
    "TEST.EVAL_PERIOD", 0,
)  # fmt: skip
MORE = {
    "retinanet_spatial_mamba_t": (
        "MODEL.RETINANET.NUM_CLASSES", 5,
        "MODEL.RETINANET.NUM_CONVS", 2,
        "MODEL.ANCHOR_GENERATOR.SIZES", [[x, 1.25 * x, 1.6 * x] for x in ANCHORS_PX],
    ),
    "panoptic_point_rend_spatial_mamba_t": (
        "MODEL.POINT_HEAD.NUM_CLASSES", 2,
        "MODEL.POINT_HEAD.FC_DIM", 64,
    ),
    "point_rend_spatial_mamba_t": (
        "MODEL.POINT_HEAD.NUM_CLASSES", 5,
        "MODEL.POINT_HEAD.FC_DIM", 64,
        "MODEL.ROI_MASK_HEAD.FC_DIM", 128,
    ),
    "mask_rcnn_spatial_mamba_t_lsj": (
        "INPUT.SCALE_JITTER.SIZE", SIDE_PX,
        "INPUT.SCALE_JITTER.SCALES", (0.7, 1.4),
    ),
    "cascade_mask_rcnn_spatial_mamba_t_3x": (
        "INPUT.RESIZE_CROP.SIZES", (96, 112),
        "INPUT.RESIZE_CROP.CROP_RANGE", (64, 96),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Four images in place of the sample of the other tests."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, num_train=4, num_val=1, image_px=(96, 96))


@pytest.fixture
def test_variant(monkeypatch) -> str:
    """A little wider than that of the other tests."""
    arguments = {"embed_dim": 24, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}
    monkeypatch.setitem(VARIANTS, "test", arguments)
    return "test"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As fast for such small images, and several tests can run at the same time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", AP50)
def test_a_recipe_learns_images_by_heart(name, root, arguments, request, tmp_path, curve):
    words = [*WORDS, *MORE.get(name, ())]
    if name.startswith(("panoptic", "keypoint")):
        words += request.getfixturevalue("stuff" if name.startswith("panoptic") else "keypoints")
    options = arguments(*words, config_file=str(root / f"configs/{name}.yaml"))
    files = dict(zip(options.opts[::2], options.opts[1::2], strict=True))
    for key in [key for key in files if key.startswith("DATASETS.TRAIN_")]:
        options.opts += [key.replace("TRAIN", "TEST"), files[key]]  # tested by what was trained

    results = run(options)
    scores = {task: results[task]["AP50"] for task in AP50[name]}
    print(f"\n{name}: {scores}", results.get("panoptic_seg", {}).get("PQ", ""))
    assert min(scores.values()) >= 90
    if name.startswith("panoptic"):
        assert results["panoptic_seg"]["PQ"] >= 70

    output = tmp_path / "output"
    final = read_checkpoint(output / "model_final.pth")["model"]
    losses = curve(output, "total_loss")
    earlier = f"model_{NUM_ITERATIONS - LAST - 1:07d}.pth"
    (output / "last_checkpoint").write_text(earlier)
    options.resume = True
    for task, resumed in run(options).items():
        assert resumed == pytest.approx(results[task], nan_ok=True)
    again = read_checkpoint(output / "model_final.pth")["model"]
    torch.testing.assert_close(again, final, rtol=0, atol=0)
    assert curve(output, "total_loss") == losses

    predictor = load_predictor(output / "model_final.pth")
    truth_file = files["DATASETS.TRAIN_JSON"]
    options = Options(formats=("coco", "csv"), score_thresh=0.05)
    predict_files([files["DATASETS.TRAIN_IMAGES"]], tmp_path / "predictions", predictor, options)
    exported = {
        task: evaluate_coco(truth_file, as_results(tmp_path, truth_file), task).stats[1] * 100
        for task in AP50[name] if task != "keypoints"
    }  # fmt: skip
    assert min(exported.values()) >= 90, exported
    shutil.rmtree(output)


def as_results(folder: Path, truth_file: str) -> list[dict]:
    """The exported ``coco.json`` with the ids of the ground truth."""
    truth = json.loads(Path(truth_file).read_text())
    found = json.loads((folder / "predictions/coco.json").read_text())
    images = {image["file_name"]: image["id"] for image in truth["images"]}
    of_image = {image["id"]: images[Path(image["file_name"]).name] for image in found["images"]}
    categories = {category["name"]: category["id"] for category in truth["categories"]}
    of_category = {c["id"]: categories[c["name"]] for c in found["categories"]}
    return [
        {**a, "image_id": of_image[a["image_id"]], "category_id": of_category[a["category_id"]]}
        for a in found["annotations"]
    ]
