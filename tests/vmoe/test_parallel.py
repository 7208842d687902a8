"""Data-parallel training: how a batch is shared out, and two processes under torchrun against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.vmoe.test_cli import train
from tests.vmoe.tiny import CONFIG, DENSE, MOE, PREPROCESSING, data_of, write_idx
from vmoe.checkpoint import load_checkpoint
from vmoe.config import ModelConfig
from vmoe.parallel import WHOLE, Shard
from vmoe.train import TrainConfig, Trainer, mixup

# Auxiliary losses as heavy as the other: a sum over one process alone would show.
HEAVY = replace(MOE, importance_loss_weight=1.0, load_loss_weight=1.0)
SETTINGS = (
    "--epochs 2 --batch-size 8 --warmup-steps 2 --learning-rate 0.05 --autocast none --optimizer sgd --adaptive 0.5 "
    "--mixup 0.3 --erase 0.5 --device cpu"
)


def test_shards_share_out_every_row_once_and_hold_each_with_its_mirror_image() -> None:
    assert Shard(0, 2).rows(8).tolist() == [0, 1, 6, 7]
    assert Shard(1, 2).rows(8).tolist() == [2, 3, 4, 5]
    rows = torch.cat([Shard(rank, 3).rows(12) for rank in range(3)])
    assert sorted(rows.tolist()) == list(range(12))
    assert WHOLE.rows(5).tolist() == [0, 1, 2, 3, 4]


def test_mixup_of_a_shard_is_that_part_of_the_mixup_of_the_batch() -> None:
    images, labels = torch.randn(8, 2, 2, 1), torch.eye(8)
    whole = mixup(images, labels, 0.5, step=3, seed=1)
    for rank in range(2):
        shard = Shard(rank, 2)
        rows = shard.rows(8)
        found = mixup(images[rows], labels[rows], 0.5, 3, 1, shard)
        for part, expected in zip(found, whole, strict=True):
            assert torch.equal(part, expected[rows])


@pytest.mark.parametrize(("batch", "group"), [(6, 1), (8, 4)])
def test_batch_that_cannot_be_shared_out_is_refused(batch: int, group: int) -> None:
    config = replace(CONFIG, moe=replace(MOE, group_images=group))
    settings = TrainConfig(batch_size=batch, autocast="none")
    with pytest.raises(ValueError, match="groups must be a multiple of 4"):
        Trainer(config, settings, data_of(24), PREPROCESSING, torch.device("cpu"), Shard(0, 2))


@pytest.mark.parametrize(
    "config", [replace(CONFIG, moe=replace(HEAVY, group_images=2)), DENSE], ids=["groups of two images", "dense"]
)
def test_two_processes_under_torchrun_train_as_one_does_with_the_same_batch(
    tmp_path: Path, config: ModelConfig
) -> None:
    write_idx(tmp_path / "data", "train", data_of(24))
    write_idx(tmp_path / "data", "t10k", data_of(12, seed=1))
    assert train(tmp_path, settings=SETTINGS, config=config).exit_code == 0  # writes config.json, too
    arguments = [
        "--data", tmp_path / "data", "--config", tmp_path / "config.json", "--output", tmp_path / "two",
        *SETTINGS.split(),
    ]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vmoe", "train"]
    # The loopback device by name: gloo would look up the host's name, which not every container can.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("run", "two")
    )
    assert len(two) == 2  # one process writes
    for expected, found in zip(one, two, strict=True):
        for name in ("loss", "auxiliary_loss", "train_accuracy", "learning_rate"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    before = load_checkpoint(tmp_path / "run" / "checkpoint").state
    after = load_checkpoint(tmp_path / "two" / "checkpoint").state
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-4)
