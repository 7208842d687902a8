"""Packed weights: the same answers from mapped files, which are written once."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporter.bundle import Bundle
from exporter.packed_weights import MODEL, WEIGHTS
from server.backends.base import BackendError, Batch, Outputs
from server.backends.ort import OrtBackend


def infer(backend: OrtBackend, bundle: Bundle) -> Outputs:
    """Two images of noise, at the cheapest and at the full point."""
    points, shape = bundle.manifest.points, bundle.manifest.preprocessing.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 1), np.uint8)
    ends = (points[0], points[-1])
    slots = np.array([point.slots for point in ends], np.int64)
    selected = np.array([[point.num_selected_experts] for point in ends], np.int64)
    outputs = asyncio.run(backend.infer(Batch(images, slots, selected, explain=True)))
    asyncio.run(backend.close())
    return outputs


def mapped(path: Path) -> bool:
    return any(line.endswith(f" {path}") for line in Path("/proc/self/maps").read_text().splitlines())


def test_backend_when_weights_are_packed_then_it_answers_the_same_bytes_from_a_mapped_file(
    shipped: Bundle, tmp_path: Path
) -> None:
    plain = infer(OrtBackend(shipped, 1), shipped)
    for _ in ("writes", "reads"):
        backend = OrtBackend(shipped, 1, tmp_path / "packed")
        (folder,) = (tmp_path / "packed").iterdir()
        assert mapped(folder / WEIGHTS)
        outputs = infer(backend, shipped)
        for name in ("logits", "kept", "expert_load", "token_experts"):
            assert (getattr(outputs, name) == getattr(plain, name)).all(), name


def test_backend_when_packed_files_are_there_then_they_are_not_written_again(shipped: Bundle, tmp_path: Path) -> None:
    OrtBackend(shipped, 1, tmp_path)
    (folder,) = tmp_path.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    OrtBackend(shipped, 1, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_backend_when_the_bundle_s_files_change_then_it_packs_anew(shipped: Bundle, tmp_path: Path) -> None:
    OrtBackend(shipped, 1, tmp_path)
    changed = shipped.manifest.model_copy(update={"files": {"1/model.onnx": "another"}})
    OrtBackend(Bundle(shipped.directory, changed), 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_backend_when_two_start_at_once_then_one_packs_and_both_serve_and_nothing_else_is_left(
    shipped: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: infer(OrtBackend(shipped, 1, tmp_path), shipped), range(2))
    assert (first.logits == second.logits).all()
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted((MODEL, WEIGHTS))
    assert caplog.text.count("packing the weights of") == 1


def test_backend_when_the_runtime_writes_no_packed_weights_then_it_is_refused_with_its_version(
    shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    with pytest.raises(BackendError, match=r"needs ONNX Runtime 1\.21 or newer, this is 1\.20\.1"):
        OrtBackend(shipped, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_backend_when_the_directory_is_a_file_then_it_is_refused_by_name(shipped: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=f"packed_weights: cannot write {re.escape(os.fspath(tmp_path / 'file'))}"):
        OrtBackend(shipped, 1, tmp_path / "file")
