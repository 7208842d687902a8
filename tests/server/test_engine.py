"""The engine around a backend that obeys the protocol, on the real event loop. Nothing sleeps: gates open and close."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from server.backends.base import Batch, Outputs
from server.engine import Engine
from server.errors import InferenceFailed, ShuttingDown
from server.metrics import Metrics
from server.queue import BatchQueue, Work
from vmoe.config import MoeConfig


class GatedBackend:
    """Class = first pixel. `started` tells that a batch is under way, `gate` lets it finish."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.started = asyncio.Semaphore(0)
        self.gate = asyncio.Event()
        self.failure: Exception | None = None
        self.poison = False

    async def infer(self, batch: Batch) -> Outputs:
        self.batches.append(batch)
        self.started.release()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        rows, layers = batch.slots.shape
        logits = np.zeros((rows, 4), np.float32)
        logits[np.arange(rows), batch.images[:, 0, 0, 0]] = np.nan if self.poison else 5
        experts = np.zeros((rows, layers, 5, 2), np.int64) if batch.explain else None
        return Outputs(logits, np.ones((rows, layers), np.float32), np.ones((rows, layers, 4), np.int64), experts)

    def close(self) -> None:
        raise AssertionError("the gateway closes the backend, not the engine")


def work(pixel: int, *, slots: int = 1, explain: bool = False) -> Work:
    return Work(np.full((8, 8, 1), pixel, np.uint8), (slots,), 1, explain)


def run(scenario: Callable[[Engine, GatedBackend], Awaitable[None]], max_batch_size: int = 4) -> None:
    """Runs a scenario on a started engine, closes it, and checks that it left no task behind."""

    async def main() -> None:
        backend = GatedBackend()
        engine = Engine(backend, BatchQueue(max_batch_size, 0.0), Metrics(CollectorRegistry(), MoeConfig(4, (1,))))
        engine.start()
        await scenario(engine, backend)
        backend.gate.set()
        await engine.close(drain_timeout_s=5)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def until_queued() -> None:
    """Lets every task that can run reach its next wait."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_engine_when_requests_come_while_a_batch_runs_then_they_share_the_next_one() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        first = asyncio.create_task(engine.infer(work(0)))
        await backend.started.acquire()
        others = [asyncio.create_task(engine.infer(work(pixel, slots=pixel))) for pixel in (1, 2, 3)]
        await until_queued()
        backend.gate.set()
        answers = await asyncio.gather(first, *others)
        assert [int(answer.logits.argmax()) for answer in answers] == [0, 1, 2, 3]
        assert [len(batch.images) for batch in backend.batches] == [1, 3]
        assert backend.batches[1].slots.tolist() == [[1], [2], [3]]  # each image keeps its own operating point

    run(scenario)


def test_engine_when_more_wait_than_fit_then_batches_are_full_and_in_order() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        tasks = [asyncio.create_task(engine.infer(work(pixel))) for pixel in (0, 1, 2, 3, 0)]
        await until_queued()
        backend.gate.set()
        await asyncio.gather(*tasks)
        pixels = [int(pixel) for batch in backend.batches for pixel in batch.images[:, 0, 0, 0]]
        assert pixels == [0, 1, 2, 3, 0]
        assert max(len(batch.images) for batch in backend.batches) <= 2

    run(scenario, max_batch_size=2)


def test_engine_when_client_cancels_in_the_queue_then_its_image_is_never_inferred() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        first = asyncio.create_task(engine.infer(work(0)))
        await backend.started.acquire()
        gone, stays = asyncio.create_task(engine.infer(work(1))), asyncio.create_task(engine.infer(work(2)))
        await until_queued()
        gone.cancel()
        await until_queued()
        backend.gate.set()
        await asyncio.gather(first, stays)
        assert gone.cancelled()
        assert backend.batches[1].images[:, 0, 0, 0].tolist() == [2]

    run(scenario)


def test_engine_when_client_cancels_while_its_batch_runs_then_mates_are_answered() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        blocker = asyncio.create_task(engine.infer(work(0)))
        await backend.started.acquire()
        gone, stays = asyncio.create_task(engine.infer(work(1))), asyncio.create_task(engine.infer(work(2)))
        await until_queued()
        backend.gate.set()
        await backend.started.acquire()
        gone.cancel()
        assert int((await stays).logits.argmax()) == 2
        await blocker

    run(scenario)


def test_engine_when_backend_fails_then_only_that_batch_fails() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        backend.failure = RuntimeError("secret detail")
        backend.gate.set()
        failed = await asyncio.gather(engine.infer(work(0)), engine.infer(work(1)), return_exceptions=True)
        assert all(isinstance(error, InferenceFailed) and "secret" not in str(error) for error in failed)
        backend.failure = None
        assert int((await engine.infer(work(3))).logits.argmax()) == 3

    run(scenario)


def test_engine_when_logits_are_not_finite_then_the_image_fails() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        backend.poison = True
        backend.gate.set()
        with pytest.raises(InferenceFailed, match="not finite"):
            await engine.infer(work(0))

    run(scenario)


def test_engine_when_one_of_a_batch_wants_explanation_then_the_others_get_none() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        backend.gate.set()
        plain, explained = await asyncio.gather(engine.infer(work(0)), engine.infer(work(1, explain=True)))
        assert plain.token_experts is None
        assert explained.token_experts is not None

    run(scenario)


def test_engine_when_nobody_wants_explanation_then_the_backend_is_not_asked() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        backend.gate.set()
        await engine.infer(work(0))
        assert [batch.explain for batch in backend.batches] == [False]

    run(scenario)


def test_close_when_images_wait_then_they_are_answered_and_new_ones_refused() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        waiting = [asyncio.create_task(engine.infer(work(pixel))) for pixel in (0, 1, 2)]
        await backend.started.acquire()
        closing = asyncio.create_task(engine.close(drain_timeout_s=5))
        await until_queued()
        with pytest.raises(ShuttingDown):
            await engine.infer(work(3))
        backend.gate.set()
        await closing
        assert [int((await task).logits.argmax()) for task in waiting] == [0, 1, 2]

    run(scenario)


def test_close_when_the_drain_limit_passes_then_the_rest_is_refused() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        running = asyncio.create_task(engine.infer(work(0)))
        await backend.started.acquire()
        queued = asyncio.create_task(engine.infer(work(1)))
        await until_queued()
        await engine.close(drain_timeout_s=0)  # the backend hangs: its gate stays shut
        outcomes = await asyncio.gather(running, queued, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ShuttingDown, ShuttingDown]

    run(scenario)


def test_engine_when_backend_is_busy_then_the_event_loop_is_free() -> None:
    async def scenario(engine: Engine, backend: GatedBackend) -> None:
        task = asyncio.create_task(engine.infer(work(0)))
        await backend.started.acquire()
        reached = threading.Event()
        asyncio.get_running_loop().call_soon(reached.set)
        await until_queued()
        assert reached.is_set()
        backend.gate.set()
        await task

    run(scenario)
