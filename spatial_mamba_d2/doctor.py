"""What this installation can do, and the command that fixes each problem.

    python -m spatial_mamba_d2.doctor
    python -m spatial_mamba_d2.doctor --coco annotations.json images/
    python -m spatial_mamba_d2.doctor --data my/data
    python -m spatial_mamba_d2.doctor --task segmentation --config-file my.yaml KEY VALUE ...
    python -m spatial_mamba_d2.doctor --compile [80 90 ...]

With --task it checks all data that a training with the same arguments would read. With --compile
it compiles the CUDA kernels, which otherwise happens at their first call, for the GPUs that are
here, or for the architectures given (80 is sm_80), which needs no GPU. The exit code is 0 if the
main task, detection, can run here (or if the checked data set is valid, or all is compiled),
otherwise 1. Each check imports what it needs, so the doctor works even where nothing is installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn
from urllib.parse import urlsplit
from urllib.request import url2pathname

from spatial_mamba_d2.system import data_folder, install_detectron2
from spatial_mamba_d2.system.cli import (
    build_key_value_parser,
    log_to_stdout,
    run_tool,
    show_traceback_in_debugging,
)
from spatial_mamba_d2.system.installer import pip_command
from spatial_mamba_d2.system.tool_errors import find_mistake

DISTRIBUTION = "spatial-mamba-d2"
SOURCES = Path(__file__).resolve().parents[1]  # of a package that is not installed, or editable
TASKS = ("detection", "segmentation", "classification")

# What each data set's folder contains at least; datasets/README.md shows the full trees.
DATASETS = {
    "shapes": (
        "instances_train.json",
        "instances_val.json",
        "images/training",
        "images/validation",
    ),
    "coco": (
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "train2017",
        "val2017",
    ),
    "ADEChallengeData2016": (
        "images/training",
        "images/validation",
        "annotations/training",
        "annotations/validation",
    ),
    "imagenet": ("train", "val"),
}


class Finding(NamedTuple):
    """The outcome of one check: detection needs what is "missing", and a "note" is a hint."""

    status: Literal["ok", "note", "missing"]
    text: str
    fix: str = ""


Check = Callable[[], Finding]


def pip_install(*arguments: str) -> str:
    """The shell command that installs into this environment."""
    return shlex.join(pip_command("install", *arguments))


def required() -> tuple[str, list[str]]:
    """The required versions of Python and of packages, from the installation or the checkout."""
    try:
        python = metadata.metadata(DISTRIBUTION)["Requires-Python"]
        return python, metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        # By regular expressions, because tomllib is part of Python from 3.11 only
        text = (SOURCES / "pyproject.toml").read_text(encoding="utf-8")
        (python,) = re.findall(r'^requires-python = "(.+)"', text, re.MULTILINE)
        return python, re.findall(r'^    "(.+?)",', text, re.MULTILINE)


def is_checkout() -> bool:
    """Whether this file is in a folder of sources, and not in an installed package."""
    return (SOURCES / "pyproject.toml").is_file()


def build_command() -> str:
    """The command that installs from sources, which compiles what can be compiled."""
    options = ("--no-build-isolation", "--no-deps", "--force-reinstall")
    if is_checkout():
        return pip_install(*options, "--editable", str(SOURCES))
    return f"{pip_install(*options, '.')}  (in a checkout of the sources)"


def with_version(*names: str) -> list[str]:
    """Each package with the versions that are required of it, such as "torch>=2.8"."""
    _, packages = required()
    return [
        next(line for line in packages if re.match(rf"{name}\b", line)).partition(";")[0].strip()
        for name in names
    ]


def check_python() -> Finding:
    text = f"{platform.python_version()} on {platform.platform(terse=True)} {platform.machine()}"
    specifier, _ = required()
    for operator, major, minor in re.findall(r"(>=|<)\s*(\d+)\.(\d+)", specifier):
        bound = (int(major), int(minor))
        here = sys.version_info[:2]
        if here < bound if operator == ">=" else here >= bound:
            fix = f"install Python {specifier}"
            return Finding("missing", f"{text}; required: {specifier}", fix)
    return Finding("ok", text)


def check_torch() -> Finding:
    try:
        import torch
        import torchvision
    except ModuleNotFoundError as error:
        return Finding("missing", str(error), pip_install(*with_version("torch", "torchvision")))
    return Finding("ok", f"torch {torch.__version__}, torchvision {torchvision.__version__}")


def install_command() -> str:
    return pip_install("--no-build-isolation", "--editable", f"{SOURCES}[detection]")


def check_installation() -> Finding:
    """Whether this package is the one that is installed, and not one that hides it or has moved."""
    package = sys.modules[__package__ or ""]
    found = Path(str(package.__file__)).resolve().parent
    # Without what a build leaves in the folder of the sources, which is no installation
    installed = [
        distribution
        for distribution in metadata.distributions(name=DISTRIBUTION)
        if not is_checkout() or Path(str(distribution.locate_file(""))).resolve() != SOURCES
    ]
    if not installed:
        return Finding("missing", f"{DISTRIBUTION} itself is not installed", install_command())
    record = json.loads(installed[0].read_text("direct_url.json") or "{}")
    if record.get("dir_info", {}).get("editable"):
        sources = Path(url2pathname(urlsplit(record["url"]).path))
        if sources.resolve() == SOURCES:
            return Finding("ok", f"editable, in {SOURCES}")
        gone = "" if sources.exists() else ", which is gone (moved?)"
        where = f"installed from {sources}{gone}"
        return Finding("missing", f"{where}, but used from {SOURCES}", install_command())
    used = Path(next(iter(package.__path__))).resolve()
    if is_checkout():
        return Finding(
            "missing", f"{found} hides the installed package, and has no operators",
            "cd to another folder",
        )  # fmt: skip
    if used != found:
        return Finding("ok", f"{used}, not the sources in {found}, which give way to it")
    return Finding("ok", str(used))


def check_packages(extra: str, severity: Literal["note", "missing"]) -> Finding:
    """Whether the packages of one extra ("" for the core) are installed."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return Finding("missing", f"{DISTRIBUTION} itself is not installed", install_command())
    installed, missing = [], []
    for requirement, _, marker in (line.partition(";") for line in requirements):
        if extra != "".join(re.findall(r"extra == ['\"](\w+)['\"]", marker)):
            continue
        name = re.split(r"[^\w.-]", requirement)[0]
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            # Several packages provide OpenCV, and any of them is fine.
            if not (name.startswith("opencv") and importlib.util.find_spec("cv2")):
                missing.append(requirement.strip())
    if missing:
        return Finding(severity, f"not installed: {', '.join(missing)}", pip_install(*missing))
    return Finding("ok", ", ".join(installed))


