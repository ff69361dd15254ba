"""Debian's Chromium, driven by Playwright; a page that complains fails its test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from megatron_oreal.monitor.report import build
from tests import report_run

CHROMIUM = shutil.which("chromium")
expect.set_options(timeout=20_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # Its own sandbox cannot be had by root, as which containers and CI run it.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page of the small run, and the data in it."""
    root = report_run.make_run(tmp_path_factory.mktemp("runs") / "tiny")
    out = root / "report.html"
    return out, build.write(build.Request((root,)), out)


class Reader:
    """Opens pages and remembers all that they say on the console, ask of the network, or break."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.complaints: list[str] = []
        self.pages: list[Page] = []

    def open(self, path: Path, address: str = "", **options: Any) -> Page:
        page = self.browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self._asked(request.url))
        self.pages.append(page)
        page.goto(path.as_uri() + address)
        page.wait_for_selector("main[data-ready]")
        return page

    def _asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(url)


@pytest.fixture
def reader(browser: Browser) -> Iterator[Reader]:
    reader = Reader(browser)
    yield reader
    for page in reader.pages:
        page.close()
    assert reader.complaints == []
