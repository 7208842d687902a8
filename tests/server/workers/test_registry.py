"""Series over processes. They change prometheus_client as a whole, so each has a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from server.workers.registry import forget

# Counts, sets gauges, and prints what a scrape gives.
PROGRAM = """
import sys
from pathlib import Path
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from server.workers.registry import SharedRegistry

directory, number, amount = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
registry = SharedRegistry(Path(directory), number)
Counter("answers", "Answers.", registry=registry).inc(amount)
Histogram("seconds", "Times.", buckets=(1.0, 2.0), registry=registry).observe(amount)
for name, mode in (("waiting", "livesum"), ("oldest", "livemax")):
    gauge = Gauge(name, "Read.", registry=registry, multiprocess_mode=mode)
    registry.on_refresh(lambda gauge=gauge: gauge.set(amount))
print(generate_latest(registry).decode())
"""


def work(directory: Path, number: int, amount: float) -> set[str]:
    """One worker's life; its last scrape."""
    command = [sys.executable, "-c", PROGRAM, str(directory), str(number), str(amount)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    return {line for line in done.stdout.splitlines() if not line.startswith("#")}


def test_collect_when_there_are_two_then_counters_and_histograms_and_gauges_are_those_of_both(tmp_path: Path) -> None:
    assert work(tmp_path, 1, 0.5) >= {"answers_total 0.5", "waiting 0.5", "oldest 0.5"}
    assert work(tmp_path, 2, 1.5) >= {
        "answers_total 2.0",
        'seconds_bucket{le="1.0"} 1.0',
        'seconds_bucket{le="2.0"} 2.0',
        "seconds_sum 2.0",
        "waiting 2.0",
        "oldest 1.5",
    }


def test_collect_when_a_worker_has_died_then_what_it_counted_stays_and_its_gauges_do_not(tmp_path: Path) -> None:
    work(tmp_path, 1, 0.5)
    forget(tmp_path, 1)
    assert work(tmp_path, 2, 0.25) >= {"answers_total 0.75", "waiting 0.25", "oldest 0.25"}


def test_collect_when_a_worker_is_replaced_then_it_counts_on_in_the_same_files(tmp_path: Path) -> None:
    work(tmp_path, 1, 0.5)
    files = sorted(tmp_path.iterdir())
    assert work(tmp_path, 1, 0.25) >= {"answers_total 0.75", "seconds_count 2.0", "waiting 0.25"}
    assert sorted(tmp_path.iterdir()) == files
