"""What does the gateway cost in front of Triton? `python -m tests.benchmarks.triton_overhead [BUNDLE]`.

Starts a real Triton server with one instance and a gateway as a process of its own, and asks both for the same images
at the full point, from this process: `tritonclient` to the server, HTTP with PNG files to the gateway. Requests take
turns for latency, slices of seconds for throughput. Then the gateway's backend asks with images in shared memory and in
the message, in turns.
"""

from __future__ import annotations

import asyncio
import io
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton_client
from PIL import Image
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import track
from rich.table import Table

from exporter.bundle import Bundle
from exporter.measure import sample_images
from server.backends.base import Batch
from server.backends.triton.backend import TritonBackend
from server.backends.triton.connect import connect
from server.metrics import BackendMetrics
from tests.triton_server import TritonServer, free_port, python_repository

SIZES = (1, 8, 16)
ROUNDS = 300
CLIENTS, SLICES, SLICE_S, THROUGHPUT_SIZE = 4, 6, 2.0, 16
OUTPUTS = [triton_client.InferRequestedOutput(name) for name in ("logits", "kept", "expert_load")]
TYPES = {"uint8": "UINT8", "int64": "INT64"}

_T = TypeVar("_T")
Feeds = dict[str, npt.NDArray[Any]]


def main(directory: str = "model_repository/vmoe-fashion-mnist") -> None:
    bundle = Bundle.load(Path(directory))
    images = sample_images(bundle.manifest.preprocessing, None, max(SIZES))
    with (
        tempfile.TemporaryDirectory() as repository,
        TritonServer(python_repository(bundle.directory, Path(repository))) as server,
        serving(bundle, server.grpc_url) as url,
        httpx.Client(base_url=url, timeout=60) as gateway,
        triton_client.InferenceServerClient(server.grpc_url) as direct,
    ):
        Console().print(latencies(bundle, images, direct, gateway))
        Console().print(throughput(bundle, images, server.grpc_url, url))
        Console().print(shared_inputs(bundle, images, server.grpc_url))


