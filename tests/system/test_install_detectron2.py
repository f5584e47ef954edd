"""How Detectron2 is installed, with pip's commands recorded instead of run."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from spatial_mamba_d2.system import install_detectron2
from spatial_mamba_d2.system.install_detectron2 import main

COMPILED = "_C.cpython-310-x86_64-linux-gnu.so"


def write_metadata(info: Path) -> None:
    """As in the wheel, with fewer lines."""
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\nRequires-Dist: yacs>=0.1.8\n"
        "Requires-Dist: numpy<2\n"
    )
    (info / "WHEEL").write_text(
        "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n"
    )
    names = ("detectron2/__init__.py", f"detectron2/{COMPILED}", "tools/train_net.py")
    names += tuple(f"{info.name}/{name}" for name in ("METADATA", "RECORD", "WHEEL"))
    (info / "RECORD").write_text("".join(f"{name},sha256=x,1\n" for name in names))


class Pip:
    """Stands in for `pip`: records commands, and fails those that `failing` names."""

    def __init__(self):
        self.ran: list[str] = []
        self.requirement = ""
        self.failing: dict[str, int] = {}

    def __call__(self, *arguments: str | Path) -> int:
        line = " ".join(map(str, arguments))
        self.ran.append(line)
        code = next((code for part, code in self.failing.items() if part in line), 0)
        if "--target" in arguments:
            self.requirement = Path(arguments[-1]).read_text()
            target = Path(arguments[arguments.index("--target") + 1])
            for name in ("detectron2", "sal_detectron2-0.7.2.dist-info", "tools"):
                (target / name).mkdir(parents=True)
            (target / "detectron2" / COMPILED).touch()
            write_metadata(target / "sal_detectron2-0.7.2.dist-info")
            if code == 0:
                (target / "detectron2/__init__.py").touch()
        return code


@pytest.fixture
def pip(monkeypatch, tmp_path) -> Pip:
    """No Detectron2, and upstream out of reach, in an empty environment."""
    recorder = Pip()
    monkeypatch.setattr(install_detectron2, "pip", recorder)
    monkeypatch.setattr(install_detectron2, "succeeds", lambda *command, timeout=None: False)
    monkeypatch.setattr(install_detectron2, "site_packages", lambda: tmp_path)
    return recorder


def make_reachable(monkeypatch) -> None:
    monkeypatch.setattr(install_detectron2, "can_build", lambda: True)


def test_a_working_detectron2_is_kept(pip, monkeypatch):
    monkeypatch.setattr(
        install_detectron2, "succeeds", lambda *command: "import detectron2.engine" in command
    )
    assert main() == 0
    assert pip.ran == []


def test_upstream_comes_first(pip, monkeypatch, tmp_path):
    make_reachable(monkeypatch)
    assert main() == 0
    (command,) = pip.ran
    assert command.startswith("install --no-deps --no-build-isolation detectron2 @ git+https://")
    assert command.endswith(f".com/facebookresearch/detectron2@{install_detectron2.GIT_COMMIT}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reachable", [False, True])
def test_the_wheel_replaces_an_upstream_that_cannot_be_had(pip, monkeypatch, tmp_path, reachable):
    """Both where upstream is out of reach and where it does not build."""
    if reachable:
        make_reachable(monkeypatch)
        pip.failing = {"git+": 1}
    broken = tmp_path / "detectron2/old.py"
    broken.parent.mkdir()
    broken.touch()
    assert main() == 0
    *upstream, wheel, uninstall = pip.ran
    assert len(upstream) == reachable
    assert "--no-deps --only-binary=:all: --python-version 3.10" in wheel
    assert uninstall == "uninstall --yes detectron2 sal-detectron2"
    # Neither the extension module nor tools/, which would be importable as `tools`
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        "detectron2",
        "detectron2/__init__.py",
        "sal_detectron2-0.7.2.dist-info",
        *(f"sal_detectron2-0.7.2.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL")),
    }


def test_the_metadata_say_what_is_installed(pip, tmp_path):
    """`pip check` compares requirements and tags; `pip uninstall` removes what RECORD lists."""
    assert main() == 0
    info = tmp_path / "sal_detectron2-0.7.2.dist-info"
    distribution = PathDistribution(info)
    assert distribution.requires == ["yacs>=0.1.8", "numpy"]
    assert "Tag: py3-none-any\n" in (info / "WHEEL").read_text()
    recorded = {str(file): file for file in distribution.files}
    assert set(recorded) == {
        "detectron2/__init__.py",
        *(f"{info.name}/{name}" for name in ("METADATA", "RECORD", "WHEEL")),
    }
    for name in ("METADATA", "WHEEL"):
        content = (info / name).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        file = recorded[f"{info.name}/{name}"]
        assert (file.hash.value, file.size) == (digest, len(content))


def test_the_wheel_is_checked_by_its_hash(pip):
    assert main() == 0
    wheel, sha256 = install_detectron2.WHEEL, install_detectron2.WHEEL_SHA256
    assert pip.requirement == f"{wheel} --hash=sha256:{sha256}\n"


def test_a_failed_wheel_leaves_the_environment_as_it_was(pip, tmp_path):
    pip.failing = {"--target": 3}
    old = tmp_path / "detectron2/old.py"
    old.parent.mkdir()
    old.touch()
    assert main() == 3
    assert list(tmp_path.rglob("*")) == [old.parent, old]


@pytest.mark.parametrize("missing", ["git", "c++", "network"])
def test_building_needs_git_a_compiler_and_the_network(monkeypatch, missing):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(install_detectron2.os, "name", "posix")
    monkeypatch.setattr(install_detectron2.shutil, "which", lambda name: name)
    monkeypatch.setattr(install_detectron2, "succeeds", lambda *command, timeout: True)
    assert install_detectron2.can_build()
    if missing == "network":
        monkeypatch.setattr(install_detectron2, "succeeds", lambda *command, timeout: False)
    else:
        which = {"git": "/usr/bin/git", "c++": "/usr/bin/c++", missing: None}
        monkeypatch.setattr(install_detectron2.shutil, "which", which.get)
    assert not install_detectron2.can_build()


def test_a_read_only_environment_means_the_user_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(install_detectron2.site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(install_detectron2.site, "getusersitepackages", lambda: str(tmp_path / "u"))
    monkeypatch.setattr(install_detectron2.os, "access", lambda path, mode: True)
    assert install_detectron2.site_packages() != tmp_path / "u"
    monkeypatch.setattr(install_detectron2.os, "access", lambda path, mode: False)
    assert install_detectron2.site_packages() == tmp_path / "u"
    assert (tmp_path / "u").is_dir()


def test_probes(tmp_path):
    succeeds = install_detectron2.succeeds
    assert succeeds(sys.executable, "-c", "")
    assert not succeeds(sys.executable, "-c", "raise SystemExit(1)")
    assert not succeeds(sys.executable, "-c", "import time; time.sleep(60)", timeout=0.2)
    assert not succeeds(str(tmp_path / "no such program"))


def test_pip_commands_are_shown_and_their_exit_codes_returned(capfd):
    assert install_detectron2.pip("no-such-command") != 0
    first, *_ = capfd.readouterr().out.splitlines()
    assert first.startswith(f"$ {sys.executable} -m pip ") and first.endswith(" no-such-command")


def test_it_runs_where_nothing_is_installed():
    """-S leaves out site-packages."""
    script = "from spatial_mamba_d2.system import install_detectron2"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-S", "-c", script], cwd=root, check=True)
