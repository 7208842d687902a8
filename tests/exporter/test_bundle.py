"""What is read back from disk, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporter.bundle import Bundle, BundleError, frontier
from exporter.cli import app
from tests.exporter.models import SMALL, random_checkpoint
from vmoe.checkpoint import save_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    arguments = [str(tmp_path / "checkpoint"), "--name", "tiny", "--out", str(tmp_path), "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--threads", "1"])
    assert result.exit_code == 0, result.output
    return tmp_path / "tiny"


def edit(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bundle_that_was_written_loads_with_everything_a_server_needs(directory: Path) -> None:
    bundle = Bundle.load(directory)
    assert bundle.manifest.architecture == SMALL
    assert bundle.manifest.labels == tuple(f"class {i}" for i in range(5))
    assert bundle.manifest.points[-1].operating_point == SMALL.operating_point
    assert frontier(bundle.manifest.points) == bundle.manifest.points  # nothing dominates without accuracies
    assert (directory / "labels.txt").read_text().splitlines() == list(bundle.manifest.labels)
    assert bundle.manifest.num_moe_layers == 2


def test_graph_that_was_changed_is_refused_with_both_hashes(directory: Path) -> None:
    with (directory / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"model.onnx has SHA-256 \w{64}, the manifest says \w{64}"):
        Bundle.load(directory)


def test_graph_that_is_missing_is_named(directory: Path) -> None:
    (directory / "1" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        Bundle.load(directory)


def test_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is .* a bundle"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 0}, "schema_version: Input should be 1, got 0"),
        ({"max_batch_size": "many"}, "max_batch_size: Input should be a valid integer, .*, got 'many'"),
        ({"labels": ["one"]}, "1 labels for 5 classes"),
        ({"points": []}, "a sparse model needs operating points"),
        ({"name": "../escape"}, "name"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(directory: Path, changes: dict[str, object], message: str) -> None:
    edit(directory, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.load(directory)


def test_manifest_with_several_errors_is_refused_in_one_line(directory: Path) -> None:
    edit(directory, max_batch_size=0, version=[1], points=[{"slots": "x" * 999}])
    with pytest.raises(BundleError) as refusal:
        Bundle.load(directory)
    message = str(refusal.value)
    assert "\n" not in message
    assert "https://" not in message
    assert "more)" in message
    assert len(message) < 300 + len(str(directory))


def test_manifest_of_a_newer_exporter_is_refused_as_such(directory: Path) -> None:
    edit(directory, schema_version=99, from_the_future=True)
    with pytest.raises(
        BundleError, match="written by a newer exporter: it has schema_version 99, this version reads 1"
    ):
        Bundle.load(directory)


def test_point_whose_slots_do_not_follow_from_it_is_refused(directory: Path) -> None:
    points = json.loads((directory / "manifest.json").read_text())["points"]
    points[0]["slots"] = [99, 99]
    edit(directory, points=points)
    with pytest.raises(BundleError, match=r"has slots \(99, 99\), expected"):
        Bundle.load(directory)


def test_manifest_that_names_a_file_outside_is_refused(directory: Path) -> None:
    (directory.parent / "secret").write_text("x")
    edit(directory, files={"../secret": "0" * 64})
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(directory)


def test_manifest_that_is_not_json_is_refused(directory: Path) -> None:
    (directory / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not a valid manifest"):
        Bundle.load(directory)


def test_bundle_and_profiler_import_neither_torch_nor_the_graph_builder() -> None:
    code = "import sys, exporter.cli; sys.exit(bool({'torch', 'onnx_ir', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
