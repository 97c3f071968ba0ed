"""In a real browser: the report makes no request and runs no script, the explorer answers in a real JupyterLab."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from paperlib import paths
from paperlib.cli import report

HOSTILE = '<script>document.title="hit"</script><img src="https://example.org/x" onerror="document.title=1">'


def watched(browser):
    """A page, its console errors and the addresses that it asks for."""
    page, errors, requests = browser.new_page(viewport={"width": 1400, "height": 1000}), [], []
    page.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith("data:") or requests.append(request.url))
    return page, errors, requests


@pytest.mark.slow
def test_the_report_opens_quietly(browser, tmp_path, quick_figures):
    folder = quick_figures
    summary = json.loads((folder / "summary.json").read_text())
    summary["data"]["name"] = summary["verdicts"][0]["statistic"] = HOSTILE
    (folder / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "report.html").write_text(report.page(folder))
    page, errors, requests = watched(browser)
    page.goto((tmp_path / "report.html").as_uri())
    assert page.title() == "quick: what the heads agree on"
    assert errors == [] and requests == [(tmp_path / "report.html").as_uri()]
    pictures = page.locator("figure img")
    assert pictures.count() == len(list(folder.glob("*.png")))
    assert all(pictures.nth(i).evaluate("image => image.naturalWidth > 300") for i in range(pictures.count()))
    assert page.get_by_text(HOSTILE).count() >= 1
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").nth(1).click()
    assert download.value.suggested_filename.endswith(".csv")


@pytest.mark.slow
def test_the_explorer_answers_in_jupyterlab(browser, tmp_path):
    notebooks = shutil.copytree(paths.root() / "notebooks", tmp_path / "notebooks")
    notebook = json.loads((notebooks / "06_explorer.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    (notebooks / "06_explorer.ipynb").write_text(json.dumps(notebook))
    shutil.copy(paths.root() / "pyproject.toml", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PAPERLIB_HEADLESS"}
    options = [f"--ServerApp.port={port}", "--no-browser", "--IdentityProvider.token=", "--ServerApp.password=",
               "--allow-root", f"--ServerApp.root_dir={notebooks}", "--LabApp.news_url=None"]  # fmt: skip
    with open(tmp_path / "lab.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server)
        page, _, _ = watched(browser)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/06_explorer.ipynb?reset")
        page.locator(".jp-NotebookPanel-toolbar").wait_for(timeout=60_000)
        page.get_by_text("Python 3", exact=False).first.wait_for(timeout=60_000)
        page.locator("li.lm-MenuBar-item", has_text="Run").click()
        page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
        pictures = page.locator("img.widget-image")
        pictures.nth(1).wait_for(timeout=300_000)  # trains and measures first, where no walk has
        assert not page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count()
        for picture, slider in ((0, 1), (1, 3)):  # sliders: node, threshold; encoder, head
            before = pictures.nth(picture).get_attribute("src")
            page.locator(".noUi-handle").nth(slider).focus()
            page.keyboard.press("ArrowRight")
            page.wait_for_function(
                "([number, before]) => document.querySelectorAll('img.widget-image')[number].src != before",
                arg=[picture, before], timeout=30_000,
            )  # fmt: skip
        page.screenshot(path=tmp_path / "explorer.png")
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(120):
        assert server.poll() is None, "JupyterLab has stopped"
        try:
            urllib.request.urlopen(address, timeout=1).read()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)
