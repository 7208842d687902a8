from __future__ import annotations

import asyncio

import pytest

from tests.server.virtual_clock import VirtualClockLoop


def test_clock_when_tasks_sleep_then_they_wake_in_order_at_their_exact_times() -> None:
    woken: list[tuple[float, str]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((asyncio.get_running_loop().time(), name))

    async def main() -> None:
        await asyncio.gather(sleeper("late", 1000.3), sleeper("early", 0.1), sleeper("later", 86_400.0))

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())
    assert woken == [(0.1, "early"), (1000.3, "late"), (86_400.0, "later")]


def test_clock_when_a_timeout_passes_then_it_fires() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await asyncio.sleep(4)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        assert runner.run(main()) == 3


def test_clock_when_nothing_can_happen_any_more_then_it_says_so() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    loop = VirtualClockLoop()
    with pytest.raises(RuntimeError, match="deadlock"):
        loop.run_until_complete(main())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
