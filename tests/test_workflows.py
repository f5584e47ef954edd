"""The workflows of a public host agree with pyproject.toml, and with what they call."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / ".github").is_dir(), reason="not a checkout: .github is missing"
)
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))


def commands(job: dict) -> str:
    return "\n".join(step.get("run", "") for step in job.get("steps", []))


def test_every_supported_python_is_tested():
    tested = workflow("ci")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    assert workflow("ci")["jobs"]["oldest"]["steps"][1]["with"]["python-version"] == tested[0]


def test_the_lower_bounds_are_tested():
    text = commands(workflow("ci")["jobs"]["oldest"])
    for name in ("torch", "torchvision", "numpy", "timm"):
        (bound,) = re.findall(rf'^    "{name}>=([\d.]+)"', PYPROJECT, re.MULTILINE)
        versions = set(re.findall(rf"(?<!\S){name}==(\S+)", text))
        assert len(versions) == 1
        (version,) = versions
        assert version == bound or re.fullmatch(rf"{re.escape(bound)}(\.0)*", version), name
    requires = re.findall(r'requires = \["(setuptools.*)"\]', PYPROJECT)[0]
    assert f'"{requires}"' in text


def test_extras_and_files_exist():
    extras = set(re.findall(r"^(\w+) = \[", PYPROJECT.partition("optional-dependencies]")[2], re.M))
    for name in ("ci", "release"):
        for job in workflow(name)["jobs"].values():
            text = commands(job)
            for names in re.findall(r'"(?:\$wheel|\.)\[([\w,]+)\]"', text):
                assert set(names.split(",")) <= extras
            for path in re.findall(r"(?<![\w/.-])(?:tests/[\w./]+|dev\.py|\.ci/\w+)", text):
                assert (ROOT / path).exists(), path


def test_a_release_needs_the_tests():
    jobs = workflow("release")["jobs"]
    assert workflow("release")[True]["push"] == {"tags": ["v*"]}  # YAML's "on" is true
    assert jobs["ci"] == {"needs": "version", "uses": "./.github/workflows/ci.yml"}
    assert jobs["pypi"]["needs"] == ["ci", "wheels"] and jobs["github"]["needs"] == "pypi"


def test_wheels_are_tested_with_the_oldest_pytorch_of_their_operators():
    job = workflow("release")["jobs"]["wheels"]
    oldest = re.findall(r"\((\d+)ULL << ", (ROOT / "ops/stable.h").read_text(encoding="utf-8"))
    assert f"torch=={'.'.join(oldest)}.0 " in commands(job)
    requires = re.findall(r'requires = \["(setuptools.*)"\]', PYPROJECT)[0]
    assert f'"{requires}"' in commands(job)


@pytest.mark.parametrize(("tag", "code"), [("{version}", 0), ("{version}.1", 1)])
def test_a_tag_must_be_the_dated_version(tag, code):
    (version,) = re.findall(
        r'^__version__ = "(.*)"', (ROOT / "spatial_mamba_d2/__init__.py").read_text(), re.M
    )
    script = commands(workflow("release")["jobs"]["version"])
    name = "v" + tag.format(version=version)
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=ROOT,
        env={"GITHUB_REF_NAME": name, "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode != 0) == code


def test_the_notes_of_a_release_are_its_part_of_the_changelog(tmp_path):
    lines = commands(workflow("release")["jobs"]["github"]).splitlines()
    (script,) = [line for line in lines if "CHANGELOG.md" in line]
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [0.2.0] - 2026-12-01\nnew\n\n## [0.1.0] - 2026-11-26\nfirst\n"
    )
    for version, notes in (("0.2.0", "new"), ("0.1.0", "first")):
        subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, check=True,
            env={"GITHUB_REF_NAME": f"v{version}", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert (tmp_path / "notes.md").read_text().strip() == notes
