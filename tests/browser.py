"""Chromium for the tests of pages and of JupyterLab, which are skipped if it is not installed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import nbformat
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120_000  # milliseconds, only a limit for hangs: machines may be busy


@contextmanager
def chromium() -> Iterator:
    """A headless browser, as Playwright's ``Browser``."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: install Chromium as one of {', '.join(NAMES)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, timeout=PATIENCE)
        yield browser
        browser.close()


@contextmanager
def quiet_page(browser, allowed: tuple[str, ...] = ("file:", "data:", "blob:", "about:"), **options) -> Iterator:
    """A page whose requests must all start with ``allowed`` and succeed, and that must not log an error.

    ``options`` go to ``Browser.new_page``.
    """
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    trouble = []
    page.on("request", lambda r: None if r.url.startswith(allowed) else trouble.append(f"requested {r.url[:200]}"))
    page.on("requestfailed", lambda r: trouble.append(f"did not get {r.url[:200]}"))
    page.on("console", lambda m: trouble.append(f"logged {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(f"raised {error}"))
    yield page
    page.close()
    assert not trouble, trouble


# --- notebooks ------------------------------------------------------------------------------------------------------


def notebook_with(source: str, shown) -> nbformat.NotebookNode:
    """A notebook with one executed cell, whose output is the mime bundle of ``shown``."""
    bundle = shown._repr_mimebundle_()
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
    output = nbformat.v4.new_output("execute_result", data, metadata=metadata, execution_count=1)
    cell = nbformat.v4.new_code_cell(source, outputs=[output], execution_count=1)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[cell], metadata=kernel)


def exported(shown) -> str:
    """That notebook exported by nbconvert, with empty scripts instead of those that it would link to."""
    from nbconvert import HTMLExporter

    nothing = "data:text/javascript,"
    exporter = HTMLExporter(require_js_url=nothing, mathjax_url=nothing, mermaid_js_url=nothing)
    return exporter.from_notebook_node(notebook_with("", shown))[0]


@contextmanager
def jupyterlab(folder):
    """A JupyterLab server for the folder: its address and token. It is stopped with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    homes = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.root_dir": folder,
        "IdentityProvider.token": "token",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.extension_manager": "readonly",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | homes, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(f"{url}/api/status?token=token", server)
            yield url, "token"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Waits until the server answers."""
    end = time.monotonic() + 300
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=10).close()
            return
        time.sleep(1)
    pytest.fail(f"JupyterLab did not start, exit code {server.poll()}")
