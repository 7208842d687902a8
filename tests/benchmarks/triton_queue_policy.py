"""What does a queue policy cost in Triton? `python -m tests.benchmarks.triton_queue_policy [BUNDLE]`.

Two real servers with one instance and one thread each, without and with a timeout in config.pbtxt that nothing ever
reaches, are asked in turns, by one client and by two at once. Took 1 minute.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton_client
from rich.console import Console
from rich.progress import track
from rich.table import Table

from exporter.bundle import Bundle
from exporter.measure import sample_images
from exporter.triton_config import TritonOptions
from tests.benchmarks.triton_overhead import feeds, infer, tensors
from tests.triton_server import TritonServer, python_repository

SIZE, SLICES, SLICE_S = 4, 5, 2.0
TIMEOUT_S = 30.0
SLOW_S = 0.3  # no request takes that long by itself
POLICIES = {"none": 0.0, f"timeout {TIMEOUT_S:g} s": TIMEOUT_S}


def main(directory: str = "model_repository/vmoe-fashion-mnist") -> None:
    bundle = Bundle.load(Path(directory))
    inputs = tensors(feeds(bundle, sample_images(bundle.manifest.preprocessing, None, SIZE)))
    seconds: dict[tuple[str, int], list[float]] = {(name, clients): [] for name in POLICIES for clients in (1, 2)}
    with ExitStack() as stack:
        urls = {}
        for name, timeout_s in POLICIES.items():
            options = TritonOptions("python", threads=1, queue_timeout_s=timeout_s)
            repository = python_repository(
                bundle.directory, Path(stack.enter_context(tempfile.TemporaryDirectory())), options
            )
            urls[name] = stack.enter_context(TritonServer(repository)).grpc_url
        for _ in track(range(SLICES), "slices"):
            for name, clients in seconds:
                with ThreadPoolExecutor(clients) as pool:
                    for times in pool.map(lambda _, url=urls[name]: ask(url, bundle, inputs), range(clients)):
                        seconds[name, clients] += times
    table = Table("queue policy", "clients", "median, ms", "p99, ms", f"over {SLOW_S:g} s")
    for (name, clients), times in seconds.items():
        slow = sum(taken > SLOW_S for taken in times)
        median, p99 = statistics.median(times), np.percentile(times, 99)
        table.add_row(name, str(clients), f"{1000 * median:.1f}", f"{1000 * p99:.0f}", f"{slow} of {len(times)}")
    Console().print(table)


def ask(url: str, bundle: Bundle, inputs: list[Any]) -> list[float]:
    """One client for a slice; seconds of each request."""
    times = []
    with triton_client.InferenceServerClient(url) as client:
        infer(client, bundle, inputs)  # connects
        end_s = time.perf_counter() + SLICE_S
        while (started_s := time.perf_counter()) < end_s:
            infer(client, bundle, inputs)
            times.append(time.perf_counter() - started_s)
    return times


if __name__ == "__main__":
    main(*sys.argv[1:])
