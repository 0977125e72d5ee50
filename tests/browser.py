"""JupyterLab on loopback and headless Chromium in front of it, for the notebooks that people click on."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import REPO

START_S, CELLS_S, STEP_S = 90, 180, 60
"""The longest waits: for the server, for Run All, and for one thing on the page."""
SIZE = {"width": 1280, "height": 900}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CELLS = """() => jupyterapp.shell.currentWidget.content.model.sharedModel.cells.filter(c => c.cell_type === "code").map(
  c => ({source: c.source, count: c.execution_count, kinds: c.toJSON().outputs.map(o => o.output_type)}))"""
READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
DATA = """async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]"""


def chromium() -> tuple[Any, str]:
    """(playwright's interface, the browser's path); skips the test with what is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'moelib[browser]'")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    return api, path


@contextmanager
def jupyterlab(notebook: Path, home: Path) -> Iterator[str]:
    """The address of a copy of `notebook`, opened in a server of its own whose every file is in `home`."""
    shutil.copy(notebook, home)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    argv += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    argv += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    argv += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home}"]
    folders = ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    folders += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    env = os.environ | {name: str(home / ".own" / name) for name in folders}
    env |= {"MOELIB_HOME": str(REPO), "PYTHONPATH": str(REPO)}
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(argv, env=env, cwd=home, stdout=log, stderr=log)
    try:
        _wait_for(server, f"{address}/api/status?token={token}", home / "server.log")
        yield f"{address}/lab/tree/{notebook.name}?token={token}&reset"
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(url, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start: {log.read_text(encoding='utf-8')[-2000:]}")


class Page:
    """A page of JupyterLab: what it asks of other machines is refused and noted, and so are its errors."""

    def __init__(self, page: Any, url: str):
        self.page, self.errors, self.elsewhere = page, [], []
        page.set_default_timeout(1000 * STEP_S)
        page.on("pageerror", lambda err: self.errors.append(str(err)))
        page.route("**/*", self._only_loopback)
        page.goto(url)
        page.wait_for_function(READY)

    def _only_loopback(self, route: Any) -> None:
        if route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            self.elsewhere.append(route.request.url)
            route.abort()

    def run_all(self) -> list[dict[str, Any]]:
        """Run All from the menu; the code cells when the last of them has its number."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        self.page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        counted = f"() => ({CELLS})().every(c => c.count !== null) && ({READY})()"
        self.page.wait_for_function(counted, timeout=1000 * CELLS_S)
        return list(self.page.evaluate(CELLS))

    def image(self, other_than: bytes = b"") -> bytes:
        """The data of the figure on the board, once it is another one."""
        image, end = self.page.locator("img.widget-image:visible"), time.monotonic() + STEP_S
        while time.monotonic() < end:
            image.wait_for()
            if (data := bytes(image.evaluate(DATA))) != other_than:
                return data
            self.page.wait_for_timeout(200)
        return other_than


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """The address in a headless Chromium that is closed at the end."""
    api, path = chromium()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield Page(browser.new_page(viewport=SIZE), url)
        finally:
            browser.close()
