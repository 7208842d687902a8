from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.event_loop import EventLoop
from tests.server.test_classify import PNG, make_image


def test_clock_when_read_during_one_iteration_then_it_goes_on() -> None:
    async def read() -> list[float]:
        now = asyncio.get_running_loop().time
        return [now() for _ in range(100)]

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        times = runner.run(read())
    # Whatever the machine, two of a hundred readings are not the same microsecond.
    assert len(set(times)) > 2
    assert times == sorted(times)


@pytest.mark.parametrize("delay_s", [0.0, 0.0004, 0.0123])
def test_timer_when_set_by_the_clock_then_it_fires_within_the_loops_millisecond_of_its_time(delay_s: float) -> None:
    async def wait() -> float:
        loop = asyncio.get_running_loop()
        due_s, done = loop.time() + delay_s, loop.create_future()
        loop.call_at(due_s, done.set_result, None)
        await done
        return loop.time() - due_s

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        assert runner.run(wait()) > -0.001


def test_gateway_when_it_times_a_batch_then_it_is_finer_than_a_millisecond(client: Any) -> None:
    answers = [client.post("/classify", content=make_image(0), headers=PNG).json() for _ in range(5)]
    # To a whole millisecond once in a thousand, five times in a row never.
    assert any(answer["times"]["inference_ms"] % 1 for answer in answers)
