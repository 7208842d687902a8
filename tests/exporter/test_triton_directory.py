"""What `--triton-only` does to a bundle and to another model repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import exporter.triton_directory
from exporter.bundle import Bundle
from exporter.cli import app

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"
NAME = SHIPPED.name


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "repository" / NAME)
    return tmp_path / "repository"


def triton_only(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--triton-only", "--out", str(repository), "--name", NAME, *arguments])


def test_triton_only_writes_the_config_again_and_touches_neither_manifest_nor_graph(repository: Path) -> None:
    bundle = repository / NAME
    (bundle / "warmup" / "stale").write_bytes(b"")
    before = {name: (bundle / name).stat().st_mtime_ns for name in ("manifest.json", "1/model.onnx")}
    result = triton_only(repository, "--triton-device", "gpu", "--triton-instances", "2")
    assert result.exit_code == 0, result.output
    assert "instance_group [ { count: 2 kind: KIND_GPU } ]" in (bundle / "config.pbtxt").read_text()
    assert not (bundle / "warmup" / "stale").exists()
    assert {name: (bundle / name).stat().st_mtime_ns for name in before} == before
    Bundle.load(bundle)


def test_python_backend_adds_its_files_and_the_default_removes_them_again(repository: Path) -> None:
    modules = [repository / NAME / "1" / name for name in ("model.py", "packed_weights.py")]
    assert triton_only(repository, "--triton-backend", "python").exit_code == 0
    assert 'backend: "python"' in (repository / NAME / "config.pbtxt").read_text()
    for module in modules:
        compile(module.read_text(), str(module), "exec")
        assert "from exporter" not in module.read_text()
    assert triton_only(repository).exit_code == 0
    assert not any(module.exists() for module in modules)
    assert (repository / NAME / "config.pbtxt").read_text() == (SHIPPED / "config.pbtxt").read_text()


def test_other_repository_gets_a_whole_model_whose_graph_takes_no_space(repository: Path, tmp_path: Path) -> None:
    before = (repository / NAME / "config.pbtxt").read_text()
    result = triton_only(repository, "--triton-backend", "python", "--triton-repository", str(tmp_path / "other"))
    assert result.exit_code == 0, result.output
    written = tmp_path / "other" / NAME
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert [name for name in names if not name.startswith("warmup/")] == [
        "1/model.onnx",
        "1/model.py",
        "1/packed_weights.py",
        "config.pbtxt",
        "labels.txt",
        "manifest.json",
    ]
    assert (written / "1" / "model.onnx").samefile(repository / NAME / "1" / "model.onnx")
    assert (repository / NAME / "config.pbtxt").read_text() == before
    Bundle.load(written)


def test_graph_is_copied_where_the_file_system_links_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(exporter.triton_directory.os, "link", refuse)
    assert triton_only(repository, "--triton-repository", str(tmp_path / "other")).exit_code == 0
    Bundle.load(tmp_path / "other" / NAME)


def test_bundle_whose_graph_is_not_the_manifests_is_refused_before_anything_is_written(
    repository: Path, tmp_path: Path
) -> None:
    manifest = repository / NAME / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["1/model.onnx"] = "00" * 32
    manifest.write_text(json.dumps(content))
    result = triton_only(repository, "--triton-repository", str(tmp_path / "other"))
    assert result.exit_code == 1
    assert "export the bundle again" in result.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile-only",), "neither CHECKPOINT nor"),
        (("checkpoint",), "neither CHECKPOINT nor"),
        (("--triton-instances", "0"), "triton-instances"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    repository: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = triton_only(repository, *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--triton-packed-weights", "/var/cache"), "for the backend python on a cpu, got onnxruntime on a cpu"),
        (("--triton-packed-weights", "/c", "--triton-backend", "python", "--triton-device", "gpu"), "python on a gpu"),
        (("--triton-packed-weights", "cache", "--triton-backend", "python"), "must be absolute"),
    ],
)
def test_packed_weights_are_refused_where_triton_could_not_use_them(
    repository: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = triton_only(repository, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert (repository / NAME / "config.pbtxt").read_text() == (SHIPPED / "config.pbtxt").read_text()


def test_repository_for_triton_is_refused_without_triton_only(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--triton-repository", str(tmp_path), "--profile-only"])
    assert result.exit_code == 2
    assert "--triton-only" in result.output
