"""What the documentation names exists: files, modules, links, supported versions of Python."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from spatial_mamba_d2 import model_zoo

ROOT = Path(__file__).parents[1]
PACKAGE = "spatial_mamba_d2"
PAGES = ["README.md", "CONTRIBUTING.md", "datasets/README.md"] + sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")
)

FOLDERS = rf"\.ci|configs|docs|examples|ops|{PACKAGE}|tests|tools"
PATHS = re.compile(
    rf"(?<![\w./-])(?:(?:{FOLDERS})/[\w./*<>-]*|datasets/[\w*<>-]+\.(?:md|py)|dev\.py|setup\.py)"
)
MODULES = re.compile(rf"(?<![\w./-]){PACKAGE}(?:\.\w+)+")
LINKS = re.compile(r"\]\(([^)\s]+)\)")

pytestmark = pytest.mark.skipif(
    not (ROOT / "README.md").is_file(), reason="not a checkout: README.md is missing"
)


def exists(path: str) -> bool:
    """Whether a file or folder has this name, in which ``<name>`` stands for anything."""
    pattern = re.sub(r"<\w+>", "*", path.rstrip("./"))
    return any(ROOT.glob(pattern))


def is_defined(name: str, module: Path) -> bool:
    """Whether a module defines or imports a name at its top level."""
    if not module.is_file():
        return False
    pattern = rf"^(?:(?:def|class) )?{name}\b|^from .* import .*\b{name}\b|^    {name},$"
    return bool(re.search(pattern, module.read_text(encoding="utf-8"), re.MULTILINE))


def is_module(name: str) -> bool:
    """Whether this is a subpackage, a module, or a name in one."""
    path = name.replace(".", "/")
    path = re.sub(rf"^{PACKAGE}/(ops|configs)(?=/|$)", r"\1", path)  # as setup.py maps them
    parent, _, attribute = path.rpartition("/")
    return (
        (ROOT / path).is_dir()
        or (ROOT / f"{path}.py").is_file()
        or is_defined(attribute, ROOT / f"{parent}.py")
        or is_defined(attribute, ROOT / parent / "__init__.py")
    )


def missing(page: str, text: str) -> Iterator[str]:
    """The files, modules and links that the text of a page names, but that do not exist."""
    yield from (path for path in PATHS.findall(text) if not exists(path))
    yield from (name for name in MODULES.findall(text) if not is_module(name))
    for target in LINKS.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    assert list(missing(page, (ROOT / page).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("run `tools/no_such_tool.py --help`", "tools/no_such_tool.py"),
        ("as in `ops/common/simd.h`.", "ops/common/simd.h"),
        ("every `ops/<name>/no_such_file.py`", "ops/<name>/no_such_file.py"),
        ("call `spatial_mamba_d2.allocator.run()`", "spatial_mamba_d2.allocator.run"),
        ("`python -m spatial_mamba_d2.no_such_module`", "spatial_mamba_d2.no_such_module"),
        ("`spatial_mamba_d2.system.allocator.glibc`", "spatial_mamba_d2.system.allocator.glibc"),
        ("[page](docs/no_such_page.md)", "docs/no_such_page.md"),
        ("[section](datasets/README.md#no-such-section)", "datasets/README.md#no-such-section"),
    ],
)
def test_a_wrong_name_is_found(text, name):
    assert set(missing("README.md", text)) == {name}


@pytest.mark.parametrize(
    "text",
    [
        "`ops/<name>/op.py`, `configs/*.yaml`, `.ci/run`, `docs/`, `datasets/prepare_shapes.py`",
        "`spatial_mamba_d2.system.allocator.keep_freed_memory()`, `spatial_mamba_d2.ops`",
        "`spatial_mamba_d2.models.build_backbone`, `datasets/coco`, `my/tools/x`, `torch.ops/x`",
        "[page](docs/cuda.md), [section](datasets/README.md#coco-2017), [site](https://pytorch.org)",
    ],
)
def test_a_right_name_is_not(text):
    assert list(missing("README.md", text)) == []


def test_supported_pythons_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest, excluded), *_ = re.findall(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', text, re.M)
    oldest, newest = int(oldest), int(excluded) - 1
    classifiers = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    assert [int(minor) for minor in classifiers] == list(range(oldest, newest + 1))
    for file in ("README.md", "CONTRIBUTING.md", "dev.py"):
        ranges = re.findall(r"Python (3\.\d+) to (3\.\d+)", (ROOT / file).read_text("utf-8"))
        assert set(ranges) == {(f"3.{oldest}", f"3.{newest}")}, file


@pytest.fixture(scope="module")
def site():
    """``docs/build_site.py`` as a module."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs/build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cards_are_those_of_the_published_models(site):
    page = site.cards_page()
    sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(model_zoo.list_models())
    for name, text in sections.items():
        entry = model_zoo.get_entry(name)
        assert f"{entry.parameters:,}" in text and "license" not in text
        assert all(str(score) in text for score in entry.scores)


