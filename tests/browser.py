"""A real browser for the tests of the report and of served pages, and for the picture of the report in the README.

python -m tests.browser REPORT.html PICTURE.png    a picture of its beginning
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = 360, 1280


@dataclass
class Opened:
    """A page that was opened, and what the browser did and said meanwhile."""

    page: Any
    said: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)


def find_browser() -> str | None:
    """The path of the system's browser."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def started_browser() -> Iterator[Any]:
    """The system's browser without a window; the test is skipped where there is none."""
    from playwright.sync_api import sync_playwright

    path = find_browser()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        # containers have neither user namespaces for the sandbox nor a large /dev/shm
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Any, what: Path | str, width: int = DESK, height: int = 900, dark: bool = False
) -> Iterator[Opened]:
    """A file or an address in a window of `width` CSS pixels; every word of the console and every request is noted."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.said.append(f"error: {error}"))
    found.page.on("request", lambda request: found.requested.append(request.url))
    try:
        found.page.goto(what if isinstance(what, str) else what.resolve().as_uri(), wait_until="load")
        yield found
    finally:
        context.close()


def main() -> None:
    """Take the picture, in few enough colours for a small file."""
    from PIL import Image

    report, picture = sys.argv[1:]
    if find_browser() is None:
        sys.exit(f"error: none of {', '.join(BROWSERS)} is installed")
    with started_browser() as browser, opened(browser, Path(report), height=1760) as seen:
        content = seen.page.screenshot()
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    Image.open(BytesIO(content)).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main()
