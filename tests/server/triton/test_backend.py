"""Endpoints on a virtual clock, with connections that do what a test tells them. `tests/triton` has real ones."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from exporter.bundle import Manifest
from server.backends.base import Batch, Outputs
from server.backends.fallback import FallbackBackend
from server.backends.triton.backend import TritonBackend
from server.backends.triton.contract import ServedModel
from server.backends.triton.failure import CallFailed, Reason
from server.errors import BackendUnavailable, DeadlineExceeded, InferenceFailed
from server.metrics import BackendMetrics
from tests.server.conftest import small_manifest
from tests.server.triton.test_contract import served
from tests.server.virtual_clock import VirtualClockLoop

PROBE_S, TIMEOUT_S = 1.0, 5.0


@dataclass
class ScriptedClient:
    """A server that takes 0.1 s for a batch. `failure` is what its calls end with, `hung` that they do not end.

    Attributes:
        batches: that it began.
        cancelled: of them.
    """

    model: ServedModel
    failure: Reason | None = None
    hung: bool = False
    batches: int = 0
    cancelled: int = 0
    limits: list[tuple[float, float]] = field(default_factory=list)
    prepared: list[tuple[int, bool]] = field(default_factory=list)
    cancellable: bool = True

    async def is_ready(self) -> bool:
        await self._answer(0.001)
        return True

    async def describe(self) -> ServedModel:
        await self._answer(0.001)
        return self.model

    async def infer(self, batch: Batch, timeout_s: float, queue_timeout_s: float) -> Outputs:
        self.batches += 1
        self.limits.append((timeout_s, queue_timeout_s))
        try:
            await self._answer(0.1)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        rows, layers = batch.slots.shape
        return Outputs(
            np.zeros((rows, 4), np.float32),
            np.ones((rows, layers), np.float32),
            np.zeros((rows, layers, 4), np.int64),
            None,
        )

    async def share_memory(self, batches: int, *, fresh: bool) -> None:
        self.prepared.append((batches, fresh))

    async def close(self) -> None:
        pass

    async def _answer(self, seconds: float) -> None:
        if self.failure in ("refused", "not_ready"):
            raise CallFailed(self.failure, "at once")
        await asyncio.sleep(math.inf if self.hung else seconds)
        if self.failure is not None:
            raise CallFailed(self.failure, "in the middle")


@dataclass
class Bench:
    """A started backend and the servers behind it."""

    backend: TritonBackend
    servers: list[ScriptedClient]
    registry: CollectorRegistry
    changes: list[int] = field(default_factory=list)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"vmoe_{name}", labels) or 0.0

    def failures(self, endpoint: int, reason: str) -> float:
        return self.value("endpoint_failures_total", endpoint=str(endpoint), reason=reason)

    async def serve(self) -> None:
        """Passes the trial of every endpoint."""
        for link in self.backend._links.values():
            await link.call(batch())


def run(scenario: Callable[[Bench], Awaitable[None]], servers: int = 2, model: ServedModel | None = None) -> None:
    async def main() -> None:
        clients = [ScriptedClient(model or replace(served(), parameters={})) for _ in range(servers)]
        unused = iter(clients)

        def connect(url: str, manifest: Manifest) -> ScriptedClient:
            return next(unused)

        registry = CollectorRegistry()
        urls = [f"host{position}:8001" for position in range(servers)]
        backend = TritonBackend(
            small_manifest(),
            urls,
            timeout_s=TIMEOUT_S,
            probe_s=PROBE_S,
            metrics=BackendMetrics(registry),
            connect=connect,
        )
        bench = Bench(backend, clients, registry)
        await backend.start(lambda: bench.changes.append(backend.num_workers))
        bench.changes.clear()
        await scenario(bench)
        await backend.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert [endpoint.in_flight for endpoint in backend.endpoints] == [0] * servers

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())


def batch(deadline_s: float = math.inf) -> Batch:
    return Batch(
        np.zeros((2, 8, 8, 1), np.uint8), np.ones((2, 1), np.int64), np.ones((2, 1), np.int64), False, 0.1, deadline_s
    )


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_start_when_servers_are_well_then_each_has_a_trial_and_then_its_instances() -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.backend.num_workers == 2
        await bench.serve()
        assert bench.backend.num_workers == 6
        assert bench.value("endpoint_window_batches", endpoint="0") == 3
        assert bench.value("endpoint_state", endpoint="0", state="closed") == 1

    run(scenario, model=replace(served(), parameters={}, instances=3))


def test_start_when_a_server_has_another_model_then_it_gets_nothing_until_that_is_mended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.backend.num_workers == 0
        await asyncio.sleep(10)
        # One line for the state, however many probes saw it.
        lines = [record.message for record in caplog.records if record.levelname == "ERROR"]
        assert len(lines) == 1
        assert "max_batch_size is 1, expected 8 or more" in lines[0]
        assert bench.failures(0, "mismatch") > 5
        bench.servers[0].model = replace(served(), parameters={})
        await asyncio.sleep(PROBE_S + 0.1)
        assert (bench.backend.num_workers, bench.changes) == (1, [1])

    run(scenario, servers=1, model=replace(served(), max_batch_size=1))


def test_infer_when_a_server_dies_in_the_middle_then_the_other_answers_and_it_counts_as_a_retry() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].failure = "connection"
        await bench.backend.infer(batch(now_s() + 1.0))
        assert bench.failures(0, "connection") == 1
        assert bench.value("endpoint_retries_total", endpoint="1") == 1
        assert bench.value("endpoint_batches_total", endpoint="1") == 2

    run(scenario)


def test_infer_when_the_deadline_leaves_no_time_for_a_second_try_then_503_at_once() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].failure = "connection"
        with pytest.raises(BackendUnavailable, match=r"failed \(connection\)"):
            await bench.backend.infer(batch(now_s() + 0.15))  # 0.1 are gone, 0.1 more are needed
        assert bench.servers[1].batches == 1  # the trial

    run(scenario)


def test_infer_when_both_servers_fail_then_there_is_no_third_try() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        for server in bench.servers:
            server.failure = "connection"
        with pytest.raises(BackendUnavailable):
            await bench.backend.infer(batch())
        assert [server.batches for server in bench.servers] == [2, 2]

    run(scenario)


def test_infer_when_the_model_fails_then_500_and_no_second_try() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].failure = "model"
        with pytest.raises(InferenceFailed):
            await bench.backend.infer(batch())
        assert bench.servers[1].batches == 1

    run(scenario)


def test_infer_when_the_queue_is_full_then_another_server_and_a_smaller_window() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].failure = "queue_full"
        await bench.backend.infer(batch())
        assert [endpoint.capacity for endpoint in bench.backend.endpoints] == [2, 4]
        assert bench.value("endpoint_state", endpoint="0", state="closed") == 1

    run(scenario, model=replace(served(), parameters={}, instances=4))


def test_infer_when_refused_then_the_endpoint_is_out_and_comes_back_by_probe_and_trial() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].failure = "refused"
        await bench.backend.infer(batch())
        assert (bench.backend.num_workers, bench.changes) == (1, [1])
        await asyncio.sleep(5)
        bench.servers[0].failure = None
        await asyncio.sleep(PROBE_S + 0.1)
        assert (bench.backend.num_workers, bench.changes) == (2, [1, 2])
        assert bench.value("endpoint_state", endpoint="0", state="half_open") == 1
        await bench.serve()
        assert bench.value("endpoint_state", endpoint="0", state="closed") == 1

    run(scenario)


def test_infer_when_nobody_is_left_then_503_without_a_call() -> None:
    async def scenario(bench: Bench) -> None:
        bench.servers[0].failure = "not_ready"
        await asyncio.sleep(2 * PROBE_S)
        assert bench.backend.num_workers == 0
        with pytest.raises(BackendUnavailable, match="no inference server is available"):
            await bench.backend.infer(batch())
        assert bench.servers[0].batches == 0

    run(scenario, servers=1)


def test_infer_when_the_server_hangs_then_504_a_little_after_the_deadline_and_three_of_them_open_the_breaker() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].hung = True
        for count in range(3):
            assert bench.backend.num_workers == 1, count
            started_s = now_s()
            with pytest.raises(DeadlineExceeded):
                await bench.backend.infer(batch(started_s + 0.2))
            assert now_s() - started_s == pytest.approx(0.25)
        assert bench.servers[0].limits[-1] == pytest.approx((0.25, 0.2))  # the client's, the server's queue's
        assert bench.backend.num_workers == 0
        assert bench.failures(0, "timeout") == 3

    run(scenario, servers=1)


def test_infer_when_a_batch_exceeds_the_timeout_but_not_its_deadline_then_503() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].hung = True
        bench.backend._links[bench.backend.endpoints[0]]._probe_s = 100  # probes notice nothing
        await asyncio.sleep(PROBE_S)
        started_s = now_s()
        with pytest.raises(BackendUnavailable, match="timeout"):
            await bench.backend.infer(batch())
        assert now_s() - started_s == pytest.approx(TIMEOUT_S)

    run(scenario, servers=1)


def test_probes_when_a_server_hangs_then_what_runs_on_it_is_tried_elsewhere_long_before_the_deadline() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].hung = True
        started_s = now_s()
        await bench.backend.infer(batch(now_s() + 4.5))
        # Probes begin within 1 s, take 1 s each, and two must fail, 1 s apart.
        assert now_s() - started_s <= 4.1
        assert bench.servers[0].cancelled == 1
        assert bench.failures(0, "hung") >= 1
        assert bench.backend.num_workers == 1
        bench.servers[0].hung = False
        await asyncio.sleep(PROBE_S + 0.1)
        assert bench.backend.num_workers == 2

    run(scenario)


def test_probes_when_one_is_missed_then_nothing_happens() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].hung = True
        await asyncio.sleep(2.1)  # the probe of 1 s has timed out
        bench.servers[0].hung = False
        await asyncio.sleep(5)
        assert (bench.backend.num_workers, bench.failures(0, "hung")) == (1, 0)

    run(scenario, servers=1)


def test_probes_when_a_server_comes_back_then_its_model_is_compared_again() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        bench.servers[0].failure = "refused"
        await asyncio.sleep(2 * PROBE_S)
        bench.servers[0].failure = None
        bench.servers[0].model = replace(served(), max_batch_size=2)
        await asyncio.sleep(2 * PROBE_S)
        assert (bench.backend.num_workers, bench.failures(0, "mismatch") > 0) == (0, True)

    run(scenario, servers=1)


def test_probes_when_a_server_was_away_then_shared_memory_is_prepared_anew() -> None:
    async def scenario(bench: Bench) -> None:
        (server,) = bench.servers
        assert server.prepared == [(6, True)]  # the most that the window of three instances grows to
        await bench.serve()
        await asyncio.sleep(PROBE_S + 0.1)
        assert server.prepared[1:] == [(6, False)]
        server.failure = "refused"
        await asyncio.sleep(2 * PROBE_S)
        server.failure = None
        await asyncio.sleep(PROBE_S + 0.1)
        assert server.prepared[2] == (6, True)

    run(scenario, servers=1, model=replace(served(), parameters={}, instances=3))


def test_infer_when_cancelled_then_the_call_is_and_the_place_is_free() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serve()
        task = asyncio.create_task(bench.backend.infer(batch()))
        await asyncio.sleep(0.05)
        assert bench.value("endpoint_in_flight_batches", endpoint="0") == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert bench.servers[0].cancelled == 1
        assert bench.value("endpoint_in_flight_batches", endpoint="0") == 0

    run(scenario, servers=1)


def test_cancellable_when_one_server_runs_on_with_what_is_cancelled_then_the_backend_is_not() -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.backend.cancellable
        bench.servers[1].cancellable = False
        assert not bench.backend.cancellable

    run(scenario)


class Embedded:
    """The engine in the process: one worker, no waiting."""

    num_workers, floors_only, cancellable = 1, False, False

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    async def start(self, changed: Callable[[], None]) -> None:
        pass

    async def infer(self, batch: Batch) -> Outputs:
        self.batches.append(batch)
        rows, layers = batch.slots.shape
        return Outputs(
            np.ones((rows, 4), np.float32), np.ones((rows, layers), np.float32), np.zeros((rows, layers, 4)), None
        )

    async def close(self) -> None:
        pass


def test_fallback_when_servers_serve_then_it_does_nothing_and_when_they_fail_it_runs_at_floors() -> None:
    async def scenario(bench: Bench) -> None:
        embedded = Embedded()
        both = FallbackBackend(bench.backend, embedded, bench.backend._metrics)
        await bench.serve()
        await both.infer(batch())
        assert (both.num_workers, both.floors_only, both.cancellable) == (1, False, True)
        assert not embedded.batches
        bench.servers[0].failure = "refused"
        await both.infer(batch(now_s() + 1.0))  # the server was thought to be well
        assert (both.num_workers, both.floors_only, both.cancellable) == (1, True, False)
        await both.infer(batch(now_s() + 1.0))
        assert len(embedded.batches) == bench.value("fallback_batches_total") == 2

    run(scenario, servers=1)


def test_fallback_when_the_model_fails_or_time_is_up_then_the_engine_is_not_asked() -> None:
    async def scenario(bench: Bench) -> None:
        embedded = Embedded()
        both = FallbackBackend(bench.backend, embedded, bench.backend._metrics)
        await bench.serve()
        bench.servers[0].failure = "model"
        with pytest.raises(InferenceFailed):
            await both.infer(batch())
        bench.servers[0].failure = None
        bench.servers[0].hung = True
        with pytest.raises(DeadlineExceeded):
            await both.infer(batch(now_s() + 0.2))
        assert not embedded.batches

    run(scenario, servers=1)


def test_close_then_no_connection_is_held_by_a_backend_that_others_still_hold() -> None:
    made: list[weakref.ref[ScriptedClient]] = []

    def connect(url: str, manifest: Manifest) -> ScriptedClient:
        client = ScriptedClient(replace(served(), parameters={}))
        made.append(weakref.ref(client))
        return client

    async def main() -> TritonBackend:
        backend = TritonBackend(
            small_manifest(),
            ["host:8001"],
            timeout_s=TIMEOUT_S,
            probe_s=PROBE_S,
            metrics=BackendMetrics(CollectorRegistry()),
            connect=connect,
        )
        await backend.start(lambda: None)
        await asyncio.sleep(2 * PROBE_S)
        await backend.close()
        return backend

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        backend = runner.run(main())
    gc.collect()
    assert [reference() for reference in made] == [None], f"{backend} holds it"
