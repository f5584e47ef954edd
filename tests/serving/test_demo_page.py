"""The page of the web demo, in headless Chromium: upload, result, download, bad file."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("gradio", reason="pip install 'spatial-mamba-d2[app]'")
pytest.importorskip("playwright", reason="pip install playwright")
from playwright.sync_api import sync_playwright

from spatial_mamba_d2.serving.demo import Demo
from spatial_mamba_d2.serving.demo_page import launch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, predictor, free_port):
    """``open_page(*tasks)``: the page, and the requests to other hosts, which are stopped."""
    closed = []

    def start(*tasks: str):
        demo = Demo(predictor(task) for task in tasks)
        launch(demo, "127.0.0.1", free_port, prevent_thread_lock=True, quiet=True)
        context = browser.new_context(accept_downloads=True)
        page, foreign = context.new_page(), []

        def stop_foreign(route):
            if "127.0.0.1" in route.request.url or route.request.url.startswith(("data:", "blob:")):
                route.continue_()
            else:
                foreign.append(route.request.url)
                route.abort()

        context.route("**/*", stop_foreign)
        page.goto(f"http://127.0.0.1:{free_port}")
        page.get_by_role("heading", name="Spatial-Mamba").wait_for(timeout=60_000)
        closed.append((context, demo))
        return page, foreign

    yield start
    for context, demo in closed:
        context.close()
        demo.close()
    import gradio

    gradio.close_all()


def upload(page, path) -> None:
    page.locator("#file input[type=file]").set_input_files(str(path))
    page.locator("#file").get_by_text(path.stem).first.wait_for(timeout=30_000)


def test_an_image_becomes_objects_to_download(open_page, truth, file_of, tmp_path):
    page, foreign = open_page("detection", "segmentation")
    photo = tmp_path / "photo.png"
    photo.write_bytes(file_of(truth.image))
    upload(page, photo)
    page.locator("#predict").click()
    page.locator("#summary").get_by_text("objects in 48 x 64 pixels").wait_for(timeout=30_000)
    page.locator("#drawing img").wait_for(timeout=30_000)
    with page.expect_download(timeout=30_000) as waiting:
        page.locator("#results a").first.click()
    content = json.loads(waiting.value.path().read_text())
    assert {"annotations", "images", "categories"} <= content.keys()
    page.locator("#task").get_by_text("segmentation").click()
    page.locator("#predict").click()
    page.locator("#summary").get_by_text("classes in 48 x 64 pixels").wait_for(timeout=30_000)
    assert foreign == []


def test_a_bad_file_is_told_and_a_missing_one(open_page, tmp_path):
    page, _ = open_page("detection")
    page.locator("#predict").click()
    page.get_by_text("An image is missing").first.wait_for(timeout=30_000)
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    upload(page, bad)
    page.locator("#predict").click()
    page.get_by_text("image file bad.png cannot be decoded").first.wait_for(timeout=30_000)
