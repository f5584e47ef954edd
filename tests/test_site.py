"""The built site: no link is dead, nothing comes from other hosts, search has the pages."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytest.importorskip("zensical", reason="pip install 'spatial-mamba-d2[docs]'")

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.docs,
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="mkdocs.yml is missing"),
]


class Page(HTMLParser):
    """The places of a page, where it leads to, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value is not None}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("img", "script", "iframe") and "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(values.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site, without the page of command lines."""
    folder = tmp_path_factory.mktemp("site")
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs/build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_site(folder / "pages", commands=False)
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = settings.replace("build/site_pages", "pages").replace("build/site", "site")
    settings = re.sub(r".*commands\.md\n", "", settings)
    (folder / "mkdocs.yml").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--config-file", "mkdocs.yml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    files = sorted(site.rglob("*.html"))
    assert len(files) > 15
    return {path: Page(path.read_text(encoding="utf-8")) for path in files}


def target_of(path: Path, link: str, site: Path) -> tuple[Path, str]:
    """The file and the place in it that a link of a page leads to."""
    parts = urlsplit(urljoin(f"http://site/{path.relative_to(site).as_posix()}", link))
    file = site / unquote(parts.path).lstrip("/")
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def test_no_link_is_dead(site, pages):
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            if urlsplit(link).scheme in ("http", "https", "mailto"):
                continue
            file, place = target_of(path, link, site)
            if not file.is_file() or (place and file in pages and place not in pages[file].ids):
                dead.append((path.relative_to(site).as_posix(), link))
    assert dead == []


def test_nothing_is_loaded_from_other_hosts(site, pages):
    for path, page in pages.items():
        for address in page.loaded:
            assert not urlsplit(address).netloc, (path, address)
            if path.name != "404.html":
                assert target_of(path, address, site)[0].is_file(), (path, address)


def test_search_finds_the_pages(site, pages):
    (index,) = site.rglob("search.json")
    text = json.dumps(json.loads(index.read_text(encoding="utf-8")))
    for word in ("structure_aware_ssm", "overlap_px", "SMD2_BACKEND", "MODEL.NUM_CLASSES"):
        assert word in text


def test_language_models_get_a_list(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert text.startswith("# Spatial-Mamba\n\n> ") and len(links) > 15
    assert all((site / link / "index.html").is_file() for link in links)
