"""Chromium for tests that look at pages; a test that asks for it is skipped where it is not installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120_000  # milliseconds: a limit for hangs, not a measure; machines may be busy


@contextmanager
def chromium() -> Iterator:
    """A browser without a window, as Playwright's ``Browser``."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: install Chromium, as one of {', '.join(NAMES)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, timeout=PATIENCE)
        yield browser
        browser.close()


@contextmanager
def quiet_page(browser, allowed: tuple[str, ...] = ("file:", "data:", "blob:", "about:"), **options) -> Iterator:
    """A page that must ask for nothing but what begins with ``allowed``, get all of it, and log no error.

    ``options`` go to ``Browser.new_page``.
    """
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    trouble = []
    page.on("request", lambda r: None if r.url.startswith(allowed) else trouble.append(f"asked for {r.url[:200]}"))
    page.on("requestfailed", lambda r: trouble.append(f"did not get {r.url[:200]}"))
    page.on("console", lambda m: trouble.append(f"logged {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(f"raised {error}"))
    yield page
    page.close()
    assert not trouble, trouble
