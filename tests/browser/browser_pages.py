"""A headless Chromium, and what a page did while it was open: requests, console errors. Skipped with the reason where
there is no Chromium."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 300_000
"""Milliseconds for what loads a model or starts a kernel on a busy machine; no assertion is on time."""


@dataclass
class Watched:
    """A page with all that it asked for and complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def left_loopback(self) -> list[str]:
        """Requests to anywhere else."""
        return [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname not in ("127.0.0.1", "localhost")
        ]


def headless_chromium() -> Iterator[Any]:
    """A headless Chromium, which all tests of a file share."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install -y chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def watched_page(chromium: Any) -> Iterator[Watched]:
    """A page in a context of its own: nothing is left of what other tests stored or emulated."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    seen = Watched(page)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on(
        "console",
        lambda message: seen.errors.append(f"{message.text} {message.location}") if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    yield seen
    context.close()


Serve = Callable[..., tuple["subprocess.Popen[str]", Callable[[str], str]]]


def serving() -> Iterator[Serve]:
    """Start a module as a server; returns the process and a function that waits for a line of its output with some text
    in it."""
    running: list[subprocess.Popen[str]] = []

    def start(*command: str, log: Path, **settings: Any) -> tuple["subprocess.Popen[str]", Callable[[str], str]]:
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, text=True, **settings
            )
        running.append(process)

        def line_with(text: str) -> str:
            until = time.monotonic() + PATIENCE / 1000
            while time.monotonic() < until and process.poll() is None:
                for line in log.read_text().splitlines():
                    if text in line:
                        return line
                time.sleep(0.2)
            raise AssertionError(f"no {text!r} from {command}: {log.read_text()}")

        return process, line_with

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(timeout=60)
