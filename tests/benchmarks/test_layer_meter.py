"""The meter around functions that burn a known amount of processor time."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.benchmarks.layer_meter import GARBAGE, LayerMeter

BURN_NS = 20_000_000  # far above the clock's resolution and the meter's own time


def burn(times: int = 1) -> None:
    end_ns = time.thread_time_ns() + times * BURN_NS
    while time.thread_time_ns() < end_ns:
        pass


@pytest.fixture
def meter() -> Iterator[LayerMeter]:
    meter = LayerMeter()
    yield meter
    gc.callbacks.remove(meter._collecting)


def spent(meter: LayerMeter) -> dict[tuple[str, str], float]:
    """Multiples of `BURN_NS` by thread and layer."""
    return {(thread, layer): ns / BURN_NS for thread, layer, ns, _ in meter.snapshot()["layers"]}


def test_layer_when_it_calls_another_then_each_has_its_own_time(meter: LayerMeter) -> None:
    code = SimpleNamespace(inner=burn)

    def outer() -> None:
        burn()
        code.inner(2)
        burn()

    code.outer = outer
    meter.wrap("inner", code, "inner")
    meter.wrap("outer", code, "outer")
    code.outer()
    found = spent(meter)
    assert found["MainThread", "outer"] == pytest.approx(2, rel=0.2)
    assert found["MainThread", "inner"] == pytest.approx(2, rel=0.2)


def test_layer_when_a_coroutine_waits_then_only_its_steps_count(meter: LayerMeter) -> None:
    code = SimpleNamespace()

    async def half(turn: asyncio.Event, after: asyncio.Event) -> int:
        await turn.wait()
        burn()
        after.set()
        return 7

    code.half = half
    meter.wrap("half", code, "half")

    async def main() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        waiting = asyncio.create_task(code.half(first, second))
        await asyncio.sleep(0)
        burn(3)  # while it waits
        first.set()
        await second.wait()
        assert await waiting == 7

    asyncio.run(main())
    assert spent(meter)["MainThread", "half"] == pytest.approx(1, rel=0.2)


def test_layer_when_a_coroutine_is_cancelled_then_it_learns_of_it_and_the_layer_is_left(meter: LayerMeter) -> None:
    seen = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    code = SimpleNamespace(wait=wait)
    meter.wrap("wait", code, "wait")

    async def main() -> None:
        task = asyncio.create_task(code.wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == ["cancelled"]
    burn()
    assert spent(meter)["MainThread", "wait"] < 0.5


def test_layer_when_a_thread_runs_it_then_it_counts_there_as_the_kernel_says(meter: LayerMeter) -> None:
    code = SimpleNamespace(work=burn)
    meter.wrap("work", code, "work")
    snapshots = []

    def body() -> None:
        code.work(2)
        snapshots.append(meter.snapshot())

    thread = threading.Thread(target=body, name="worker_0")
    thread.start()
    thread.join()
    (snapshot,) = snapshots
    assert [(name, layer, calls) for name, layer, _, calls in snapshot["layers"] if layer == "work"] == [
        ("worker_0", "work", 1)
    ]
    assert snapshot["threads"]["worker_0"][0] == pytest.approx(2 * BURN_NS, rel=0.2)


def test_garbage_collection_when_it_runs_inside_a_layer_then_it_counts_for_itself(meter: LayerMeter) -> None:
    def collect() -> None:
        for _ in range(20):
            gc.collect()

    code = SimpleNamespace(collect=collect)
    meter.wrap("caller", code, "collect")
    code.collect()
    found = {layer: (spent_ns, calls) for _, layer, spent_ns, calls in meter.snapshot()["layers"]}
    assert found[GARBAGE][1] == 20
    assert found[GARBAGE][0] > 10 * found["caller"][0]  # thousands of objects to look at, against 20 calls
