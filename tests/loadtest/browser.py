"""A real browser without a window: Debian's Chromium, driven by Selenium.

`python -m tests.loadtest.browser PAGE PICTURE` takes a picture of a page's plots.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

NEEDED = "install Debian's packages chromium and chromium-driver, or put chromium and chromedriver on PATH"


@contextmanager
def browser(width: int = 1240, height: int = 1000) -> Iterator[webdriver.Chrome]:
    """One that logs what a page writes to the console.

    Raises:
        FileNotFoundError: it is not installed.
    """
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        raise FileNotFoundError(NEEDED)
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    # Root, as in containers, gets no sandbox; a container's /dev/shm is too small.
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        "force-device-scale-factor=1",
    ):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver's path is given, so that Selenium does not look for one in the network.
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(programs[1])))
    try:
        yield driver
    finally:
        driver.quit()


def picture(
    page: Annotated[Path, typer.Argument(help="Written by `loadtest`.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    plots: Annotated[int, typer.Option(help="How many, from the first on.")] = 8,
) -> None:
    """Takes a picture of the plots of a page, in few colours to keep it small."""
    with browser(height=4000) as driver:
        driver.get(page.resolve().as_uri())
        found = driver.find_elements(By.CSS_SELECTOR, "figure.plot")[:plots]
        boxes = [each.rect for each in found]
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    margin = 12
    box = (
        min(each["x"] for each in boxes) - margin,
        min(each["y"] for each in boxes) - margin,
        max(each["x"] + each["width"] for each in boxes) + margin,
        max(each["y"] + each["height"] for each in boxes) + margin,
    )
    shot.crop(tuple(round(side) for side in box)).quantize(128).save(out, optimize=True)
    typer.echo(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(picture)
