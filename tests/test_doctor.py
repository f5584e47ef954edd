import importlib
import json
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
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    absent = doctor.check_dataset("imagenet")
    assert absent.status == "note"
    assert absent.fix.startswith(f"ln -s /path/to/imagenet {tmp_path / 'imagenet'}")

    (tmp_path / "imagenet/train").mkdir(parents=True)
    assert doctor.check_dataset("imagenet").text.endswith("imagenet has no val")

    (tmp_path / "imagenet/val").mkdir()
    assert doctor.check_dataset("imagenet") == Finding("ok", str(tmp_path / "imagenet"))


def test_sample_data_has_a_command_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert doctor.check_dataset("shapes").fix.endswith(" datasets/prepare_shapes.py")


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
    assert "1 images, 1 categories" in capsys.readouterr().out


def test_a_coco_folder_with_a_truncated_image(coco_folder, capsys):
    image = coco_folder / "1.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    assert doctor.main(["--coco", str(coco_folder / "instances.json"), str(coco_folder)]) == 1
    assert "1.jpg" in capsys.readouterr().out
