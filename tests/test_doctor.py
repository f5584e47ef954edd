import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from spatial_mamba_d2 import doctor
from spatial_mamba_d2.doctor import Finding

ROOT = Path(__file__).parents[1]


def test_it_works_where_nothing_is_installed():
    """-S leaves out site-packages: not even torch is there."""
    run = subprocess.run(
        [sys.executable, "-S", "-m", "spatial_mamba_d2.doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == ""
    assert "missing  torch" in run.stdout
    assert "pip install 'torch>=2.8' 'torchvision>=0.23'\n" in run.stdout
    assert "ok       python" in run.stdout
    assert run.stdout.endswith("Detection needs the fixes above.\n")


def test_a_crashing_check_is_a_finding():
    def crash():
        raise RuntimeError("operator torchvision::nms does not exist")

    finding = doctor.examine(crash)
    assert finding == Finding("missing", "RuntimeError: operator torchvision::nms does not exist")


@pytest.mark.parametrize(
    ("statuses", "code"), [(("ok", "ok"), 0), (("ok", "note"), 0), (("missing", "ok"), 1)]
)
def test_only_what_is_missing_stops_detection(monkeypatch, capsys, statuses, code):
    findings = [Finding(status, "text", "command") for status in statuses]
    checks = {f"check {i}": lambda finding=finding: finding for i, finding in enumerate(findings)}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.main([]) == code
    assert capsys.readouterr().out.count("fix: command") == 2


@pytest.mark.parametrize("specifier", ["<3.2,>=3.1", ">=3.98,<3.99"])
def test_an_unsupported_python_is_missing(monkeypatch, specifier):
    monkeypatch.setattr(doctor, "required", lambda: (specifier, []))
    finding = doctor.check_python()
    assert finding.status == "missing"
    assert finding.fix == f"install Python {specifier}"


def test_the_range_of_python_is_that_of_the_installed_package(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: {"Requires-Python": ">=3.98"})
    assert doctor.check_python().fix == "install Python >=3.98"


def test_a_checkout_that_is_not_installed_knows_its_requirements(monkeypatch, tmp_path):
    def no_metadata(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "metadata", no_metadata)
    python, packages = doctor.required()
    assert f'requires-python = "{python}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"torch>=2.8", "torchvision>=0.23", "lightning>=2.4"} <= set(packages)
    assert doctor.check_python().status == "ok"


REQUIREMENTS = [
    "torch>=2.8",
    "no-such-package>=2",
    "pytest>=8; extra == 'detection'",
    "no_such.package<3,>=2; extra == 'detection'",
]


def test_missing_packages_are_named_with_their_command(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: REQUIREMENTS)
    core = doctor.check_packages("", "missing")
    assert core.text == "not installed: no-such-package>=2"
    assert core.fix.endswith("-m pip install 'no-such-package>=2'")
    extra = doctor.check_packages("detection", "note")
    assert extra.text == "not installed: no_such.package<3,>=2"
    assert extra.status == "note"


def test_any_opencv_is_fine(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["opencv-no-such-build"])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name == "cv2")
    assert doctor.check_packages("", "missing").status == "ok"


def test_an_uninstalled_package_is_missing(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    finding = doctor.check_packages("", "missing")
    assert finding.status == "missing"
    assert f"--editable '{ROOT}[detection]'" in finding.fix


def test_dataset_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folders = tmp_path / "all"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folders))
    absent = doctor.check_dataset("imagenet")
    here = tmp_path / "datasets/imagenet"
    assert absent.status == "note"
    assert absent.text == f"no {here}, nor in DETECTRON2_DATASETS {folders}"
    command = f"mkdir -p {here.parent} && ln -sfn /path/to/imagenet {here}"
    assert absent.fix.startswith(command)

    (folders / "imagenet/train").mkdir(parents=True)
    assert doctor.check_dataset("imagenet").text.endswith("all/imagenet has no val")
    (folders / "imagenet/val").mkdir()
    assert doctor.check_dataset("imagenet") == Finding("ok", str(folders / "imagenet"))

    here.parent.mkdir()
    here.symlink_to(tmp_path / "gone")  # the fix replaces it
    monkeypatch.delenv("DETECTRON2_DATASETS")
    broken = doctor.check_dataset("imagenet")
    assert broken.text == f"no {here}, a link to {tmp_path / 'gone'}, which is gone"
    subprocess.run(broken.fix.partition("  (")[0], shell=True, check=True)
    assert here.readlink() == Path("/path/to/imagenet")