def latencies(bundle: Bundle, images: npt.NDArray[np.uint8], direct: Any, gateway: httpx.Client) -> Table:
    table = Table(
        "images", "direct, ms", "gateway, ms", "added, ms", "of which decode and queue, ms", title="median latency"
    )
    for size in SIZES:
        inputs, files = tensors(feeds(bundle, images[:size])), multipart(images[:size])
        times: dict[str, list[float]] = {"direct": [], "gateway": [], "stages": []}
        for _ in track(range(ROUNDS), f"latency of {size}"):
            times["direct"].append(timed(infer, direct, bundle, inputs)[0])
            seconds, stages_s = timed(classify, gateway, files)
            times["gateway"].append(seconds)
            times["stages"].append(stages_s)
        medians = {name: 1000 * statistics.median(values[ROUNDS // 10 :]) for name, values in times.items()}
        added = medians["gateway"] - medians["direct"]
        table.add_row(
            str(size), *(f"{value:.2f}" for value in (medians["direct"], medians["gateway"], added, medians["stages"]))
        )
    return table


def throughput(bundle: Bundle, images: npt.NDArray[np.uint8], grpc_url: str, url: str) -> Table:
    """Several clients that send one batch after the other, to the server and to the gateway in turns."""
    pixels = images[:THROUGHPUT_SIZE]

    def ask_server(stop: threading.Event, counts: list[int]) -> None:
        inputs = tensors(feeds(bundle, pixels))
        with triton_client.InferenceServerClient(grpc_url) as client:
            while not stop.is_set():
                infer(client, bundle, inputs)
                counts.append(len(pixels))

    def ask_gateway(stop: threading.Event, counts: list[int]) -> None:
        files = multipart(pixels)
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                classify(client, files)
                counts.append(len(pixels))

    rates: dict[str, list[float]] = {"direct": [], "gateway": []}
    for _ in track(range(SLICES), "throughput"):
        for name, ask in (("direct", ask_server), ("gateway", ask_gateway)):
            rates[name].append(rate(ask))
    ratios = [mine / theirs for mine, theirs in zip(rates["gateway"], rates["direct"], strict=True)]
    table = Table(
        "direct, images/s",
        "gateway, images/s",
        "ratio",
        "range",
        title=f"{CLIENTS} clients, {THROUGHPUT_SIZE} images each",
    )
    table.add_row(
        f"{statistics.median(rates['direct']):.0f}",
        f"{statistics.median(rates['gateway']):.0f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
    )
    return table


def shared_inputs(bundle: Bundle, images: npt.NDArray[np.uint8], url: str) -> Table:
    """The gateway's backend with and without its setting `triton_shared_memory`, in turns."""
    table = Table(
        "images",
        "in the message, ms",
        "in shared memory, ms",
        "ratio",
        title="median latency of a batch of the gateway's backend",
    )
    for size, (message_ms, shared_ms) in asyncio.run(_shared_inputs(bundle, images, url)).items():
        table.add_row(str(size), f"{message_ms:.2f}", f"{shared_ms:.2f}", f"{shared_ms / message_ms:.3f}")
    return table


async def _shared_inputs(bundle: Bundle, images: npt.NDArray[np.uint8], url: str) -> dict[int, tuple[float, float]]:
    """By size, median milliseconds of images in the message and in shared memory."""
    medians = {}
    async with connected(bundle, url, 0) as plain, connected(bundle, url, max(SIZES)) as shared:
        for size in SIZES:
            arrays = feeds(bundle, images[:size])
            batch = Batch(arrays["images"], arrays["slots"], arrays["num_selected_experts"], explain=False)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in track(range(ROUNDS), f"shared memory, {size}"):
                for backend, seconds in zip((plain, shared), times, strict=True):
                    started_s = time.perf_counter()
                    await backend.infer(batch)
                    seconds.append(time.perf_counter() - started_s)
            message_s, shared_s = (statistics.median(seconds[ROUNDS // 10 :]) for seconds in times)
            medians[size] = 1000 * message_s, 1000 * shared_s
    return medians


@asynccontextmanager
async def connected(bundle: Bundle, url: str, shared_images: int) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(
        bundle.manifest,
        [url],
        timeout_s=60.0,
        probe_s=1.0,
        metrics=BackendMetrics(CollectorRegistry()),
        connect=partial(connect, shared_images=shared_images),
    )
    await backend.start(lambda: None)
    try:
        yield backend
    finally:
        await backend.close()


@contextmanager
def serving(bundle: Bundle, grpc_url: str) -> Iterator[str]:
    """The gateway in front of a server, ready."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--backend", "triton", "--triton-urls", grpc_url, "--port", str(port)]
    command += ["--model-repository", str(bundle.directory.parent), "--model", bundle.directory.name]
    command += ["--policy", "fixed", "--log-level", "warning"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_ready(url):
            assert process.poll() is None, "the gateway stopped"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def feeds(bundle: Bundle, images: npt.NDArray[np.uint8]) -> Feeds:
    point, rows = bundle.manifest.points[-1], len(images)
    return {
        "images": images,
        "slots": np.array([point.slots] * rows, np.int64),
        "num_selected_experts": np.full((rows, 1), point.num_selected_experts, np.int64),
    }


def tensors(arrays: Feeds) -> list[Any]:
    result = []
    for name, value in arrays.items():
        tensor = triton_client.InferInput(name, list(value.shape), TYPES[value.dtype.name])
        tensor.set_data_from_numpy(value)
        result.append(tensor)
    return result


def infer(client: Any, bundle: Bundle, inputs: list[Any]) -> None:
    client.infer(bundle.manifest.name, inputs, outputs=OUTPUTS).as_numpy("logits")


def multipart(images: npt.NDArray[np.uint8]) -> list[tuple[str, tuple[str, bytes, str]]]:
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
        files.append(("image", ("image.png", buffer.getvalue(), "image/png")))
    return files


def classify(client: httpx.Client, files: list[tuple[str, tuple[str, bytes, str]]]) -> float:
    """Returns what decoding and waiting in the queue took, in seconds."""
    response = client.post("/classify?budget=max&deadline_ms=10000", files=files)
    assert response.status_code == 200, response.text
    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    return (float(stages["decode"]) + float(stages["queue"])) / 1000


def timed(call: Callable[..., _T], *arguments: object) -> tuple[float, _T]:
    started_s = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - started_s, result


def rate(ask: Callable[[threading.Event, list[int]], None]) -> float:
    """Images per second over a slice."""
    stop, counts = threading.Event(), [[] for _ in range(CLIENTS)]  # type: tuple[threading.Event, list[list[int]]]
    threads = [threading.Thread(target=ask, args=(stop, count)) for count in counts]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(SLICE_S)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(map(sum, counts)) / (time.perf_counter() - started_s)


if __name__ == "__main__":
    main(*sys.argv[1:])
