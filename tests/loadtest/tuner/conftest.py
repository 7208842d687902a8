"""A trace short enough to be simulated in a tenth of a second, with a burst that makes policies differ."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.subject import Subject
from loadtest.trace import Trace
from loadtest.tuner.bench import Bench, Benches, benches


@pytest.fixture(scope="session")
def bursty(full_rate_hz: float) -> Trace:
    """2 s: half of what the full point holds, and twice that in every second quarter of a second."""
    generator = np.random.default_rng(7)
    times = [
        np.sort(generator.uniform(start, start + 0.25, round(0.25 * full_rate_hz * (0.5 + 1.5 * (index % 2)))))
        for index, start in enumerate(np.arange(0, 2, 0.25))
    ]
    return Trace.of(np.concatenate(times))


@pytest.fixture(scope="session")
def steps(subject: Subject, bursty: Trace) -> Benches:
    return benches(subject, bursty, (0.5, 1.0), seed=3, noise_seeds=1, held_out=0.25, workers=1, max_batch_size=None)


@pytest.fixture(scope="session")
def bench(steps: Benches) -> Bench:
    return steps.searched
