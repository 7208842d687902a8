"""The page as Chromium shows it: from `loadtest compare --html` to what a reader sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from typer.testing import CliRunner

from loadtest.cli import app
from tests.loadtest.browser import browser, picture
from tests.loadtest.conftest import SHIPPED

# Would set the title if it were HTML. The name of a file, so without a slash.
EVIL = "trace<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'<script>.csv"
POLICIES = ("foresight", "fixed")


def invoke(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reports and their comparison on a page."""
    directory = tmp_path_factory.mktemp("page")
    trace = directory / EVIL
    invoke("generate", "on-off", "--rate", 500, "--duration", 15, "--budget", "auto", "--budget", "low", "--out", trace)
    for policy in POLICIES:
        report = directory / f"{policy}.json"
        invoke("simulate", "--bundle", SHIPPED, "--trace", trace, "--policy", policy, "--json", report)
    invoke("compare", *(directory / f"{policy}.json" for policy in POLICIES), "--html", directory / "page.html")
    return directory


@pytest.fixture(scope="module")
def driver(directory: Path) -> Iterator[Chrome]:
    with browser() as driver:
        driver.get((directory / "page.html").as_uri())
        yield driver


def test_page_when_opened_then_the_console_stays_empty(driver: Chrome) -> None:
    assert driver.get_log("browser") == []
    assert driver.title == "Load test: foresight | fixed"


def test_page_when_opened_then_every_line_and_area_is_drawn_inside_its_plot(driver: Chrome) -> None:
    found = driver.execute_script(
        """
        return [...document.querySelectorAll("figure.plot")].map(figure => {
          const frame = figure.querySelector("svg").viewBox.baseVal;
          return [figure.querySelector("h3").textContent,
            [...figure.querySelectorAll("path")].map(path => {
              const box = path.getBBox();
              const inside = box.x >= 0 && box.y >= 0 && box.x + box.width <= frame.width
                && box.y + box.height <= frame.height;
              return [path.getTotalLength(), inside];
            })];
        })
        """
    )
    assert [title for title, _ in found][:2] == ["Latency", "Latency over time"]
    assert len(found) == 5 + 2 * len(POLICIES)
    for title, paths in found:
        assert paths, title
        for length, inside in paths:
            assert length > 100, title  # of a frame of 560 x 250
            assert inside, title


def test_page_when_opened_then_its_tables_show_the_numbers_of_the_reports(driver: Chrome, directory: Path) -> None:
    table = driver.find_element(By.CSS_SELECTOR, "table")
    head = [cell.text for cell in table.find_elements(By.CSS_SELECTOR, "thead th")]
    for policy, row in zip(POLICIES, table.find_elements(By.CSS_SELECTOR, "tbody tr"), strict=True):
        report = json.loads((directory / f"{policy}.json").read_text())
        cells = dict(zip(head, row.find_elements(By.CSS_SELECTOR, "th, td"), strict=True))
        assert cells["run"].text == policy
        expected = {
            "offered": (report["offered"], f"{report['offered']:,}"),
            "in time %": (report["slo_attainment"], f"{100 * report['slo_attainment']:.2f}"),
            "effective acc. %": (report["effective_accuracy"], f"{100 * report['effective_accuracy']:.2f}"),
            "shed %": (report["shed_ratio"], f"{100 * report['shed_ratio']:.2f}"),
            "missed %": (report["missed_ratio"], f"{100 * report['missed_ratio']:.2f}"),
            "p50 ms": (report["latency_s"]["p50"], f"{1000 * report['latency_s']['p50']:.1f}"),
            "p99 ms": (report["latency_s"]["p99"], f"{1000 * report['latency_s']['p99']:.1f}"),
        }
        for name, (value, text) in expected.items():
            data = cells[name].find_element(By.TAG_NAME, "data")
            assert float(data.get_attribute("value") or "nan") == value, name
            assert data.text == text, name


def test_page_when_a_name_holds_a_script_then_it_is_read_and_not_run(driver: Chrome) -> None:
    assert EVIL in driver.find_element(By.TAG_NAME, "body").text
    assert "hacked" not in driver.title
    assert driver.execute_script("return document.images.length + document.scripts.length") == 0


def test_browser_when_a_page_is_careless_then_the_same_name_runs(driver: Chrome, directory: Path) -> None:
    """The test above could fail: without `escape` and the page's own policy, this is what happens."""
    careless = directory / "careless.html"
    careless.write_text(f"<title>fine</title><body>{EVIL}</body>")
    with browser() as other:
        other.get(careless.as_uri())
        assert other.title == "hacked"


def test_page_when_the_reader_prefers_dark_then_it_is_dark_and_legible(driver: Chrome) -> None:
    def brightness(of: str, what: str) -> float:
        colour = driver.execute_script(f"return getComputedStyle(document.querySelector('{of}')).{what}")
        channels = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        return sum(channels) / 3

    for scheme in ("light", "dark"):
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        paper, ink = brightness("body", "backgroundColor"), brightness("body", "color")
        assert (paper > 200 and ink < 60) if scheme == "light" else (paper < 60 and ink > 200)
        assert abs(brightness("path.line", "stroke") - paper) > 60


def test_page_when_the_window_is_narrow_then_nothing_hangs_over_its_edge(driver: Chrome) -> None:
    driver.set_window_size(500, 800)
    assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_picture_when_taken_then_it_is_small_and_shows_the_plots(directory: Path) -> None:
    out = directory / "page.png"
    picture(directory / "page.html", out, plots=4)
    assert out.stat().st_size < 300_000
    with Image.open(out) as image:
        assert image.width > 1000
        assert 500 < image.height < 1000  # two rows of two
        assert len(image.convert("RGB").getcolors(256) or ()) > 20
