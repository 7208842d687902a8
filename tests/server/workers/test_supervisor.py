"""What is decided before any process starts; tests/e2e/test_workers.py has the processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings
from server.workers.supervisor import threads_of


@pytest.mark.parametrize(
    ("threads", "workers", "cores", "expected"), [(0, 2, 8, 4), (0, 3, 8, 2), (0, 4, 2, 1), (3, 4, 2, 3)]
)
def test_threads_of_a_worker_are_its_share_of_the_cores_unless_set(
    threads: int, workers: int, cores: int, expected: int
) -> None:
    assert threads_of(Settings(threads=threads, workers=workers), cores) == expected


def test_record_with_several_workers_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"record \(trace\.csv\) needs workers 1, got 2: a trace has one writer"):
        Settings(record=Path("trace.csv"), workers=2)
