"""The paper's sizes: reported parameter counts, and the table of docs/sizes.md."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vmoe.cli import app
from vmoe.config import VARIANTS, MoeConfig, every_layers, last_layers
from vmoe.flops import count_parameters, flops_per_image
from vmoe.sizes import (
    BACKBONES,
    CHEAP,
    FULL,
    LARGEST,
    LARGEST_CLASSES,
    REPORTED_MILLIONS,
    Size,
    markdown,
    with_jft_head,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sizes.md").read_text()
ROWS = re.findall(
    r"^\| (\S+) \| \d* \| (\S+(?: \d)?) \| ([\d.]+) \| ([\d.]*) \| ([\d.]+) \| ([\d.]+) \|$", DOCUMENT, re.M
)


@pytest.mark.parametrize(("name", "placement"), REPORTED_MILLIONS)
def test_parameters_with_the_head_of_pre_training_are_the_reported_ones(name: str, placement: str) -> None:
    if name == LARGEST:
        config = replace(VARIANTS["vmoe_15b"], num_classes=LARGEST_CLASSES)
    else:
        config = with_jft_head(VARIANTS[BACKBONES[name]])
        kind, _, count = placement.partition(" ")
        if kind != "dense":
            layers = {"last": last_layers, "every": every_layers}[kind](config.num_layers, int(count))
            config = replace(config, moe=MoeConfig(32, layers))
    # The reported values have one decimal.
    assert count_parameters(config) / 1e6 == pytest.approx(REPORTED_MILLIONS[name, placement], abs=0.0501)


def test_sizes_command_writes_every_placement_that_a_model_has_blocks_for(tmp_path: Path) -> None:
    report = tmp_path / "sizes.json"
    arguments = ["sizes", "--last", "5", "--every", "4", "--num-experts", "2", "--json", str(report)]
    arguments += ["--model", "S/16", "--model", "B/32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = {(row["name"], row["placement"]): row for row in json.loads(report.read_text())}
    assert len(found) == 2 + 3  # S/16 has 4 odd blocks, too few for 'last 5'
    assert found["S/16", "every 4"]["moe_layers"] == 2
    assert found["B/32", "last 5"]["moe_layers"] == 5
    assert all(row["flops_full"] >= row["flops_cheap"] > 0 for row in found.values())
    assert found["B/32", "dense"]["reported_millions"] == 102.1
    assert found["B/32", "every 4"]["reported_millions"] is None


def test_sizes_of_an_impossible_placement_are_refused() -> None:
    result = CliRunner().invoke(app, ["sizes", "--every", "99"])
    assert result.exit_code == 1
    assert "'every 99' of 8 blocks: the stride must be between 1 and 8" in result.stderr


def test_sizes_of_an_unknown_model_are_refused() -> None:
    result = CliRunner().invoke(app, ["sizes", "--model", "X/99"])
    assert result.exit_code == 1
    assert "unknown model 'X/99'; known are S/32, S/16, B/32, B/16, L/32, L/16, H/14, 15B" in result.stderr


def test_markdown_of_a_row_rounds_to_one_decimal() -> None:
    row = Size("S/32", "last 2", 2, 166_700_000, 3_240_000_000, 2_560_000_000, None)
    assert markdown([row]).splitlines()[-1] == "| S/32 | 2 | last 2 | 166.7 |  | 3.2 | 2.6 |"


def test_the_document_has_the_table_of_the_command() -> None:
    # Three rows computed again; the whole table takes half a minute.
    assert len(ROWS) == 7 * 4 - 2 + 1  # S/32 and S/16 have too few blocks for 'last 5', and there is the 15B model
    table = {(name, placement): tuple(map(float, values)) for name, placement, *values in _without_reported(ROWS)}
    for name, key, layers in (("S/32", "s32", None), ("B/16", "b16", every_layers(12, 2)), ("S/16", "s16", (5, 7))):
        config = with_jft_head(VARIANTS[key])
        if layers is not None:
            config = replace(config, moe=MoeConfig(32, layers))
        placement = {None: "dense", (5, 7): "last 2"}.get(layers, "every 2")
        values = (
            count_parameters(config) / 1e6,
            flops_per_image(config, FULL) / 1e9,
            flops_per_image(config, CHEAP) / 1e9,
        )
        assert table[name, placement] == pytest.approx(values, abs=0.0501)


def _without_reported(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [(name, placement, parameters, *flops) for name, placement, parameters, _, *flops in rows]