def check_cpu() -> Finding:
    from spatial_mamba_d2.system.processor import describe_processor, in_words

    return Finding("ok", in_words(describe_processor()))


def check_gpu() -> Finding:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # PyTorch warns of outdated drivers
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        properties = map(torch.cuda.get_device_properties, range(count))
        devices = (
            f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)"
            for p in properties
        )
        return Finding("ok", f"CUDA {torch.version.cuda}: {', '.join(devices)}")
    if torch.backends.mps.is_available():
        return Finding("note", "MPS, which is not used: everything runs on the CPU")
    built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    reasons = [built, *(str(warning.message).splitlines()[0] for warning in caught)]
    return Finding("note", f"none, so everything runs on the CPU ({'; '.join(reasons)})")


def check_kernels() -> Finding:
    from spatial_mamba_d2.ops import _extension

    if _extension.WHY_NOT_COMPILED is None:
        return Finding("ok", _extension.status())
    return Finding("note", _extension.status(), build_command())


def check_cuda_kernels() -> Finding:
    """Whether the CUDA kernels can be compiled here, and for what."""
    import torch

    from spatial_mamba_d2.ops import _extension
    from spatial_mamba_d2.ops.cuda import cache, nvrtc

    if torch.version.cuda is None:
        return Finding("ok", "none needed: PyTorch is built without CUDA")
    if reason := _extension.why_no_cuda():
        return Finding("note", f"none, so a GPU runs plain PyTorch: {reason}")
    known = nvrtc.architectures()
    text = f"NVRTC {'.'.join(map(str, nvrtc.version()))} compiles them at their first call"
    if not torch.cuda.is_available():
        return Finding("ok", f"{text}, for sm_{known[0]} to sm_{known[-1]}")
    for index in range(torch.cuda.device_count()):
        try:
            nvrtc.architecture_for(*torch.cuda.get_device_capability(index))
        except nvrtc.UnavailableError as error:
            return Finding("note", f"none on GPU {index}, which runs plain PyTorch: {error}")
    try:
        return Finding("ok", f"{text}, and keeps them in {cache.check_writable()}")
    except OSError as error:
        return Finding("note", f"{text}, in every process: {error}", "set SMD2_CACHE to a folder")


