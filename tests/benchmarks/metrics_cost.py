"""What counting costs a request, in one process and among several workers: `python -m tests.benchmarks.metrics_cost`.

Everything that a gateway counts for a batch of answered images, with values in memory as a single gateway has them and
in mapped files as workers have them (`server.workers.registry`), in turns; and a scrape of either, where there is one
worker. Prints medians of the event loop's processor time. A few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from rich.console import Console
from rich.table import Table

from loadtest.subject import Subject
from server.backends.base import Outputs
from server.decision import Batch
from server.metrics import Metrics
from server.policy_file import default_policy
from server.work import Inference
from server.workers.registry import SharedRegistry
from tests.benchmarks.live_gateway import BUNDLE

BATCHES = (1, 8)
ROUNDS, REPEATS, SCRAPES = 15, 200, 10
_SECONDS = 0.004


def counting(subject: Subject, registry: CollectorRegistry, images: int) -> Callable[[], None]:
    """What is counted while `images` requests with an image each are answered in one batch."""
    moe, ladder = subject.manifest.architecture.moe, subject.ladder
    assert moe is not None
    metrics = Metrics(registry, moe)
    metrics.watch(subject.scheduler(default_policy(subject.manifest, ladder)), time.monotonic)
    layers = len(moe.layers)
    outputs = Outputs(
        logits=np.zeros((images, 10), np.float32),
        kept=np.ones((images, layers), np.float32),
        expert_load=np.full((images, layers, moe.num_experts), 12, np.int64),
        token_experts=None,
    )
    full = ladder.rungs[ladder.full]
    inference = Inference(
        classes=np.arange(10),
        probabilities=np.full(10, 0.1),
        kept=[1.0] * layers,
        token_experts=None,
        rung=full,
        reason="ceiling",
        degraded=False,
        deadline_met=True,
        queue_s=_SECONDS,
        inference_s=_SECONDS,
    )
    batch = Batch([], [], [], 0.0, _SECONDS, _SECONDS)

    def count() -> None:
        for _ in range(images):
            with metrics.request_in_flight():
                metrics.admitted("auto")
                metrics.answered("auto", inference)
                metrics.stages_done(inference, _SECONDS, _SECONDS)
            metrics.request_done("auto", 200, _SECONDS)
        metrics.decided(batch, _SECONDS)
        metrics.batch_done(batch, outputs, _SECONDS)

    return count


def cpu_us(call: Callable[[], object], repeats: int) -> float:
    """Of one call."""
    start_s = time.thread_time()
    for _ in range(repeats):
        call()
    return 1e6 * (time.thread_time() - start_s) / repeats


def in_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median of each."""
    rounds = [[cpu_us(call, repeats) for call in calls] for _ in range(ROUNDS + 1)][1:]
    return [median(each) for each in zip(*rounds, strict=True)]


def main() -> None:
    subject = Subject.load(BUNDLE)
    table = Table("", "one process, us", "a worker, us", "difference, us")
    with TemporaryDirectory() as directory:

        def registry(shared: bool, images: int) -> CollectorRegistry:
            """The values of its series are of the kind of the registry that was made last."""
            if not shared:
                return CollectorRegistry()
            own = Path(directory) / str(images)
            own.mkdir()
            return SharedRegistry(own, 1)

        registries, calls = {}, {}
        for shared in (False, True):
            for images in BATCHES:
                registries[shared, images] = registry(shared, images)
                calls[shared, images] = counting(subject, registries[shared, images], images)
        for images in BATCHES:
            single, worker = (
                each / images for each in in_turns([calls[way, images] for way in (False, True)], REPEATS)
            )
            row = f"counting, per request in batches of {images}"
            table.add_row(row, f"{single:.1f}", f"{worker:.1f}", f"{worker - single:.1f}")
        scrapes = [partial(generate_latest, registries[way, BATCHES[-1]]) for way in (False, True)]
        single, worker = in_turns(scrapes, SCRAPES)
        table.add_row("a scrape", f"{single:.0f}", f"{worker:.0f}", f"{worker - single:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
