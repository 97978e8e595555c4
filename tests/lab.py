"""JupyterLab in Debian's Chromium, driven by Playwright: what the browser test and `make screenshots` share."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket

PROJECT = Path(__file__).parents[1]
# WebGL without a GPU: Mesa's llvmpipe through ANGLE. The rest keeps Chromium from asking the network for anything.
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=gl-egl", "--ignore-gpu-blocklist",
]  # fmt: skip
START_S = 90
IDLE = "| Idle"  # after the kernel's name, in the status bar


def missing_browser() -> str:
    """What is not there to drive a browser with, and the remedy; "" where all is."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install -e '.[test]'"
    if shutil.which("chromium") is None:
        return "Chromium is not installed: apt-get install --no-install-recommends chromium (or `make browser`)"
    return ""


@dataclass(frozen=True)
class Lab:
    """A running server: its address and the token that opens it."""

    url: str
    token: str

    def notebook(self, path: str) -> str:
        """The address of a notebook below the server's folder, in a workspace of its own."""
        return f"{self.url}/lab/workspaces/{secrets.token_hex(4)}/tree/{path}?token={self.token}"


@contextmanager
def start_lab(folder: Path, scratch: Path) -> Iterator[Lab]:
    """JupyterLab over `folder` on a free port of this machine, with the project's page settings; ends with the block.

    scratch: an empty folder for its settings, runtime files and log. Raises RuntimeError with that log where it does
    not start.
    """
    settings = scratch / "config" / "labconfig"
    settings.mkdir(parents=True)
    shutil.copy(PROJECT / "notebooks" / ".page_config.json", settings / "page_config.json")
    token = secrets.token_hex(16)
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    env = os.environ | {
        "JUPYTER_CONFIG_DIR": str(scratch / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "PYTHONPATH": str(PROJECT),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    log = scratch / "lab.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    lab = Lab(f"http://127.0.0.1:{port}", token)
    try:
        _await_server(server, lab, log)
        yield lab
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _await_server(server: subprocess.Popen, lab: Lab, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{lab.url}/api/status?token={lab.token}", timeout=2).read()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start within {START_S} s:\n{log.read_text()}")


@contextmanager
def open_page(lab: Lab, size: tuple[int, int] = (1280, 800)) -> Iterator:
    """A Chromium page; `page.external` gathers requests to other hosts, `page.errors` what scripts raised or logged."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(60_000)
        page.external, page.errors = [], []
        own = (lab.url, lab.url.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else page.external.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)[:500]))
        page.on("console", lambda line: page.errors.append(line.text[:500]) if line.type == "error" else None)
        try:
            yield page
        finally:
            browser.close()


def open_notebook(page, lab: Lab, path: str, *, kernel: bool = True) -> None:
    """Opens a notebook with the side bar folded away; waits for its kernel unless told otherwise."""
    page.goto(lab.notebook(path))
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.locator(".jp-Spinner").first.wait_for(state="hidden")
    if kernel:
        page.get_by_text(IDLE).first.wait_for()
    if page.locator(".jp-Dialog").count():
        raise AssertionError(f"a dialog stands before the notebook: {page.locator('.jp-Dialog').first.inner_text()}")
    if page.locator("#jp-left-stack:visible").count():
        page.keyboard.press("Control+b")


def run_all(page, timeout_s: float = 120) -> None:
    """Run > Run All Cells, until the last code cell has a number, none waits and the kernel is idle."""
    page.locator(".lm-MenuBar-itemLabel:text-is('Run')").click()
    page.get_by_text("Run All Cells", exact=True).click()
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        texts = prompts.all_inner_texts()  # "" of cells far outside the window
        done = texts and texts[-1].strip("[]: ").isdigit() and not {"[ ]:", "[*]:"} & {*texts}
        if done and page.get_by_text(IDLE).count():
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"cells still run after {timeout_s} s: {prompts.all_inner_texts()}")
