"""The tables and pictures of docs/experiments against the reports that the commands wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vmoe.config import load_config
from vmoe.operating_point import OperatingPoint
from vmoe.sweep import Interval, SweepPoint
from vmoe.sweep_report import sweep_markdown

EXPERIMENTS = Path(__file__).parents[2] / "docs" / "experiments"
PAGES = sorted(path.stem for path in EXPERIMENTS.glob("*.md") if path.name != "sweep.md")  # that one is tables alone


@pytest.mark.parametrize(
    ("model", "report"),
    [("plain", "routing-analysis"), ("adaptive", "routing-analysis-adaptive"), ("vanilla", "routing-analysis-vanilla")],
)
def test_the_table_of_routing_analysis_is_that_of_its_reports(model: str, report: str) -> None:
    page = (EXPERIMENTS / "routing-analysis.md").read_text()
    layers = json.loads((EXPERIMENTS / f"{report}.json").read_text())["layers"]
    assert [layer["block"] for layer in layers] == [1, 3]
    for layer in layers:
        least, most = 100 * min(layer["load"]), 100 * max(layer["load"])
        row = (
            f"| `{model}` | {layer['block']} | {layer['dependence']:.3f} | {layer['chance']:.3f} "
            f"| {least:.1f} to {most:.1f} % | {100 * layer['dropped']:.1f} % | {100 * layer['unserved']:.1f} % |"
        )
        assert row in page


def test_the_tables_of_the_sweep_are_those_of_its_report() -> None:
    assert (EXPERIMENTS / "sweep.md").read_text() == sweep_markdown(_sweep("sweep"))


def test_the_table_of_adaptive_training_is_the_summary_of_its_report() -> None:
    summary = sweep_markdown(_sweep("adaptive-training")).split("\n\n")[0]
    assert summary in (EXPERIMENTS / "adaptive-training.md").read_text()


def test_the_table_of_sparse_against_dense_is_that_of_its_report() -> None:
    rows = _rows("sparse-vs-dense")
    summaries = json.loads((EXPERIMENTS / "sparse-vs-dense.json").read_text())["summary"]
    assert len(rows) == len(summaries) == 12
    for each, row in zip(summaries, rows, strict=True):
        kind = "dense" if each["kind"] == "dense" else "V-MoE"
        point = "" if each["point"] is None else " {capacity_factor:g}, {num_selected_experts}".format(**each["point"])
        spread = "" if each["deviation"] is None else f" +- {100 * each['deviation']:.2f}"
        assert row == (
            f"| {each['width']} | {kind} |{point} | {each['parameters']:,} | {100 * each['accuracy']:.2f}{spread} % "
            f"| {each['inference_flops'] / 1e6:.2f} | {each['training_flops'] / 1e12:.1f} |"
        )


def test_the_tables_of_selected_experts_are_extracts_of_the_sweep() -> None:
    tables = (EXPERIMENTS / "sweep.md").read_text()
    rows = _rows("selected-experts")
    assert len(rows) == 8
    for model, extract in (("plain", rows[:4]), ("adaptive", rows[4:])):
        start = tables.index(f"`{model}`, 1 image per group")
        alone = tables[start : tables.index(f"`{model}`, 16 images per group")]
        for row in extract:
            assert row.removesuffix("|") in alone  # its first columns are BPR's


def _rows(page: str) -> list[str]:
    """Of its tables, those that begin with a number."""
    return re.findall(r"^\| [\d.]+ \|.*\|$", (EXPERIMENTS / f"{page}.md").read_text(), re.M)


def _sweep(report: str) -> dict[str, list[SweepPoint]]:
    models = json.loads((EXPERIMENTS / f"{report}.json").read_text())["models"]
    return {name: [_sweep_point(values) for values in points] for name, points in models.items()}


def _sweep_point(values: dict[str, Any]) -> SweepPoint:
    point = None if values["point"] is None else OperatingPoint(**values["point"])
    intervals = {name: Interval(**values[name]) for name in ("accuracy", "minus_full")}
    return SweepPoint(**values | intervals | {"point": point, "kept": tuple(values["kept"])})


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_of_a_page_exists_and_is_small(page: str) -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (EXPERIMENTS / f"{page}.md").read_text()):
        assert (EXPERIMENTS / name).stat().st_size < 150_000
        with Image.open(EXPERIMENTS / name) as picture:
            picture.verify()


@pytest.mark.parametrize("page", PAGES)
def test_every_page_that_a_page_points_to_exists(page: str) -> None:
    for name in re.findall(r"[^!]\[[^]]*\]\(([^)#]+)\)", (EXPERIMENTS / f"{page}.md").read_text()):
        assert name.startswith("https://") or (EXPERIMENTS / name).exists()


def test_the_index_lists_every_page() -> None:
    assert set(PAGES) - {"README"} <= {Path(page).stem for _, page in _index()}


def test_the_figures_of_the_index_stand_on_the_pages_that_it_names() -> None:
    for result, page in _index():
        text = (EXPERIMENTS / page).read_text()
        for figure in re.findall(r"\d+\.\d+", result):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", text), f"{figure} is not on {page}"


def _index() -> list[tuple[str, str]]:
    """Result and page of every row."""
    return re.findall(r"\| ([^|]+) \| \[[^]]+\]\(([^)#]+)[^)]*\) \|$", (EXPERIMENTS / "README.md").read_text(), re.M)


def test_the_small_models_differ_in_nothing_but_their_routing() -> None:
    bpr, vanilla, dense = (
        load_config(EXPERIMENTS / "configs" / f"small_{n}.json") for n in ("bpr", "vanilla", "dense")
    )
    assert bpr.moe is not None
    assert vanilla.moe is not None
    assert (bpr.moe.routing, vanilla.moe.routing, dense.moe) == ("bpr", "vanilla", None)
    stripped = [re.sub(r'"moe": .*', "", config.to_json(), flags=re.S) for config in (bpr, vanilla, dense)]
    assert stripped[0] == stripped[1] == stripped[2]
