"""Models in folders of the Hugging Face Hub's form, without the Hub."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard

from spatial_mamba_d2 import hub, model_zoo
from spatial_mamba_d2.models import build_backbone, build_classifier, build_upernet, load_weights
from spatial_mamba_d2.models.checkpoints.reading import WeightsError

SMALL = {"embed_dim": 16, "depths": (1, 2, 1, 1), "mlp_ratio": 2.0, "in_chans": 4}
HEADS = {"channels": 8, "aux_channels": 4}


def classifier(num_classes=5, **options):
    torch.manual_seed(0)
    return build_classifier("tiny", num_classes, **{**SMALL, **options}).eval()


def segmentor(name="tiny", **options):
    torch.manual_seed(0)
    return build_upernet(name, 5, **HEADS, **options).eval()


def assert_same(model, other):
    assert type(model) is type(other) and not other.training
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (classifier, 4),
        (lambda: classifier(num_classes=0, global_pool=""), 4),
        (lambda: segmentor(**SMALL), 4),
        (lambda: segmentor("timm/test_convnext", in_chans=4), 4),
        (lambda: segmentor("timm/test_resnet"), 3),
    ],
    ids=["classifier", "features", "upernet", "convnext", "resnet"],
)
def test_the_same_model_comes_back(build, channels, tmp_path):
    model = build()
    assert hub.save_pretrained(model, tmp_path / "new/folder") == tmp_path / "new/folder"
    other = hub.from_pretrained(tmp_path / "new/folder")
    assert_same(model, other)
    x = torch.randn(2, channels, 40, 33)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
    names = {path.name for path in (tmp_path / "new/folder").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}


def test_timm_reads_a_classifier(tmp_path):
    # Older versions of timm adapt every stem as if its weights were for RGB.
    channels = 4 if find_spec("timm.models._input") else 3
    model = classifier(in_chans=channels)
    hub.save_pretrained(model, tmp_path, label_names=list("abcde"))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same(model, other)
    cfg = other.pretrained_cfg
    assert cfg["label_names"] == list("abcde") and tuple(cfg["input_size"]) == (channels, 224, 224)
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert torch.equal(tuned.norm.weight, model.norm.weight) and len(tuned.head.weight) == 3
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    assert features.feature_info.channels() == [16, 32, 64, 128]


def test_a_classifier_that_timm_has_saved(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("spatial_mamba_tiny", num_classes=3, embed_dim=16).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert_same(model, hub.from_pretrained(tmp_path))


def test_options_of_training(tmp_path):
    hub.save_pretrained(segmentor(**SMALL), tmp_path)
    model = hub.from_pretrained(tmp_path, bn_policy="frozen", drop_path_rate=0.5)
    assert model.backbone.bn_policy == "frozen"
    with pytest.raises(ValueError, match="must not change the saved model, got num_classes"):
        hub.from_pretrained(tmp_path, num_classes=7)
    with pytest.raises(ValueError, match="must be arguments of UPerNet: .*'drop_paths'"):
        hub.from_pretrained(tmp_path, drop_paths=0.5)
    other = build_upernet("tiny", 7, **HEADS, **SMALL)  # other classes: as from any checkpoint
    skip = ["decode_head.classify", "auxiliary_head.classify"]
    report = load_weights(other, tmp_path / "model.safetensors", skip=skip)
    assert len(report.new) == 4


def test_the_recipe_has_no_paths_of_this_machine(tmp_path):
    pytest.importorskip("fvcore", reason="fvcore is not installed")
    from spatial_mamba_d2.segmentation.config import load_config

    words = ["OUTPUT_DIR", "/home/me/output", "MODEL.WEIGHTS", "/home/me/w.pth", "DATASETS.ROOT",
             "/home/me/data", "TEST.SAVE_LABELS", "/home/me/labels", "INPUT.SHORT_PX", "384",
             "MODEL.SPATIAL_MAMBA.VARIANT", "tiny"]  # fmt: skip
    hub.save_pretrained(segmentor(**SMALL), tmp_path, cfg=load_config(None, words))
    assert "/home" not in (tmp_path / "config.yaml").read_text()
    cfg = load_config(tmp_path / "config.yaml")
    assert cfg.INPUT.SHORT_PX == 384 and cfg.MODEL.WEIGHTS == ""


def test_preprocessing_of_a_classifier_is_that_of_its_configuration(tmp_path):
    pytest.importorskip("fvcore", reason="fvcore is not installed")
    from spatial_mamba_d2.classification.config import load_config

    words = ["INPUT.CROP_PX", "64", "TEST.SHORT_PX", "80", "MODEL.PIXEL_MEAN", "(127.5,0,255)"]
    hub.save_pretrained(classifier(in_chans=3), tmp_path, cfg=load_config(None, words))
    data = timm.data.resolve_model_data_config(
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    )
    assert tuple(data["input_size"]) == (3, 64, 64) and data["crop_pct"] == 0.8
    assert list(data["mean"]) == [0.5, 0, 1]


def test_detector(tmp_path, test_variant):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from spatial_mamba_d2.detection import build_model
    from spatial_mamba_d2.detection.config import load_config

    words = ["MODEL.DEVICE", "cpu", "MODEL.SPATIAL_MAMBA.VARIANT", test_variant,
             "MODEL.BACKBONE.NAME", "build_spatial_mamba_fpn_backbone", "MODEL.FPN.IN_FEATURES",
             "['res2','res3','res4','res5']", "MODEL.RPN.IN_FEATURES", "['p2','p3','p4','p5','p6']",
             "MODEL.ANCHOR_GENERATOR.SIZES", "[[32],[64],[128],[256],[512]]",
             "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES",
             "['p2','p3','p4','p5']", "MODEL.ROI_HEADS.NUM_CLASSES", "2",
             "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", "1",
             "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "DATASETS.TRAIN_JSON", "/home/me/a.json",
             "DATASETS.TRAIN_IMAGES", "/home/me/images"]  # fmt: skip
    cfg = load_config(None, words)
    model = build_model(cfg).eval()
    with pytest.raises(ValueError, match="cfg must be given for a detector"):
        hub.save_pretrained(model, tmp_path)
    hub.save_pretrained(model, tmp_path, cfg=cfg, label_names=["cat", "dog"])
    assert "/home" not in (tmp_path / "config.yaml").read_text()
    assert_same(model, hub.from_pretrained(tmp_path))
    assert hub.read_config(tmp_path)["label_names"] == ["cat", "dog"]
    assert "2: cat, dog" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="options must be none for a detector, got freeze_at"):
        hub.from_pretrained(tmp_path, freeze_at=2)


@pytest.mark.parametrize("task", model_zoo.TASKS)
def test_cards_of_published_models_state_the_zoo(task):
    from spatial_mamba_d2 import model_card

    for name in model_zoo.list_models(task):
        entry = model_zoo.get_entry(name)
        facts = model_card.Facts(task, f"spatial_mamba_{entry.variant}", entry.parameters, 80)
        card = ModelCard(model_card.write(facts, name))
        assert card.data.license == "apache-2.0" and card.data.pipeline_tag
        for fact in (*entry.scores, f"{entry.parameters:,}", f"{entry.published_gflops:g} G",
                     model_zoo.TASKS[task].protocol, entry.source):  # fmt: skip
            assert str(fact) in card.text


def test_cards_claim_nothing_else(tmp_path):
    model = segmentor(**SMALL)
    hub.save_pretrained(model, tmp_path, scores={"mIoU": 71.234})
    text = (tmp_path / "README.md").read_text()
    assert "71.23" in text and "Published" not in text and "48.6" not in text
    assert "license" not in text and "state-space-model" in text
    hub.save_pretrained(segmentor("timm/test_resnet"), tmp_path / "other")
    text = (tmp_path / "other/README.md").read_text()
    assert "license" not in text and "paper" not in text and "state-space" not in text
    with pytest.raises(
        ValueError, match="zoo_name must be that of the model, .*'upernet_spatial_m"
    ):
        hub.save_pretrained(model, tmp_path, zoo_name="upernet_spatial_mamba_t")
    (tmp_path / "README.md").write_text("mine")
    hub.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="must be a classifier, a UPerNet or a detector, got Spa"):
        hub.save_pretrained(build_backbone("tiny", **SMALL), tmp_path)
    with pytest.raises(ValueError, match="label_names must be 5, one for each class, got 2"):
        hub.save_pretrained(classifier(), tmp_path, label_names=["a", "b"])
    broken = classifier()
    broken.norm.weight.data[0] = torch.nan
    with pytest.raises(WeightsError, match="not finite"):
        hub.save_pretrained(broken, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="source: no such folder: .*/no/such/folder"):
        hub.from_pretrained(tmp_path / "no/such/folder")
    with pytest.raises(FileNotFoundError, match="weights: no such file: .*model.safetensors"):
        hub.from_pretrained(tmp_path)


def test_the_folder_of_a_training_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("of the training")
    (tmp_path / "last.ckpt").write_text("weights")
    with pytest.raises(ValueError, match=r"folder must not hold a training, got .* with last.ckpt"):
        hub.save_pretrained(segmentor(**SMALL), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "of the training"


def test_no_file_of_the_model_before_stays(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("of another model")
    hub.save_pretrained(segmentor(**SMALL), tmp_path)
    assert not (tmp_path / "config.yaml").exists()
    hub.save_pretrained(segmentor(**SMALL), tmp_path, scores={"mIoU": 1.0})
    assert "README.md is kept" in caplog.text


def test_sizes_that_the_files_cannot_state_are_refused(tmp_path):
    uneven = classifier()
    uneven.stages[1].blocks[0].mlp.fc1 = torch.nn.Linear(32, 100)
    with pytest.raises(
        ValueError, match=r"stages.1.blocks.0.mlp.fc1.weight would be .*\[100, 32\]"
    ):
        hub.save_pretrained(uneven, tmp_path)
    assert not list(tmp_path.iterdir())


def test_broken_configurations_are_named(tmp_path):
    hub.save_pretrained(segmentor("timm/test_convnext"), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for wrong, message in (
        (None, "config.json: model_args must be an object, got None"),
        ({"timm_name": 3}, "config.json: timm_name must be text, got 3"),
        ({"timm_name": "timm/convnext_tiny.nope"}, "config.json: timm_name must be .*nope"),
    ):
        path.write_text(json.dumps({**content, "model_args": wrong}))
        with pytest.raises(ValueError, match=message):
            hub.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="revision must be None for the folder .*, got 'main'"):
        hub.from_pretrained(tmp_path, revision="main")


class _Hub:
    """In place of ``huggingface_hub.HfApi``: a repository that has some files already."""

    def __init__(self, *files):
        self.files = set(files)

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, repo_id, name):
        assert repo_id == "me/small"
        return name in self.files

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        new = {path.name for path in Path(folder_path).iterdir()}
        self.replaced = self.files & new
        self.files = (self.files - {delete_patterns}) | new
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


@pytest.mark.parametrize("before", [(), ("README.md", "config.yaml", "model.safetensors")])
def test_upload(before, monkeypatch):
    repository = _Hub(*before)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: repository)
    assert hub.push_to_hub(segmentor(**SMALL), "small") == "https://hub/me/small"
    assert repository.files == {"README.md", "config.json", "model.safetensors"}
    assert "README.md" not in repository.replaced


def test_errors_of_the_hub_are_named(monkeypatch):
    def fail(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    fail(huggingface_hub.errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(FileNotFoundError, match="source: no such folder, nor is it a repository"):
        hub.from_pretrained("my-upernt", local_files_only=True)
    fail(ConnectionError("reset"))
    with pytest.raises(OSError, match="source me/upernet cannot be downloaded: reset"):
        hub.from_pretrained("me/upernet")


def test_a_file_of_another_model_is_refused(tmp_path):
    hub.save_pretrained(segmentor("timm/test_convnext"), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["model_args"]["timm_name"] = "timm/test_resnet"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="does not fit UPerNet"):
        hub.from_pretrained(tmp_path)
