"""UPerNet on a backbone of timm, through the functions that the command lines call."""

from __future__ import annotations

import pytest
import timm
import torch

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.models.checkpoints.reading import read_checkpoint
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.module import Segmentor
from spatial_mamba_d2.segmentation.predict import Predictor
from spatial_mamba_d2.segmentation.train import run

BACKBONE = ("MODEL.BACKBONE.NAME", "timm/test_convnext")


def test_train_resume_evaluate_and_predict(arguments, tmp_path, shapes, caplog, interrupted):
    classifier = timm.create_model("test_convnext")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    more = (*BACKBONE, "MODEL.WEIGHTS", tmp_path / "classifier.pth",
            "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", 0.1)  # fmt: skip
    with interrupted(Segmentor, 4):
        run(arguments(*more))
    assert "not used (4): head.norm.*, head.fc.*" in caplog.text
    trained = run(arguments(*more, resume=True))
    checkpoint = tmp_path / "output/best.ckpt"
    state = read_checkpoint(checkpoint)["state_dict"]
    start = classifier.state_dict()["stem.0.weight"]
    assert not torch.equal(state["backbone.body.stem.0.weight"], start)

    words = ("MODEL.WEIGHTS", checkpoint, "OUTPUT_DIR", tmp_path / "evaluation")
    assert run(arguments(*BACKBONE, *words, eval_only=True)) == trained
    predictor = Predictor(load_config(None, arguments(*BACKBONE, *words).opts))
    image = read_image(next((shapes / "images/validation").iterdir()))
    assert predictor(image).shape == image.shape[:2]

    with pytest.raises(ValueError, match="MODEL.BACKBONE.NAME was timm/test_convnext, is spatial_"):
        run(arguments(resume=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convnext_tiny"], "must be spatial_mamba or timm/NAME, .*got 'convnext_tiny'"),
        (["timm/convnext_tiney"], "MODEL.BACKBONE.NAME .* nearest one is timm/convnext_tiny"),
        (["timm/spatial_mamba_tiny"], "MODEL.BACKBONE.NAME must be a model of others"),
        (
            ["timm/test_convnext", "MODEL.BACKBONE.FREEZE_AT", "2"],
            "FREEZE_AT must be 0 with MODEL.BACKBONE.NAME timm/test_convnext, .*got 2",
        ),
    ],
)
def test_wrong_names_are_errors_at_the_start(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, ["MODEL.BACKBONE.NAME", *words])


def test_the_key_of_the_section_is_named():
    with pytest.raises(ValueError, match="MODEL.BACKBONE must be a section .*FREEZE_AT, NAME, got"):
        load_config(None, ["MODEL.BACKBONE", "timm/convnext_tiny"])
