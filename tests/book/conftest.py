"""The built site, served to a headless Chromium; `workflow/` importable."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
]
FLAGS += ["disable-component-update", "disable-sync"]

sys.path.insert(0, str(ROOT / "workflow"))


def unavailable(reason: str) -> None:
    """Skip; in CI, where everything has to be there, fail."""
    (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built site."""
    folder = ROOT / "_build/html"
    if not (folder / "index.html").exists():
        unavailable("there is no built site; run `make html`")
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="session")
def served(site: Path) -> Iterator[str]:
    """The address of the built site, with a slash at its end."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=site)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    try:
        from playwright import sync_api
    except ImportError:
        unavailable("Playwright is not installed; install the extra `test`")
    found = [
        p
        for p in map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "/usr/bin/chromium")
        )
        if p
    ]
    if not found:
        unavailable("there is no Chromium; install it, for instance with `apt install chromium`")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=found[0], args=[f"--{flag}" for flag in FLAGS]
        )
        yield chromium
        chromium.close()
