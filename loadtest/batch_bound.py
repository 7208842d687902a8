"""The optimum over real batches for one worker and one class of requests, rounded up: a dynamic programme over time.

All requests have the same rungs and the same relative deadline D, so order of arrival is order of deadlines.

**Contiguity.** Some optimal schedule serves consecutive requests in every batch, from the first that is still in time:
1. If an earlier batch holds request j and a later one i < j, swap them: i is there at the start of the earlier batch
   (it arrived before j) and in time at its end; j is there at the later start and in time, its deadline being later.
   Rungs stay with the places in the batches, so no value changes. Served requests then lie in order of arrival.
2. A batch from s to e may hold exactly the requests with arrival <= s and deadline >= e, a run of consecutive ones.
   Should it skip one of them that nobody serves, the next one that it does serve can be replaced by it.
So what is left to decide after each batch is a function of the time t and the next request j alone:

    V(t, j) = max( V(t + 1, j),                            wait
                   V(t, j + 1),                            drop j
                   max over n, d of w(n, d) + V(t + d, j + n)
                       where j + n - 1 has arrived by t, and j is due no earlier than t + d )

w(n, d): the best mix of rungs for n images that takes at most d, by a knapsack over the positions in the batch.

**Rounding.** Times, durations, arrivals and deadlines are rounded down to a grid. Every real schedule has an image on
it: with s' = floor(s), d' = floor(d): s'_next >= floor(s + d) >= s' + d' keeps batches apart, floor(arrival) <= s' and
s' + d' <= floor(e) <= floor(deadline) keep windows. So the optimum on the grid is an upper bound. The grid step is the
one, near the wanted size, whose rounding flatters the throughput least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

# Grid steps in the shortest batch. On 10 s of the shipped bundle at 1.2x of its capacity, where rounding shows most,
# the bound is 0.9213, 0.9199, 0.9191 and 0.9189 with 4, 8, 16 and 32 steps; each doubling takes 2.2 times as long.
STEPS_PER_BATCH: Final = 16
_KNAPSACK_STEPS: Final = 40_000  # of the longest batch: rounding n positions down then costs n / 40,000 at most
_CHUNK_BLOCKS: Final = 4  # of the longest blocks, between two allocations: keeps the tables in the cache

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Choice:
    """Batches of one size.

    Attributes:
        shortest: steps that they take at least.
        worths: most that they are worth in `shortest`, `shortest + 1`, ... steps.
    """

    size: int
    shortest: int
    worths: tuple[float, ...]

    @property
    def longest(self) -> int:
        return self.shortest + len(self.worths) - 1


def batch_bound(
    arrival_s: Floats,
    deadline_s: float,
    rungs: Sequence[int],
    values: Floats,
    medians_s: Floats,
    *,
    steps_per_batch: int = STEPS_PER_BATCH,
    progress: Callable[[float], None] = lambda done: None,
) -> float:
    """Most value that one worker can earn.

    Arguments:
        arrival_s: (M,) ascending.
        deadline_s: from the arrival.
        rungs: at which an answer may be given.
        values: (P,) of an answer in time.
        medians_s: (P, N + 1) of n images at each rung; what the n-th adds does not descend in the rung.
        progress: called with the share that is done.
    """
    cheapest_s = medians_s[rungs[0]]
    largest = int(np.searchsorted(cheapest_s, deadline_s + 1e-9, side="right")) - 1
    if largest < 1:
        return 0.0
    step_s = _step_s(cheapest_s[1 : largest + 1], steps_per_batch)
    choices = _choices(np.diff(medians_s[:, : largest + 1], axis=1, prepend=0.0), rungs, values, step_s)
    # Rounding errors of the division must not shorten a window.
    arrivals = np.floor(arrival_s / step_s - 1e-9).astype(np.int64).clip(0)
    deadlines = np.floor((arrival_s + deadline_s) / step_s + 1e-9).astype(np.int64)
    return _solve(arrivals, deadlines, choices, progress)


def _step_s(batch_s: Floats, steps_per_batch: int) -> float:
    """The grid step near `batch_s[0] / steps_per_batch` that overstates images per second least.

    Arguments:
        batch_s: (N,) of batches of 1 to N images at the cheapest rung.
    """
    sizes = np.arange(1, len(batch_s) + 1)
    wanted_s = batch_s[0] / steps_per_batch
    candidates = wanted_s * np.linspace(0.8, 1.0, 401)
    rounded_s = np.floor(batch_s / candidates[:, None] - 1e-9) * candidates[:, None]
    return float(candidates[(sizes / rounded_s).max(axis=1).argmin()])


def _choices(increments: Floats, rungs: Sequence[int], values: Floats, step_s: float) -> list[_Choice]:
    """Every batch size with its durations in steps and the best mix of rungs for each."""
    fine_s = float(increments[rungs[-1]].sum()) / _KNAPSACK_STEPS
    fine = np.floor(increments / fine_s - 1e-9).astype(np.int64).clip(0)
    length = int(fine[rungs[-1]].sum()) + 1
    # best[k][x]: most value of the images so far, in x fine steps, the last of them at rung k of `rungs` or above.
    best = np.zeros((len(rungs), length))
    choices = []
    for size in range(1, increments.shape[1]):
        placed = np.full_like(best, -np.inf)
        for k, rung in enumerate(rungs):
            took = int(fine[rung, size])
            placed[k, took:] = best[k, : length - took] + values[rung]
        best = np.maximum.accumulate(placed[::-1], axis=0)[::-1]
        worth = np.maximum.accumulate(best[0])
        first = int(increments[rungs[0], 1 : size + 1].sum() / step_s - 1e-9)
        last = int(increments[rungs[-1], 1 : size + 1].sum() / step_s - 1e-9)
        # What takes less than one step more is counted as taking this many.
        ends = [min(int((steps + 1) * step_s / fine_s) + 1, length - 1) for steps in range(first, last + 1)]
        choices.append(_Choice(size, max(first, 1), tuple(worth[ends].tolist())))
    return choices


def _solve(arrivals: Ints, deadlines: Ints, choices: Sequence[_Choice], progress: Callable[[float], None]) -> float:
    """V(0, 0). Backwards in time, in chunks whose table is (times, next request) with a shifting first column."""
    groups = _groups(choices)
    block, longest = groups[-1][0], max(choice.longest for choice in choices)
    chunk = _CHUNK_BLOCKS * block
    num_chunks = int(deadlines[-1]) // chunk + 1
    later: _Table | None = None
    for number in range(num_chunks - 1, -1, -1):
        progress(1 - (number + 1) / num_chunks)
        table = _Table(arrivals, deadlines, number * chunk, chunk, longest, choices[-1].size)
        table.continue_from(later)
        _fill(table, groups)
        later = table
    assert later is not None
    return float(later.values[0, 0])


def _groups(choices: Sequence[_Choice]) -> list[tuple[int, list[_Choice]]]:
    """Batch sizes by duration, with the number of times that can be worked out at once for each: 2^k shortest batches.

    A block of times no longer than a batch depends on later times alone, and one numpy call then serves many times.
    """
    base = choices[0].shortest
    groups: dict[int, list[_Choice]] = {base: []}
    for choice in choices:
        block = base
        while 2 * block <= choice.shortest:
            block *= 2
        groups.setdefault(block, []).append(choice)
    return sorted(groups.items())


class _Table:
    """V for the times of a chunk, and for those after it that its batches reach.

    Attributes:
        values: (times, requests) V; -inf where it was not worked out, which nothing asks for.
        due: (times, requests) 0 where the request may still be in a batch that ends then, else -inf.
        arrived: (times, requests) 0 where the requests before this one have arrived, else -inf.
        low, high: (times,) first and last column that somebody may ask for.
        first: request of column 0; start: time of row 0; chunk: rows of the chunk itself.
    """

    def __init__(self, arrivals: Ints, deadlines: Ints, start: int, chunk: int, longest: int, largest: int) -> None:
        times = np.arange(start, start + chunk + longest + 1)
        self.start, self.chunk = start, chunk
        low = np.searchsorted(deadlines, times)  # requests that are overdue
        high = np.searchsorted(arrivals, times, side="right")  # requests that have arrived
        self.first = int(low[0])
        self.low, self.high = low - self.first, np.maximum(high, low) - self.first
        columns = np.arange(int(self.high[-1]) + largest + 2)
        self.values = np.full((len(times), len(columns)), -np.inf)
        self.due = np.where(columns >= self.low[:, None], 0.0, -np.inf)
        self.arrived = np.where(columns <= self.high[:, None], 0.0, -np.inf)

    def continue_from(self, later: _Table | None) -> None:
        """Takes over what was worked out for the times after the chunk; nothing can be earned after the last one."""
        if later is None:
            self.values[self.chunk :] = 0.0
            return
        shift = later.first - self.first
        rows = len(self.values) - self.chunk
        width = min(later.values.shape[1], self.values.shape[1] - shift)
        self.values[self.chunk :, shift : shift + width] = later.values[:rows, :width]


def _fill(table: _Table, groups: Sequence[tuple[int, list[_Choice]]]) -> None:
    base = groups[0][0]
    for stop in range(table.chunk, 0, -base):
        for block, choices in groups:
            if stop % block == 0:
                for choice in choices:
                    _try_batches(table, choice, stop - block, stop)
        values = table.values
        left, right = int(table.low[stop - base]), int(table.high[stop - 1]) + 1
        for row in range(stop - 1, stop - base - 1, -1):
            waited = np.maximum(values[row, left:right], values[row + 1, left:right])
            values[row, left:right] = np.maximum.accumulate(waited[::-1])[::-1]


def _try_batches(table: _Table, choice: _Choice, start: int, stop: int) -> None:
    """Raises V at rows `start` to `stop` to what a batch of one size gives."""
    size, values = choice.size, table.values
    left, right = int(table.low[start + choice.shortest]), int(table.high[stop - 1]) + 1 - size
    if left >= right:
        return
    ends = slice(start + choice.shortest, stop + choice.longest)
    after = values[ends, left + size : right + size] + table.due[ends, left:right]
    best = after[: stop - start] + choice.worths[0]
    candidate = np.empty_like(best)
    for extra, worth in enumerate(choice.worths[1:], 1):
        np.add(after[extra : extra + stop - start], worth, out=candidate)
        np.maximum(best, candidate, out=best)
    best += table.arrived[start:stop, left + size : right + size]
    np.maximum(values[start:stop, left:right], best, out=values[start:stop, left:right])