def test_coco_is_where_detectron2_looks(monkeypatch, tmp_path):
    """It knows COCO's files by name, and looks nowhere else if the variable is set."""
    monkeypatch.chdir(tmp_path)
    for entry in doctor.DATASETS["coco"]:
        (tmp_path / "datasets/coco" / entry).mkdir(parents=True)
    assert doctor.check_dataset("coco").status == "ok"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "all"))
    assert doctor.check_dataset("coco").text == f"no {tmp_path / 'all/coco'}"


@pytest.mark.parametrize("checkout", [True, False])
def test_the_command_for_sample_data_works_anywhere(monkeypatch, tmp_path, checkout):
    monkeypatch.chdir(tmp_path)
    if not checkout:
        monkeypatch.setattr(doctor, "SOURCES", tmp_path)
    fix = doctor.check_dataset("shapes").fix
    folder = tmp_path / "datasets/shapes"
    if checkout:
        assert fix.endswith(f" {ROOT / 'datasets/prepare_shapes.py'} --root {folder}")
    else:
        *python, code = shlex.split(fix)
        subprocess.run([*python, code.replace(")", ", num_train=1, num_val=1)")], check=True)
        assert doctor.check_dataset("shapes") == Finding("ok", str(folder))


def test_commands_name_the_sources(monkeypatch, tmp_path):
    assert doctor.build_command().endswith(f"--editable {ROOT}")
    monkeypatch.setattr(doctor, "SOURCES", tmp_path)
    assert doctor.build_command().endswith(" .  (in a checkout of the sources)")


class Distribution:
    """What the metadata of a distribution in a folder say about its origin."""

    def __init__(self, url: str | None, folder: Path):
        self.url, self.folder = url, folder

    def locate_file(self, path: str) -> Path:
        return self.folder / path

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.url and json.dumps({"url": self.url, "dir_info": {"editable": True}})


@pytest.mark.parametrize(
    ("url", "status", "text"),
    [
        (ROOT.as_uri(), "ok", f"editable, in {ROOT}"),
        (
            "file:///old%20place",
            "missing",
            "installed from /old place, which is gone (moved?), but",
        ),
        (ROOT.parent.as_uri(), "missing", f"installed from {ROOT.parent}, but used from {ROOT}"),
    ],
)
def test_where_the_package_is_installed(monkeypatch, tmp_path, url, status, text):
    """``uv pip install -e`` leaves metadata in the sources too, which do not count."""
    found = [Distribution(None, ROOT), Distribution(url, tmp_path)]
    monkeypatch.setattr(doctor.metadata, "distributions", lambda name: found)
    finding = doctor.check_installation()
    assert finding.status == status and finding.text.startswith(text)
    assert bool(finding.fix) == (status == "missing")
    found.pop()
    assert doctor.check_installation().text == "spatial-mamba-d2 itself is not installed"


