"""`python -m exporter` from checkpoints of the reference to bundles, and from broken ones to nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from exporter.bundle import Bundle
from exporter.cli import app
from exporter.session import open_session, run
from tests.vmoe.upstream import DIRECTORY, Case


def export(out: Path, *arguments: str | Path) -> Result:
    """One comparison and no latencies: what is tested here is the way from the file to the bundle."""
    quick = ["--out", str(out), "--name", "model", "--threads", "1", "--rounds", "0", "--parity-images", "8"]
    return CliRunner().invoke(app, [*map(str, arguments), *quick], env={"COLUMNS": "1000"})


def test_prefix_becomes_a_bundle_that_answers_as_the_reference(tmp_path: Path) -> None:
    case = Case("token_k2")
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"class {number}\n" for number in range(case.config.num_classes)))
    config = case.directory / "config.json"
    arguments = ("--config", config, "--labels", labels, "--group-images", "8", "--input", "float32")
    result = export(tmp_path / "repository", case.prefix, *arguments)
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(tmp_path / "repository" / "model")
    manifest = bundle.manifest
    assert manifest.labels[3] == "class 3"
    assert (manifest.preprocessing.mean, manifest.preprocessing.fit) == ((0.5, 0.5, 0.5), "stretch")
    assert manifest.provenance.checkpoint == "ckpt"
    full = next(p for p in manifest.points if p.operating_point == case.config.operating_point)
    logits = run(open_session(bundle.model_path, 1), case.inputs, full, ["logits"])[0]
    golden = np.load(case.directory / "golden_logits.npz")["as_configured"]
    assert np.abs(logits - golden).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "size", "selected"),
    [
        ("token_k2", ("--image-size", "64x32", "--routing", "vanilla"), (64, 32), 2),
        ("gap_k1_prelogits", ("--num-selected-experts", "1"), (64, 64), 1),
        ("map_head", ("--image-size", "48x32"), (48, 32), 2),
        ("expert_choice", ("--router", "items_per_expert", "--capacity-factor", "1.5"), (32, 32), 1),
        ("dense_vit", (), (32, 32), None),
    ],
)
def test_prefix_without_configuration_becomes_a_bundle(
    tmp_path: Path, name: str, options: tuple[str, ...], size: tuple[int, int], selected: int | None
) -> None:
    result = export(tmp_path, Case(name).prefix, *options)
    assert result.exit_code == 0, result.output
    manifest = Bundle.load(tmp_path / "model").manifest
    assert manifest.preprocessing.image_size == manifest.architecture.image_size == size
    assert [p.num_selected_experts for p in manifest.points][-1:] == ([] if selected is None else [selected])
    assert manifest.parity is not None
    assert manifest.parity.max_abs_error < 1e-4


def test_orbax_folder_becomes_a_bundle(tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    result = export(tmp_path, DIRECTORY / "token_k2_orbax" / "checkpoint")
    assert result.exit_code == 0, result.output
    assert Bundle.load(tmp_path / "model").manifest.architecture.moe is not None


def broken(case: Case, directory: Path, damage: str) -> Path:
    """A copy of a checkpoint in three data files, damaged."""
    shutil.copytree(case.prefix.parent, directory)
    prefix = directory / case.prefix.name
    shards = sorted(directory.glob("*.data-*"))
    if damage == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-100])
    elif damage == "missing":
        shards[2].unlink()
    elif damage == "shuffled":
        first, second = shards[0].read_bytes(), shards[1].read_bytes()
        shards[0].write_bytes(second)
        shards[1].write_bytes(first)
    elif damage == "not finite":
        data = bytearray(shards[0].read_bytes())
        start = len(data) // 2 // 4 * 4
        data[start : start + 64] = b"\xff" * 64
        shards[0].write_bytes(data)
    elif damage == "index":
        index = directory / f"{prefix.name}.index"
        index.write_bytes(index.read_bytes()[:-10])
    return prefix


@pytest.mark.parametrize("damage", ["truncated", "missing", "shuffled", "not finite", "index"])
def test_broken_checkpoint_leaves_nothing_in_the_repository(tmp_path: Path, damage: str) -> None:
    prefix = broken(Case("token_k2_sharded"), tmp_path / "checkpoint", damage)
    repository = tmp_path / "repository"
    repository.mkdir()
    result = export(repository, prefix)
    assert result.exit_code == 1
    assert f"error: {prefix}" in result.output  # the file at fault
    assert damage in ("missing", "index") or "parameter " in result.output
    assert list(repository.iterdir()) == []


def test_broken_checkpoint_leaves_the_bundle_that_was_there(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    assert export(repository, Case("dense_vit").prefix).exit_code == 0
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    prefix = broken(Case("token_k2_sharded"), tmp_path / "checkpoint", "truncated")
    assert export(repository, prefix).exit_code == 1
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_mismatch_with_the_configuration_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    result = export(tmp_path, Case("token_k2").prefix, "--config", DIRECTORY / "dense_vit" / "config.json")
    assert result.exit_code == 1
    assert "embedding/kernel has shape (8, 8, 3, 40), expected (8, 8, 3, 24)" in result.output
    assert list(tmp_path.iterdir()) == []


def test_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    result = export(tmp_path, tmp_path / "nothing")
    assert result.exit_code == 1
    assert "is no checkpoint" in result.output
