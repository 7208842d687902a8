"""The schedule that admission promises: every request at its floor, earliest deadline first, in batches of one size."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

from server.deadline_queue import DeadlineQueue
from server.latency import LatencyModel

EPSILON_S: Final = 1e-9  # sums of floats in another order


def plan_excess_s(
    queue: DeadlineQueue, latency: LatencyModel, free_s: Sequence[float], start: int, limit_s: float, most: int
) -> float:
    """By how much the floor plan misses a deadline of the queue from position `start`; 0 when it meets all.

    Tries the plan size that suits the active classes, then the largest: a strict class that has just become active
    must not make late what was promised before.

    Arguments:
        free_s: when each worker becomes free.
        limit_s: of a batch that suits the active classes.
        most: images in a batch.
    """
    if start >= len(queue):
        return 0.0
    suitable = largest_within(latency, queue.heaviest_floor, limit_s, most)
    excess_s = delay_s(queue, latency, free_s, start, suitable)
    if excess_s and suitable != most:
        excess_s = delay_s(queue, latency, free_s, start, most)
    return excess_s


def delay_s(queue: DeadlineQueue, latency: LatencyModel, free_s: Sequence[float], start: int, size: int) -> float:
    """By how much the first request that misses its deadline would be late; 0 when the plan meets all.

    Every batch goes to the worker that is free first and takes the q-quantile of predicted latency. In a batch, the
    first request has the earliest deadline.

    Arguments:
        free_s: when each worker becomes free.
        start: of the queue's positions, the first to be planned.
        size: of a batch.
    """
    uniform = queue.uniform_floor
    if uniform is not None:
        return _uniform_delay_s(queue, latency, free_s, start, size, uniform)
    # A plan with everybody at the costliest floor takes no less time, and no look at every request.
    if not _uniform_delay_s(queue, latency, free_s, start, size, queue.heaviest_floor):
        return 0.0
    deadlines, floors, workers = queue.deadlines, queue.floors, sorted(free_s)
    for head in range(start, len(deadlines), size):
        end_s = workers[0] + latency.predict_s(floors[head : head + size], high=True)
        if end_s > deadlines[head] + EPSILON_S:
            return end_s - deadlines[head]
        heapq.heapreplace(workers, end_s)
    return 0.0


def _uniform_delay_s(
    queue: DeadlineQueue, latency: LatencyModel, free_s: Sequence[float], start: int, size: int, floor: int
) -> float:
    """As `delay_s`, with every request at one floor: all batches take the same time, but for the last."""
    deadlines, workers = queue.deadlines, sorted(free_s)
    total = len(deadlines)
    full_s = latency.uniform_s(floor, size, high=True)
    for head in range(start, total, size):
        batch_s = full_s if head + size <= total else latency.uniform_s(floor, total - head, high=True)
        end_s = workers[0] + batch_s
        if end_s > deadlines[head] + EPSILON_S:
            return end_s - deadlines[head]
        heapq.heapreplace(workers, end_s)
    return 0.0


def most_alone(latency: LatencyModel, rung: int, slack_s: float, workers: int, size: int) -> int:
    """Images at one rung that idle workers finish within `slack_s`, in batches of `size`; only the last is smaller."""
    full_s = latency.uniform_s(rung, size, high=True)
    rounds = max(int((slack_s + EPSILON_S) // full_s), 0)
    rest_s = slack_s - rounds * full_s + EPSILON_S
    last = largest_within(latency, rung, rest_s, size) if latency.uniform_s(rung, 1, high=True) <= rest_s else 0
    return workers * rounds * size + last


def largest_within(latency: LatencyModel, rung: int, limit_s: float, most: int) -> int:
    """The largest batch at one rung whose predicted q-quantile is within a limit; at least 1, at most `most`."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if latency.uniform_s(rung, middle, high=True) <= limit_s:
            low = middle
        else:
            high = middle - 1
    return low