def test_an_installed_package_is_next_to_its_metadata(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SOURCES", tmp_path)  # as site-packages
    found = [Distribution(None, tmp_path)]
    monkeypatch.setattr(doctor.metadata, "distributions", lambda name: found)
    assert doctor.check_installation().status == "ok"


def test_sources_give_way_to_the_installed_package(tmp_path):
    """In the folder of the sources, which has no operators; an editable installation finds them."""
    for place in ("checkout/spatial_mamba_d2", "site/spatial_mamba_d2"):
        shutil.copytree(
            ROOT / "spatial_mamba_d2",
            tmp_path / place,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    installed = tmp_path / "site/spatial_mamba_d2"
    shutil.copytree(ROOT / "ops", installed / "ops", ignore=shutil.ignore_patterns("*.so", "*.cpp"))
    script = (
        "import importlib.util, spatial_mamba_d2.system.cli\n"
        "print(spatial_mamba_d2.system.cli.__file__)\n"
        "print(importlib.util.find_spec('spatial_mamba_d2.ops'))"
    )

    def run(path: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-S", "-c", script],
            cwd=tmp_path / "checkout", env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip

    cli, ops = run(str(tmp_path / "site"))
    assert cli == str(installed / "system/cli.py") and str(installed / "ops/__init__.py") in ops
    cli, ops = run("")
    assert cli == str(tmp_path / "checkout/spatial_mamba_d2/system/cli.py") and ops == "None"


def test_output_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert doctor.check_output().status == "ok"
    assert list(tmp_path.iterdir()) == []

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = doctor.check_output()
    assert finding.status == "missing"
    assert str(tmp_path) in finding.text


def test_warnings_do_not_disturb_the_report():
    def check():
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        return Finding("ok", "text")

    with warnings.catch_warnings(record=True) as caught:
        assert doctor.examine(check) == Finding("ok", "text")
    assert caught == []


def test_kernels_are_reported():
    assert doctor.check_kernels().text


def test_the_model_runs():
    assert doctor.check_model() == Finding("ok", "tiny backbone runs: res2, res3, res4, res5")


def test_a_missing_detectron2_has_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    finding = doctor.check_detectron2()
    assert finding.status == "missing"
    *_, option, module = finding.fix.split()
    assert option == "-m"
    assert importlib.import_module(module).main


def test_a_broken_detectron2_is_missing(monkeypatch):
    pytest.importorskip("detectron2")
    monkeypatch.setitem(sys.modules, "spatial_mamba_d2.detection", None)
    assert doctor.examine(doctor.check_detectron2).status == "missing"


def test_segmentation_can_run():
    assert "segmentation and classification can run" in doctor.check_lightning().text


def test_a_missing_lightning_has_its_command(monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("spatial_mamba_d2.segmentation", "spatial_mamba_d2.training")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    finding = doctor.check_lightning()
    assert finding.status == "note"
    assert "lightning" in finding.text and "'lightning>=2.4'" in finding.fix


@pytest.fixture
def coco_folder(tmp_path):
    """One annotated image."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (32, 24)).save(tmp_path / "1.jpg")
    polygon = [4, 4, 20, 4, 20, 16, 4, 16]
    annotation = {"id": 1, "image_id": 1, "category_id": 7, "iscrowd": 0, "area": 192}
    annotation |= {"bbox": [4, 4, 16, 12], "segmentation": [polygon]}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 32, "height": 24}],
        "annotations": [annotation],
        "categories": [{"id": 7, "name": "thing"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_a_valid_coco_folder(coco_folder, capsys):
    assert doctor.main(["--coco", str(coco_folder / "instances.json"), str(coco_folder)]) == 0
    assert "1 images, 1 annotations, 1 categories" in capsys.readouterr().out


def test_a_coco_folder_with_a_truncated_image(coco_folder, capsys):
    image = coco_folder / "1.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    assert doctor.main(["--coco", str(coco_folder / "instances.json"), str(coco_folder)]) == 1
    assert "1.jpg" in capsys.readouterr().out


def test_a_training_s_data(tmp_path, capsys):
    """The check reads what the training reads, and reports its faults."""
    pytest.importorskip("lightning")
    image = pytest.importorskip("PIL.Image")
    for split, name in [("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")]:
        (tmp_path / split / name).mkdir(parents=True)
        image.effect_noise((32, 24), 50).convert("RGB").save(tmp_path / split / name / "1.jpg")
    words = ["--task", "classification", "DATASETS.ROOT", str(tmp_path), "MODEL.NUM_CLASSES", "2"]
    assert doctor.main(words) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}, train: 2 images; {tmp_path}, val: 2 images; pixels of 2 images: " in out
    damaged = tmp_path / "val/b/1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    assert doctor.main(words) == 1
    assert str(damaged) in capsys.readouterr().out


def test_pixels_are_measured_as_the_network_sees_them(tmp_path, capsys):
    """16 bits in INPUT.PIXEL_RANGE."""
    pytest.importorskip("lightning")
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    for split, name in [("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")]:
        (tmp_path / split / name).mkdir(parents=True)
        pixels = np.full((24, 32), 1000 if name == "a" else 3000, np.uint16)
        image.fromarray(pixels).save(tmp_path / split / name / "1.png")
    words = ["--task", "classification", "DATASETS.ROOT", str(tmp_path), "MODEL.NUM_CLASSES", "2"]
    assert doctor.main([*words, "INPUT.PIXEL_RANGE", "(0, 4000)"]) == 0
    mean = f"{(64 + 191) / 2:.2f}"  # 1000 and 3000 of 4000, of 255
    assert f'MODEL.PIXEL_MEAN "({mean}, {mean}, {mean})"' in capsys.readouterr().out


def test_a_fault_of_ours_is_no_finding_about_data(coco_folder, capsys, monkeypatch):
    """Nobody can correct data because of it: its traceback is what a report needs."""
    from spatial_mamba_d2.data import coco

    def broken(*args, **kwargs):
        return int("x")

    monkeypatch.setattr(coco, "load_coco", broken)
    with pytest.raises(ValueError, match="invalid literal for int"):
        doctor.main(["--coco", str(coco_folder / "instances.json"), str(coco_folder)])
    pytest.importorskip("lightning")
    train = importlib.import_module("spatial_mamba_d2.classification.train")
    monkeypatch.setattr(train, "check_data", broken)
    with pytest.raises(ValueError, match="invalid literal for int"):
        doctor.main(["--task", "classification"])
    assert "missing" not in capsys.readouterr().out


def test_debugging_shows_where_a_finding_about_data_comes_from(tmp_path, capsys, monkeypatch):
    words = ["--coco", str(tmp_path / "absent.json"), str(tmp_path)]
    assert doctor.main(words) == 1
    quiet = capsys.readouterr()
    assert "absent.json" in quiet.out and quiet.err == ""
    monkeypatch.setenv("SMD2_DEBUG", "1")
    assert doctor.main(words) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_keys_need_a_task(capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["DATASETS.ROOT", "x"])
    assert "need --task, one of detection, segmentation, class" in capsys.readouterr().err


def test_a_detector_s_data(coco_folder, capsys):
    pytest.importorskip("detectron2")
    words = ["--task", "detection", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    for split in ("TRAIN", "TEST"):
        words += [f"DATASETS.{split}_JSON", str(coco_folder / "instances.json")]
        words += [f"DATASETS.{split}_IMAGES", str(coco_folder)]
    assert doctor.main(words) == 0
    out = capsys.readouterr().out
    assert out.count("instances.json of ") >= 2 and 'images: MODEL.PIXEL_MEAN "(' in out
    assert doctor.main([*words, "MODEL.ROI_HEADS.NUM_CLASSES", "2"]) == 1
    assert "MODEL.ROI_HEADS.NUM_CLASSES must be 1" in capsys.readouterr().out
    damaged = coco_folder / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    assert doctor.main(words) == 1
    assert "1.jpg" in capsys.readouterr().out


def test_a_segmentor_s_data(tmp_path, capsys):
    pytest.importorskip("lightning")
    image = pytest.importorskip("PIL.Image")
    for split in ("training", "validation"):
        for kind, mode in (("images", "RGB"), ("annotations", "L")):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            picture = image.new(mode, (32, 24), 1)
            if mode == "L":
                picture.paste(2, (0, 0, 16, 24))
            picture.save(folder / "a.png")
    words = ["--task", "segmentation", "DATASETS.ROOT", str(tmp_path), "DATASETS.CLASSES", "",
             "MODEL.NUM_CLASSES", "2"]  # fmt: skip
    assert doctor.main(words) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}, training: 1 images; {tmp_path}, validation: 1 images" in out
    assert 'MODEL.PIXEL_MEAN "(1.00, 0.00, 0.00)" MODEL.PIXEL_STD "(0.00, 0.00, 0.00)"' in out
    label = tmp_path / "annotations/validation/a.png"
    image.new("L", (32, 24), 9).save(label)
    assert doctor.main(words) == 1
    assert "label 9 is impossible" in capsys.readouterr().out


def test_labelled_data_are_checked(shapes, tmp_path, capsys):
    assert doctor.main(["--data", str(shapes)]) == 0
    assert "findings: 0" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        doctor.main(["--data", str(tmp_path / "gone")])