def compile_kernels(architectures: list[int]) -> Finding:
    """Compile the CUDA kernels for some architectures, by default those of the GPUs here."""
    import torch

    from spatial_mamba_d2.ops.cuda import cache, kernels, nvrtc

    try:
        if not architectures:
            capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
            architectures = sorted({nvrtc.architecture_for(*numbers) for numbers in capabilities})
        if not architectures:
            text = "no GPU is here: name the architectures"
            return Finding("missing", text, "--compile 80 90, for sm_80 and sm_90")
        for architecture, source, dtype in kernels.compile_ahead(architectures):
            print(f"sm_{architecture} {source} {dtype}", flush=True)
        names = ", ".join(f"sm_{number}" for number in architectures)
        return Finding("ok", f"compiled for {names}, in {cache.check_writable()}")
    except (nvrtc.UnavailableError, OSError) as error:
        return Finding("missing", str(error))


def check_model() -> Finding:
    import torch

    from spatial_mamba_d2.models import build_backbone

    with torch.inference_mode():
        outputs = build_backbone("tiny").eval()(torch.zeros(1, 3, 64, 64))
    if not all(output.isfinite().all() for output in outputs.values()):
        return Finding("missing", "the backbone's outputs for a blank 64x64 image are not finite")
    return Finding("ok", f"tiny backbone runs: {', '.join(outputs)}")


def check_detectron2() -> Finding:
    if importlib.util.find_spec("detectron2") is None:
        command = [sys.executable, "-m", install_detectron2.__name__]
        return Finding("missing", "not installed (nor on PyPI by that name)", shlex.join(command))
    detectron2 = importlib.import_module("detectron2")
    importlib.import_module("spatial_mamba_d2.detection")
    return Finding("ok", f"{detectron2.__version__} in {detectron2.__path__[0]}")


def check_lightning() -> Finding:
    try:
        for task in ("segmentation", "classification"):
            importlib.import_module(f"spatial_mamba_d2.{task}.train")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__ or ""):
            raise
        names = ("lightning", "fvcore", "tensorboard", "opencv-python-headless")
        text = f"{error}: segmentation and classification cannot run"
        return Finding("note", text, pip_install(*with_version(*names)))
    version = metadata.version("lightning")
    return Finding(
        "ok",
        f"{version}: segmentation and classification can run"
        + (" (python3 dev.py demo-seg, demo-cls)" if is_checkout() else ""),
    )


def check_dataset(name: str) -> Finding:
    folder = data_folder.find_data(Path(data_folder.DEFAULT, name))
    if name == "coco" and (root := os.environ.get(data_folder.VARIABLE)):
        folder = Path(root).expanduser() / name  # Detectron2 knows it by name, and looks only there
    folder = folder.absolute()
    missing = [entry for entry in DATASETS[name] if not (folder / entry).exists()]
    if not missing:
        return Finding("ok", str(folder))
    text = f"{folder} has no {', '.join(missing)}" if folder.exists() else f"no {folder}"
    if folder.is_symlink() and not folder.exists():
        text += f", a link to {os.readlink(folder)}, which is gone"
    elif not folder.exists() and name != "coco" and (root := os.environ.get(data_folder.VARIABLE)):
        text += f", nor in {data_folder.VARIABLE} {root}"
    if name == "shapes":
        return Finding("note", text, shapes_command(folder))
    link = ["ln", "-sfn", f"/path/to/{name}", str(folder)]
    if folder.exists() and not folder.is_symlink():
        return Finding("note", text, f"put it into {folder}")
    guide = "  (see datasets/README.md)" if is_checkout() else ""
    return Finding("note", text, f"mkdir -p {shlex.quote(str(folder.parent))} && "
                                 f"{shlex.join(link)}{guide}")  # fmt: skip


def shapes_command(folder: Path) -> str:
    """The command that generates the sample data, also without a checkout."""
    script = SOURCES / "datasets/prepare_shapes.py"
    if script.is_file():
        return shlex.join([sys.executable, str(script), "--root", str(folder)])
    code = (
        f"from {__package__}.data.shapes import generate_shapes; generate_shapes({str(folder)!r})"
    )
    return shlex.join([sys.executable, "-c", code])


def check_output() -> Finding:
    folder = Path("output").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return Finding("missing", f"cannot write to {existing}: {error}", "cd to a writable folder")
    free_gib = shutil.disk_usage(existing).free / 2**30
    return Finding("ok", f"{folder} is writable, {free_gib:.1f} GiB free")