def test_the_site_has_the_pages_that_its_menu_names(site, tmp_path):
    pages = {path.name for path in site.write_site(tmp_path / "pages", commands=False)}
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"[\w.]+\.md", menu.partition("nav:")[2])) == pages | {"commands.md"}
    for path in (tmp_path / "pages").glob("*.md"):
        targets = LINKS.findall(path.read_text(encoding="utf-8"))
        local = [t.partition("#")[0] for t in targets if not t.startswith(("https://", "#"))]
        assert all((path.parent / target).is_file() for target in local), path
    listed = LINKS.findall((tmp_path / "pages/llms.txt").read_text())
    assert {"index.md" if link == "./" else f"{link[:-1]}.md" for link in listed} == pages


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_site_explains_every_key_with_its_default(site, task):
    module = pytest.importorskip(f"{PACKAGE}.{task}.config", reason="fvcore is not installed")
    from spatial_mamba_d2.config import flat_items

    page = site.configuration_page()
    ours = page.partition("## All tasks")[2].partition("## Detection")[0]
    ours += page.partition(f"## {task.capitalize()}")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| `([A-Z0-9_.]+)` \| `(.*?)` \|", ours, re.MULTILINE))
    for key, value in flat_items(getattr(module, f"{task}_defaults")()):
        assert key in shown, key
        if re.match(r"[\d(\"]|True|False|None", shown[key]):
            assert ast.literal_eval(shown[key].replace("\\|", "|")) == value, key


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob(f"{PACKAGE}/**/*.py"), *ROOT.glob("ops/**/*"), ROOT / "setup.py"]
    texts = [p.read_text(encoding="utf-8") for p in sources if p.suffix in (".py", ".h")]
    read = set(re.findall(r'(?:environ\S*|getenv)\(\s*"(SMD2_\w+)"', "\n".join(texts)))
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    assert read == set(re.findall(r"^\| `(SMD2_\w+)`", page, re.MULTILINE))


def test_the_tests_of_situations_exist():
    """Written ``file.py::test``; an ellipsis and ``*`` stand for anything, F and G for files."""
    text = (ROOT / "docs/situations.md").read_text(encoding="utf-8")
    letters = dict(re.findall(r"`([A-Z])` is\s+`([\w/]+\.py)`", text))
    assert set(letters) == {"F", "G"}
    references = re.findall(r"`([A-Z]|[\w/*]+\.py)(?:::(\w+)(…?))?`", text)
    assert len(references) > 50
    for file, name, more in references:
        pattern = r"^def {}{}\(".format(name, r"\w*" if more else "") if name else ""
        files = list(ROOT.glob(f"tests/{letters.get(file, file)}"))
        texts = [path.read_text(encoding="utf-8") for path in files]
        assert any(re.search(pattern, t, re.MULTILINE) for t in texts), (file, name)


def test_the_figure_of_the_fusion_is_what_the_operators_do(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    spec = importlib.util.spec_from_file_location("draw_fusion", ROOT / "docs/draw_fusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = module.weights_at_centre(15, 0.06)
    seen = before.flatten() > 0
    assert seen[:113].all() and not seen[113:].any()  # the order of the scan, up to the centre
    assert before[7, 7].item() == pytest.approx(1) and before[7, 6].item() == pytest.approx(
        math.exp(-0.06)
    )
    # Five rows below is the lowest tap, whose state has seen the tokens to its left.
    assert (after[12, :13] > 0).all() and not after[12, 13:].any() and not after[13:].any()
    module.draw().savefig(tmp_path / "fusion.png")
    assert (tmp_path / "fusion.png").stat().st_size > 10_000
