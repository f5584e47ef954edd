"""dev.py's decisions, with its commands recorded instead of run."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def dev(tmp_path):
    """dev.py as a module, in a checkout of its own."""
    (tmp_path / "spatial_mamba_d2/system").mkdir(parents=True)
    for name in ("dev.py", "pyproject.toml", "setup.py", "spatial_mamba_d2/system/cuda_toolkit.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "ops").mkdir()
    spec = importlib.util.spec_from_file_location("dev", tmp_path / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Commands:
    """Stands in for `call` and `succeeds`: records commands, fails those that `failing` names."""

    def __init__(self, dev):
        self.dev = dev
        self.ran: list[str] = []
        self.failing: dict[str, int] = {}
        self.probes = {"-c ": True, "import detectron2": True, "ls-remote": False}

    def call(self, *command) -> int:
        line = " ".join(map(str, command))
        self.ran.append(line)
        code = next((code for part, code in self.failing.items() if part in line), 0)
        if code == 0 and "-m venv" in line:
            make_venv(self.dev)
        if code == 0 and "--target" in line:
            package = self.dev.VENV / "detectron2/detectron2"
            package.mkdir(parents=True)
            (package / "_C.cpython-310-x86_64-linux-gnu.so").touch()
        return code

    def succeeds(self, *command, timeout=None) -> bool:
        line = " ".join(map(str, command))
        return next(answer for part, answer in reversed(self.probes.items()) if part in line)


def make_venv(dev) -> Path:
    """An environment with pip in it, as far as dev.py looks; returns its site-packages."""
    site = dev.VENV / ("Lib" if dev.WINDOWS else "lib/python3.12") / "site-packages"
    (site / "pip-25.0.dist-info").mkdir(parents=True, exist_ok=True)
    (site / "pip-25.0.dist-info/RECORD").touch()
    dev.PYTHON.parent.mkdir(exist_ok=True)
    dev.PYTHON.touch()
    return site


@pytest.fixture
def commands(dev, monkeypatch):
    recorder = Commands(dev)
    monkeypatch.setattr(dev, "call", recorder.call)
    monkeypatch.setattr(dev, "succeeds", recorder.succeeds)
    return recorder


@pytest.fixture
def installed(dev):
    make_venv(dev)
    dev.STAMP.write_text(dev.fingerprint())


def test_first_call_installs_then_works(dev, commands):
    commands.probes["-c "] = False
    dev.main(["test"])
    venv, tools, package, pytest_run = commands.ran
    assert "-m venv --clear" in venv
    assert all(tool in tools for tool in dev.BUILD_TOOLS)
    assert package.endswith("--no-build-isolation --editable .[dev]")
    assert pytest_run.endswith("-m pytest")
    assert dev.is_installed()


def test_second_call_installs_nothing(dev, commands, installed):
    dev.main(["test", "-k", "scan", "--slow"])
    assert commands.ran == [f"{dev.PYTHON} -m pytest -k scan --slow"]


def test_setup_installs_again(dev, commands, installed):
    dev.main(["setup"])
    assert len(commands.ran) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("dev.py", "pyproject.toml", "setup.py", "spatial_mamba_d2/system/cuda_toolkit.py"),
        *("ops/module.cpp", "ops/scan/scan.cuh"),
    ],
)
def test_a_changed_source_means_a_new_installation(dev, installed, name):
    path = dev.ROOT / name
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write("\n")
    assert not dev.is_installed()


def test_a_changed_python_source_does_not(dev, installed):
    (dev.ROOT / "ops/eager.py").touch()
    assert dev.is_installed()


def test_a_lost_interpreter_means_a_new_installation(dev, installed):
    dev.PYTHON.unlink()
    assert not dev.is_installed()


@pytest.mark.parametrize("failing", ["--editable", "torchvision", "-m venv"])
def test_a_failed_step_ends_with_its_code_and_is_repeated(dev, commands, installed, failing):
    (dev.ROOT / "ops/module.cpp").touch()
    commands.probes["-c "] = failing != "-m venv"
    commands.failing = {failing: 7}
    with pytest.raises(SystemExit) as stop:
        dev.main(["lint"])
    assert stop.value.code == 7
    assert failing in commands.ran[-1]
    assert not dev.is_installed()


def test_a_cut_off_distribution_is_removed(dev, commands):
    site = make_venv(dev)
    for name in ("torch-2.9.0.dist-info", "numpy-2.2.0.dist-info"):
        (site / name).mkdir()
    (site / "numpy-2.2.0.dist-info/RECORD").touch()
    dev.prepare_venv()
    assert {path.name for path in site.iterdir()} == {"numpy-2.2.0.dist-info", "pip-25.0.dist-info"}
    assert commands.ran == []


def test_an_environment_without_pip_gets_it(dev, commands):
    (make_venv(dev) / "pip-25.0.dist-info/RECORD").unlink()
    dev.prepare_venv()
    assert commands.ran == [f"{dev.PYTHON} -m ensurepip --upgrade --default-pip"]


def test_a_working_detectron2_is_kept(dev, commands):
    make_venv(dev)
    dev.install_detectron2()
    assert commands.ran == []


@pytest.fixture
def without_detectron2(dev, commands, monkeypatch):
    """Both git and a compiler at hand, but no Detectron2."""
    make_venv(dev)
    commands.probes["import detectron2"] = False
    monkeypatch.setattr(dev.shutil, "which", lambda name: name)


def test_upstream_detectron2_comes_first(dev, commands, without_detectron2):
    commands.probes["ls-remote"] = True
    dev.install_detectron2()
    (command,) = commands.ran
    assert command.endswith(f"detectron2 @ git+{dev.DETECTRON2_GIT}@{dev.DETECTRON2_COMMIT}")


@pytest.mark.parametrize("reachable", [False, True])
def test_the_wheel_stands_in_for_upstream(dev, commands, without_detectron2, reachable):
    """Where upstream is out of reach, and where it does not build."""
    commands.probes["ls-remote"] = reachable
    commands.failing = {"git+": 1}
    dev.install_detectron2()
    assert len(commands.ran) == 1 + reachable
    assert "--only-binary=:all:" in commands.ran[-1]
    requirement = (dev.VENV / "detectron2.txt").read_text()
    assert requirement == f"{dev.DETECTRON2_WHEEL} --hash=sha256:{dev.DETECTRON2_SHA256}\n"
    assert (dev.site_packages() / "detectron2.pth").read_text().strip() == str(
        dev.VENV / "detectron2"
    )
    assert list((dev.VENV / "detectron2/detectron2").iterdir()) == []


def test_a_failed_wheel_stays_invisible(dev, commands, without_detectron2):
    commands.failing = {"--target": 1}
    with pytest.raises(SystemExit):
        dev.install_detectron2()
    assert not (dev.site_packages() / "detectron2.pth").exists()


@pytest.mark.parametrize("absent", ["git", "c++"])
def test_upstream_needs_git_and_a_compiler(dev, commands, without_detectron2, monkeypatch, absent):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(dev, "WINDOWS", False)
    commands.probes["ls-remote"] = True
    assert dev.can_build_detectron2()
    monkeypatch.setattr(dev.shutil, "which", lambda name: None if name == absent else name)
    assert not dev.can_build_detectron2()


@pytest.mark.parametrize(
    ("command", "tool", "folder"),
    [
        ("demo", "train_net.py", "demo"),
        ("demo-seg", "train_seg.py", "demo_seg"),
        ("demo-cls", "train_cls.py", "demo_cls"),
    ],
)
def test_demos_pass_overrides_on_and_say_where_results_are(
    dev, commands, installed, capsys, command, tool, folder
):
    dev.main([command, "SOLVER.MAX_ITER", "5", "OUTPUT_DIR", "output/short"])
    data, train = commands.ran
    assert (ROOT / data.split()[-1]).is_file() and "datasets/prepare_shape" in data
    assert tool in train
    config = train.split("--config-file ")[1].split()[0]
    assert (ROOT / config).is_file()
    overrides = f"OUTPUT_DIR output/{folder} SOLVER.MAX_ITER 5 OUTPUT_DIR output/short"
    assert f"--resume {overrides}" in train
    assert str(dev.ROOT / "output/short") in capsys.readouterr().out


def test_lint_checks_native_sources(dev, commands, installed):
    dev.main(["lint"])
    assert not any("clang-format" in line for line in commands.ran)
    (dev.ROOT / "ops/module.cpp").touch()
    dev.STAMP.write_text(dev.fingerprint())
    dev.main(["lint"])
    assert any("clang-format" in line and "module.cpp" in line for line in commands.ran)


@pytest.mark.parametrize("version", [(3, 2), (3, 99)])
def test_an_unsupported_python_is_refused(dev, monkeypatch, version):
    monkeypatch.setattr(dev, "OLDEST", version)
    monkeypatch.setattr(dev, "NEWEST", version)
    with pytest.raises(SystemExit, match=rf"Python 3\.{version[1]} .* is required, this is 3\."):
        dev.main(["test"])


def test_a_python_without_ensurepip_is_told_the_fix(dev, monkeypatch):
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="apt install python3"):
        dev.main(["test"])


def test_exit_codes_pass_through(dev):
    assert dev.call(sys.executable, "-c", "raise SystemExit(3)") == 3
    with pytest.raises(SystemExit) as stop:
        dev.run(sys.executable, "-c", "raise SystemExit(3)")
    assert stop.value.code == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to die of")
def test_a_killed_command_ends_as_in_a_shell(dev):
    assert dev.call(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)") == 137


def test_probes(dev, tmp_path):
    assert dev.succeeds(sys.executable, "-c", "")
    assert not dev.succeeds(sys.executable, "-c", "raise SystemExit(1)")
    assert not dev.succeeds(sys.executable, "-c", "import time; time.sleep(60)", timeout=0.2)
    assert not dev.succeeds(tmp_path / "no such program")
