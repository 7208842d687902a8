"""The true optimum of a small trace, by trying everything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, product

from server.latency import LatencyModel

# (arrival_s, deadline_s, rungs at which it may be answered)
Ask = tuple[float, float, tuple[int, ...]]


def optimum(asks: Sequence[Ask], values: Sequence[float], latency: LatencyModel, workers: int = 1) -> float:
    """Most value of answers in time over all batches, orders, waiting, drops and rungs.

    Starting every batch as soon as its worker is free and its images are there loses nothing: no later batch starts
    later for it. So every schedule is a sequence of batches, each on some worker.
    """

    @cache
    def best(free_s: tuple[float, ...], left: frozenset[int]) -> float:
        found = 0.0  # dropping all that are left
        for size in range(1, min(len(left), latency.max_batch_size) + 1):
            for batch in combinations(sorted(left), size):
                there_s = max(asks[i][0] for i in batch)
                due_s = min(asks[i][1] for i in batch)
                rest = left - set(batch)
                for worker in range(workers):
                    start_s = max(free_s[worker], there_s)
                    for rungs in product(*(asks[i][2] for i in batch)):
                        end_s = start_s + latency.predict_s(rungs)
                        if end_s <= due_s:
                            after = tuple(sorted((*free_s[:worker], *free_s[worker + 1 :], end_s)))
                            found = max(found, sum(values[rung] for rung in rungs) + best(after, rest))
        return found

    return best((0.0,) * workers, frozenset(range(len(asks))))
