"""Does an image in a mixed batch cost its own share of work? `python -m tests.benchmarks.mixed_batches [BUNDLE]`.

Times batches of one operating point and seeded mixtures of several, interleaved in one run, and compares each mixture
with what `server.latency` predicts from the former, and with a batch of the same size at its costliest point.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from exporter.bundle import Bundle, frontier
from exporter.measure import sample_images
from exporter.session import open_session
from server.latency import LatencyModel

SIZES = (1, 2, 4, 8, 16, 32)
MIXTURES = 6  # of each size
ROUNDS = 60


def main(directory: str = "model_repository/vmoe-fashion-mnist") -> None:
    bundle = Bundle.load(Path(directory))
    points = frontier(bundle.manifest.points)
    session = open_session(bundle.model_path)
    samples = sample_images(bundle.manifest.preprocessing, None, max(SIZES))
    generator = random.Random(0)
    uniform = [(rung,) * size for rung in range(len(points)) for size in SIZES]
    mixed = [tuple(generator.choices(range(len(points)), k=size)) for size in SIZES[1:] for _ in range(MIXTURES)]
    batches = list(dict.fromkeys(uniform + mixed))
    seconds: dict[tuple[int, ...], list[float]] = {batch: [] for batch in batches}
    for _ in track(range(ROUNDS), "rounds"):
        for batch in generator.sample(batches, len(batches)):
            feeds = {
                "images": samples[: len(batch)],
                "slots": np.array([points[rung].slots for rung in batch], np.int64),
                "num_selected_experts": np.array([[points[rung].num_selected_experts] for rung in batch], np.int64),
            }
            start = time.perf_counter()
            session.run(["logits", "kept", "expert_load"], feeds)
            seconds[batch].append(time.perf_counter() - start)
    median = {batch: statistics.median(times) for batch, times in seconds.items()}
    table = [[median[(rung,) * size] for size in SIZES] for rung in range(len(points))]
    model = LatencyModel(table, [0.05] * len(SIZES), SIZES, max(SIZES))
    result = Table("batch", "mixtures", "measured / predicted, median", "range", "measured / costliest, median")
    for size in SIZES[1:]:
        group = [batch for batch in dict.fromkeys(mixed) if len(batch) == size and len(set(batch)) > 1]
        ratios = [median[batch] / model.predict_s(batch) for batch in group]
        costliest = [median[batch] / model.uniform_s(max(batch), size) for batch in group]
        result.add_row(
            str(size),
            str(len(group)),
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            f"{statistics.median(costliest):.3f}",
        )
    Console().print(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
