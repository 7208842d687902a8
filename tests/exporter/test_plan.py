"""Plans of models that nobody has to load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporter.cli import app
from exporter.plan import plan
from tests.vmoe.upstream import Case
from vmoe.config import VARIANTS, ModelConfig, MoeConfig, last_layers
from vmoe.flax import tree_shapes


@pytest.mark.parametrize("name", ["token_k2", "map_head", "dense_vit"])
def test_plan_counts_what_the_checkpoint_holds(name: str) -> None:
    case = Case(name)
    stored = sum(array.size_bytes for array in tree_shapes(case.prefix).values())
    assert plan(case.config, "float32").size_bytes == stored
    assert plan(case.config, "bfloat16").size_bytes == stored // 2


def test_fifteen_billion_parameters_are_planned_without_memory() -> None:
    # H/14 widened to 1,664 and 8,192 with 32 experts in 16 of 48 blocks: an expert has
    # 2 * 1664 * 8192 + 1664 + 8192 = 27,272,832 parameters.
    moe = MoeConfig(32, last_layers(48, 16))
    config = replace(
        VARIANTS["h14"], hidden_size=1664, mlp_dim=8192, num_heads=16, num_layers=48, num_classes=21843, moe=moe
    )
    planned = plan(config, "bfloat16")
    experts = [part for part in planned.parts if part.name.startswith("experts of block")]
    assert [part.num_parameters for part in experts] == [32 * 27_272_832] * 16
    assert planned.num_parameters > 15e9
    assert planned.size_bytes == 2 * planned.num_parameters


def dry_run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["--dry-run", *map(str, arguments)], env={"COLUMNS": "1000"})
    assert result.exit_code == 0, result.output
    return result.output


def test_dry_run_prints_parameters_bytes_and_experts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = dry_run(Case("token_k2").prefix)
    # 8 experts of 2 * 40 * 96 + 40 + 96 = 7,816 parameters.
    assert f"{8 * 7816:,}" in output
    assert "experts of block 3" in output
    assert list(tmp_path.iterdir()) == []


def test_dry_run_needs_no_checkpoint(tmp_path: Path) -> None:
    config: ModelConfig = VARIANTS["vmoe_s32_last2_e8"]
    (tmp_path / "ours.json").write_text(config.to_json())
    assert f"{plan(config, 'float32').num_parameters:,}" in dry_run("--config", tmp_path / "ours.json")
    reference = {"model": Case("token_k2").load_json("config.json")["model"]}
    (tmp_path / "theirs.json").write_text(json.dumps(reference))
    assert "experts of block 1" in dry_run("--config", tmp_path / "theirs.json", "--image-size", "32")
