"""A small model without weights for tests of behaviour, and the shipped bundle behind a real server for the rest."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from exporter.bundle import Bundle, Manifest, Point, Provenance
from server.app import create_server
from server.backends.base import Backend, Batch, Outputs
from server.backends.choice import create_backend
from server.backends.ort import OrtBackend
from server.settings import Settings
from server.workers.link import Link
from vmoe.config import ModelConfig, MoeConfig
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing

REPOSITORY = Path(__file__).parents[2] / "model_repository"
SHIPPED = "vmoe-fashion-mnist"

Serve = Callable[..., AbstractContextManager[httpx.Client]]


class FakeBackend:
    """Answers with the class of the first pixel. `gate` holds batches back, `failure` makes them fail.

    Attributes:
        late: answer just after the batch's deadline.
        batches: those after the warm-up.
    """

    num_workers = 1
    floors_only = False
    cancellable = False

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.late = False
        self.closed = False

    async def start(self, changed: Callable[[], None]) -> None:
        pass

    async def infer(self, batch: Batch) -> Outputs:
        self.batches.append(batch)
        loop = asyncio.get_running_loop()
        if self.late:
            # Without an await, for then the gateway cannot give the batch up meanwhile, however slow the machine is.
            while loop.time() <= batch.deadline_s:
                os.sched_yield()
        else:
            await loop.run_in_executor(None, self.gate.wait)
        if self.failure is not None:
            raise self.failure
        rows, layers = batch.slots.shape
        logits = np.zeros((rows, 4), np.float32)
        logits[np.arange(rows), batch.images[:, 0, 0, 0] % 4] = 5
        return Outputs(
            logits=logits,
            kept=np.full((rows, layers), 0.5, np.float32),
            expert_load=np.full((rows, layers, 4), 2, np.int64),
            token_experts=np.full((rows, layers, 5, 2), -1, np.int64) if batch.explain and layers else None,
        )

    async def close(self) -> None:
        self.closed = True


def small_architecture(*, dense: bool = False) -> ModelConfig:
    """2 x 2 patches and a class token, S = 5; one MoE layer of E = 4 experts."""
    moe = None if dense else MoeConfig(num_experts=4, layers=(1,), capacity_factor=1.0)
    return ModelConfig((8, 8), (4, 4), 4, 8, 2, 16, 2, channels=1, moe=moe)


def small_manifest(*, dense: bool = False) -> Manifest:
    architecture = small_architecture(dense=dense)
    # (C, K, relative compute, accuracy, dominated); slots are ceil(5 * K * C / 4): 1, 1, 2, 3
    ladder = [
        (0.5, 1, 0.4, 0.80, False),
        (0.5, 2, 0.65, 0.79, True),
        (1.0, 1, 0.6, 0.85, False),
        (1.0, 2, 1, 0.9, False),
    ]
    points = [
        Point(
            capacity_factor=factor,
            num_selected_experts=experts,
            slots=architecture.slots(OperatingPoint(factor, experts)),
            relative_compute=compute,
            accuracy=accuracy,
            dominated=dominated,
        )
        for factor, experts, compute, accuracy, dominated in ladder
    ]
    return Manifest(
        name="small",
        architecture=architecture,
        preprocessing=Preprocessing((8, 8), 1, (0.5,), (0.5,)),
        labels=("a", "b", "c", "d"),
        input="uint8",
        weights="float32",
        max_selected_experts=0 if dense else 2,
        max_batch_size=8,
        points=() if dense else tuple(points),
        provenance=Provenance(checkpoint="none", checkpoint_sha256="", command="", date="", versions={}),
        files={},
    )


@contextmanager
def serving(
    bundle: Bundle,
    backend: Backend | None = None,
    /,
    *,
    wait: bool = True,
    models: Sequence[str] = (),
    link: Link | None = None,
    **values: object,
) -> Iterator[httpx.Client]:
    """A real server on a free port, warm unless told not to wait; stopped, with nothing left in flight, at the end.

    Arguments:
        backend: default: that of the settings.
        models: see `server.combine`.
        link: to a supervisor.
        values: of settings.
    """
    registry, settings = CollectorRegistry(), Settings(**values)  # type: ignore[arg-type]
    backend = backend or create_backend(settings, bundle, registry)
    server = create_server(settings, bundle, backend, registry, models, link)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            if wait:
                wait_ready(client)
            yield client
    finally:
        server.stop()
        thread.join(timeout=30)
        listener.close()
    assert not thread.is_alive()
    for name in ("vmoe_in_flight_requests", "vmoe_queue_images", "vmoe_running_batches"):
        assert not registry.get_sample_value(name), name


def wait_ready(client: httpx.Client) -> None:
    while client.get("/readyz").status_code != 200:
        os.sched_yield()


def ignores(pid: int, number: signal.Signals) -> bool:
    """A process a signal, as the kernel says."""
    (mask,) = re.findall(r"SigIgn:\t([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) & 1 << (number - 1))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def manifest() -> Manifest:
    return small_manifest()


@pytest.fixture
def dense_manifest() -> Manifest:
    return small_manifest(dense=True)


@pytest.fixture
def serve_fake(backend: FakeBackend, manifest: Manifest) -> Iterator[Serve]:
    """Starts a server around the fake backend, with any settings."""

    @contextmanager
    def serve(served: Manifest = manifest, *, wait: bool = True, **settings: object) -> Iterator[httpx.Client]:
        try:
            with serving(Bundle(Path("nowhere"), served), backend, wait=wait, **settings) as client:
                if wait:
                    backend.batches.clear()
                yield client
        finally:
            backend.gate.set()

    yield serve
    assert backend.closed


@pytest.fixture(scope="session")
def shipped() -> Bundle:
    return Bundle.load(REPOSITORY / SHIPPED)


@pytest.fixture(scope="session")
def client(shipped: Bundle) -> Iterator[httpx.Client]:
    """The shipped model, served. Limits are low enough to be reached by a test."""
    with serving(shipped, OrtBackend(shipped, threads=1), max_image_bytes=1 << 20, max_body_bytes=2 << 20) as client:
        yield client