def check_coco(json_file: str, image_root: str) -> Finding:
    from spatial_mamba_d2.data.coco import load_coco

    try:
        coco = load_coco(json_file, image_root, on_error="raise", check_decode=True)
    except (OSError, ValueError) as error:
        return wrong_data(error, f"correct {json_file} or {image_root}, then check again")
    objects = sum(len(record["annotations"]) for record in coco.records)
    text = f"{len(coco.records)} images, {objects} annotations, {len(coco.categories)} categories"
    return Finding("note" if coco.notes else "ok", "\n  ".join([text, *coco.notes]))


def check_task(task: str, config_file: str, overrides: list[str]) -> Finding:
    """Whether a task's training could read all of its data, which it checks in the same way."""
    train = importlib.import_module(f"{__package__}.{task}.train")
    log_to_stdout()
    try:
        return Finding("ok", "; ".join(train.check_data(config_file, overrides)))
    except (OSError, ValueError) as error:
        return wrong_data(error, "correct the data or the keys, then check again")


def wrong_data(error: Exception, fix: str) -> Finding:
    """What a check of data has found, while it is handled; raises it if it is a fault of ours."""
    mistake = find_mistake(error)
    if mistake is None:
        raise error
    show_traceback_in_debugging()
    return Finding("missing", mistake.text, fix)


CHECKS: dict[str, Check] = {
    "python": check_python,
    "installation": check_installation,
    "torch": check_torch,
    "packages": partial(check_packages, "", "missing"),
    "detection": partial(check_packages, "detection", "missing"),
    "segmentation": partial(check_packages, "segmentation", "note"),
    "classification": partial(check_packages, "classification", "note"),
    "cpu": check_cpu,
    "gpu": check_gpu,
    "kernels": check_kernels,
    "cuda kernels": check_cuda_kernels,
    "model": check_model,
    "detectron2": check_detectron2,
    "lightning": check_lightning,
    **{name: partial(check_dataset, name) for name in DATASETS},
    "output": check_output,
}


def run_quietly(check: Check) -> Finding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that packages raise about each other when imported
        return check()


def examine(check: Check) -> Finding:
    """Run a check of the installation; a crash is a finding with its reason, not a traceback."""
    try:
        return run_quietly(check)
    except Exception as error:
        return Finding("missing", f"{type(error).__name__}: {error}")


def report(checks: dict[str, Check], examine: Callable[[Check], Finding] = examine) -> bool:
    """Print every finding, and return whether nothing is missing."""
    width = max(map(len, checks))
    complete = True
    for name, check in checks.items():
        status, text, fix = examine(check)
        print(f"{status:7}  {name:{width}}  {text}", flush=True)
        if fix:
            print(f"{'':{width + 11}}fix: {fix}")
        complete &= status != "missing"
    return complete


def check_labelled(path: Path, task: str | None) -> int:
    """Print what ``tools/check_data.py`` finds, and return its exit code."""
    from spatial_mamba_d2.data.checks.tool import run

    return run(argparse.Namespace(path=path, task=task, json=None, html=None))


def main(argv: list[str] | None = None) -> int:
    parser = build_key_value_parser(__doc__)
    parser.add_argument(
        "--coco",
        nargs=2,
        metavar=("JSON", "IMAGES"),
        help="check only this data set: every annotation, and that every image can be decoded",
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="check only this, as tools/check_data.py does"
    )
    parser.add_argument(
        "--task", choices=TASKS, help="check only the data of a training of this task"
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        type=int,
        metavar="ARCH",
        help="only compile the CUDA kernels, for these architectures or for the GPUs here",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="of that training")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... of that training")
    options = parser.parse_args(argv)
    if not options.task and (options.config_file or options.opts):
        parser.error(f"--config-file and KEY VALUE need --task, one of {', '.join(TASKS)}")
    if options.coco:
        return 0 if report({"coco": partial(check_coco, *options.coco)}, run_quietly) else 1
    if options.data:
        return check_labelled(options.data, options.task)
    if options.compile is not None:
        return 0 if report({"kernels": partial(compile_kernels, options.compile)}) else 1
    if options.task:
        check = partial(check_task, options.task, options.config_file, options.opts)
        return 0 if report({"data": check}, run_quietly) else 1
    complete = report(CHECKS)
    print("Detection can run here." if complete else "Detection needs the fixes above.")
    return 0 if complete else 1


def command() -> NoReturn:
    """What ``spatial-mamba-d2-doctor`` runs."""
    run_tool(main)


if __name__ == "__main__":
    command()
