"""A bundle without weights and a machine whose latencies can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtest.report import PolicyUsed, Setup
from loadtest.subject import Subject
from loadtest.trace import Trace
from server.latency import LatencyModel

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"


@pytest.fixture(scope="session")
def subject() -> Subject:
    return Subject.load(SHIPPED)


@pytest.fixture(scope="session")
def full_rate_hz(subject: Subject) -> float:
    """What one worker holds at the full point, in batches of the largest size."""
    largest = subject.manifest.max_batch_size
    return largest / subject.latency().uniform_s(subject.ladder.full, largest)


@pytest.fixture
def setup(subject: Subject) -> Setup:
    return Setup(
        kind="simulated",
        policy=PolicyUsed(name="foresight", source="test"),
        bundle="bundle",
        manifest_sha256=subject.manifest_sha256,
        trace="trace",
        trace_sha256="0",
        workers=1,
        max_batch_size=32,
    )


def poisson_trace(rate_hz: float, duration_s: float, seed: int, *budgets: str) -> Trace:
    """Independent arrivals, of the budgets in turn by chance."""
    generator = np.random.default_rng(seed)
    times = np.sort(generator.uniform(0, duration_s, generator.poisson(rate_hz * duration_s)))
    names = budgets or ("auto",)
    return Trace.of(times, generator.integers(0, len(names), len(times)), names)


def machine_model(rungs: int = 3, largest: int = 3) -> LatencyModel:
    """Rung p takes (2 + n) * (1 + p / 10) ms for n images, profiled at every size."""
    sizes = range(1, largest + 1)
    median_s = [[(2 + size) * (1 + rung / 10) / 1000 for size in sizes] for rung in range(rungs)]
    return LatencyModel(median_s, np.full(largest, 0.05), list(sizes), largest)
