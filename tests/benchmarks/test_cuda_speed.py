"""The benchmark for GPUs, as far as it goes without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer

from exporter.cuda import HalfProducts, PaddedLayers
from exporter.session import has_cuda
from tests.benchmarks.cuda_speed import Timed, bound, gflop, main, markdown
from tests.benchmarks.model_subjects import CHEAP, FULL, Subject, dense_gflop, feeds_of
from tests.exporter.models import SMALL


@pytest.mark.skipif(has_cuda(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        main(tmp_path, 1)
    assert "needs a CUDA device, onnxruntime-gpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bound_run_gives_the_logits_and_counts_kept_pairs(tmp_path: Path) -> None:
    subject = Subject("small", SMALL, tmp_path, 1, None)
    session = subject.session("cuda", PaddedLayers, products=HalfProducts())
    feeds = feeds_of(SMALL, 3, str(CHEAP))
    np.testing.assert_array_equal(bound(session, feeds, "cpu")(), session.run(["logits"], feeds)[0])
    least = dense_gflop(SMALL, 3, shortcut=True)
    assert least < gflop(session, subject, feeds) < gflop(session, subject, feeds_of(SMALL, 3, str(FULL)))


def test_page_has_throughput_and_the_share_of_the_products_rate() -> None:
    # 8 images in 4 ms are 2,000 per second; 200 GFLOP in 4 ms are 50 TFLOP/s of 100.
    page = markdown([Timed("B/16", 8, "cuda", str(FULL), 0.004, 200.0)], 100_000.0, "a machine")
    assert "| B/16 | 8 | cuda | (1.05, 2) | 4.00 | 2000 | 0.50 |" in page
