"""Sparse against dense: what the pairs share, operations counted by hand, and the command from runs to plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.vmoe.test_cli import invoke, refused
from tests.vmoe.tiny import CONFIG, DENSE, MOE, PREPROCESSING, assert_same_state, data_of, write_idx
from vmoe.compare_dense import LADDER, Measured, Run, all_runs, summarise, training_flops
from vmoe.config import ModelConfig
from vmoe.operating_point import OperatingPoint
from vmoe.train import TrainConfig, Trainer


def trainer_of(config: ModelConfig) -> Trainer:
    settings = TrainConfig(epochs=2, batch_size=6, autocast="none")
    return Trainer(config, settings, data_of(24), PREPROCESSING, torch.device("cpu"))


def test_runs_come_seed_by_seed_in_pairs_that_differ_in_their_experts_alone() -> None:
    runs = all_runs((32, 48), 2)
    assert [run.name for run in runs[:4]] == ["dense-32-seed0", "sparse-32-seed0", "dense-48-seed0", "sparse-48-seed0"]
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    dense, sparse = (run.model_config(10, 4) for run in runs[2:4])
    assert sparse.moe is not None
    assert sparse.moe.layers == (1, 3)
    assert replace(sparse, moe=None) == dense
    assert (dense.hidden_size, dense.mlp_dim, dense.num_layers) == (48, 96, 4)


def test_training_flops_of_a_dense_model_are_those_of_its_products() -> None:
    # D = 8, F = 16, S = 4 tokens, 16 pixels a patch, 3 classes, 2 blocks, 6 images. Multiply-accumulates per image:
    # embedding 4*16*8 = 512; a block 4*8*24 + 4*8*8 (qkv, out) + 2 * 4*4*8 (scores, mix) + 2 * 4*8*16 (MLP) = 2304;
    # head 8*3 = 24. The backward pass of a product has two of the same size, but nobody asks for the pixels' gradient.
    forward = 512 + 2 * 2304 + 24
    per_step = 2 * 6 * (3 * forward - 512)
    assert training_flops(trainer_of(DENSE)) == per_step * 8  # 24 images, 6 a step, 2 epochs


def test_training_flops_of_a_sparse_model_count_kept_pairs_without_padding_and_leave_the_run_alone() -> None:
    # A slot for every token and K = 1: as many MLP rows as in the dense model, and the router's 4*8*4 per block.
    config = replace(CONFIG, moe=replace(MOE, num_selected_experts=1, capacity_factor=4.0))
    trainer = trainer_of(config)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert training_flops(trainer) == training_flops(trainer_of(DENSE)) + 2 * 6 * 3 * (2 * 4 * 8 * 4) * 8
    assert_same_state(dict(trainer.model.state_dict()), before)
    assert trainer.step == 0


def test_summary_is_the_mean_over_seeds_of_each_kind_width_and_point() -> None:
    point = OperatingPoint(1.0, 2)
    measured = [
        Measured(Run("dense", 32, 0), None, 0.7, 100, 1000, 50, 10),
        Measured(Run("sparse", 32, 0), point, 0.8, 150, 2000, 90, 10),
        Measured(Run("dense", 32, 1), None, 0.9, 100, 1000, 50, 10),
    ]
    dense, sparse = summarise(measured)
    assert (dense.kind, dense.accuracy, dense.num_seeds) == ("dense", pytest.approx(0.8), 2)
    assert dense.deviation == pytest.approx(0.02**0.5)  # (0.01 + 0.01) / (2 - 1)
    assert (sparse.point, sparse.accuracy, sparse.deviation, sparse.training_flops) == (point, 0.8, None, 2000)


def test_compare_dense_trains_each_run_once_and_writes_table_results_and_plot(tmp_path: Path) -> None:
    write_idx(tmp_path / "data", "train", data_of(24))
    write_idx(tmp_path / "data", "t10k", data_of(12, seed=1))
    arguments = (
        "compare-dense", "--data", tmp_path / "data", "--output", tmp_path / "runs", "--width", "8", "--width", "16",
        "--blocks", "2", "--seeds", "2", "--epochs", "1", "--batch-size", "12", "--autocast", "none", "--device", "cpu",
        "--json", tmp_path / "report.json", "--plot", tmp_path / "report.png",
    )  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["runs"]) == 2 * 2 * (1 + len(LADDER))
    dense, *sparse = report["summary"][: 1 + len(LADDER)]
    assert (dense["kind"], dense["width"], dense["num_seeds"]) == ("dense", 8, 2)
    assert sparse[-1]["inference_flops"] > dense["inference_flops"]  # K = 2 and a router
    assert sparse[-1]["inference_flops"] > sparse[0]["inference_flops"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "runs" / "dense-8-seed0" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert invoke(*arguments).exit_code == 0
    assert (tmp_path / "runs" / "dense-8-seed0" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_compare_dense_without_data_says_what_is_missing(tmp_path: Path) -> None:
    assert "is not a directory" in refused(invoke("compare-dense", "--output", tmp_path, "--data", tmp_path / "none"))
