from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from server.queue import BatchQueue, Entry, Work


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Only to make futures; it never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def entry(loop: asyncio.AbstractEventLoop, arrival_s: float) -> Entry:
    return Entry(Work(np.zeros((1, 1, 1), np.uint8), (1,), 1, False), arrival_s, loop.create_future())


def test_queue_when_empty_then_nothing_is_due() -> None:
    queue = BatchQueue(2, 1.0)
    assert queue.due_s() is None
    assert queue.next_batch(now=100.0) == []


def test_queue_when_batch_is_not_full_then_it_waits_for_mates_until_the_window_closes(
    loop: asyncio.AbstractEventLoop,
) -> None:
    queue = BatchQueue(4, max_wait_s=1.0)
    first, second = entry(loop, 10.0), entry(loop, 10.9)
    queue.offer(first)
    queue.offer(second)
    assert queue.due_s() == 11.0  # the oldest decides
    assert queue.next_batch(now=10.99) == []
    assert queue.next_batch(now=11.0) == [first, second]
    assert queue.due_s() is None


def test_queue_when_batch_is_full_then_it_leaves_at_once_in_order_of_arrival(loop: asyncio.AbstractEventLoop) -> None:
    queue = BatchQueue(2, max_wait_s=1.0)
    entries = [entry(loop, 10.0) for _ in range(3)]
    for each in entries:
        queue.offer(each)
    assert queue.next_batch(now=10.0) == entries[:2]
    assert queue.next_batch(now=10.0) == []
    assert queue.clear() == entries[2:]


def test_queue_when_an_entry_is_discarded_then_the_others_keep_their_order(loop: asyncio.AbstractEventLoop) -> None:
    queue = BatchQueue(2, max_wait_s=0.0)
    first, second, third = (entry(loop, float(i)) for i in range(3))
    for each in (first, second, third):
        queue.offer(each)
    queue.discard(second)
    queue.discard(second)  # twice does no harm
    assert queue.next_batch(now=3.0) == [first, third]
