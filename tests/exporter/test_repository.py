"""Bundles of large models and of narrow weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import exporter.export
from exporter.bundle import Bundle, BundleError
from exporter.session import open_session, run
from tests.exporter.test_cli_reference import export
from tests.vmoe.upstream import Case


def test_weights_of_a_large_model_lie_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("dense_vit")
    assert export(tmp_path / "inline", case.prefix, "--input", "float32").exit_code == 0
    write_bundle = exporter.export.write_bundle
    monkeypatch.setattr(exporter.export, "write_bundle", lambda *args: write_bundle(*args, inline_bytes=1000))
    assert export(tmp_path / "external", case.prefix, "--input", "float32").exit_code == 0
    inline, external = (Bundle.load(tmp_path / name / "model") for name in ("inline", "external"))
    assert sorted(inline.manifest.files) == ["1/model.onnx"]
    assert sorted(external.manifest.files) == ["1/model.onnx", "1/model.onnx.data"]
    assert external.model_path.stat().st_size < inline.model_path.stat().st_size / 2
    answers = [run(open_session(b.model_path, 1), case.inputs, None, ["logits"])[0] for b in (inline, external)]
    np.testing.assert_array_equal(*answers)

    weights = external.directory / "1" / "model.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(BundleError, match=r"model\.onnx\.data has SHA-256"):
        Bundle.load(external.directory)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_halve_the_file_and_answer_as_the_rounded_model(tmp_path: Path, dtype: str) -> None:
    case = Case("token_k2")
    assert export(tmp_path, case.prefix).exit_code == 0
    full = (tmp_path / "model" / "1" / "model.onnx").stat().st_size
    result = export(tmp_path, case.prefix, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(tmp_path / "model")
    assert bundle.manifest.weights == dtype
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.max_abs_error < 1e-4
    assert bundle.model_path.stat().st_size < 0.6 * full
