"""Times of several things side by side, in rounds, so that what the machine does meanwhile meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

SHORTEST_S: Final = 0.02  # a sample repeats a run that is shorter
SETTLE_S: Final = 0.05

Call = Callable[[], object]


def sample_s(call: Call, shortest_s: float = SHORTEST_S) -> float:
    """Seconds of one run, from as many as fill `shortest_s`."""
    count, start_s = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start_s < shortest_s:
        call()
        count += 1
    return (time.perf_counter() - start_s) / count


def times_s(
    calls: Sequence[Call],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    *,
    call_s: float = float("inf"),
    shortest_s: float = SHORTEST_S,
    settle_s: float = SETTLE_S,
) -> list[list[float]]:
    """Samples of every call, in seconds. The round before the first is not timed: it compiles and warms up.

    Threads spin for a while after a run, and take the cores of whatever runs next. So a short call runs untimed for
    `settle_s` first; a long one loses little. Sessions of ONNX Runtime that run in turn must be opened as not `alone`.

    Arguments:
        advance: called after each turn of each call.
        call_s: a call that has been timed for as long leaves the rounds.
        shortest_s: see `sample_s`.
    """
    samples: list[list[float]] = [[] for _ in calls]
    spent_s, last_s = [0.0 for _ in calls], [0.0 for _ in calls]
    for turn in range(rounds + 1):
        for place, call in enumerate(calls):
            start_s = time.perf_counter()
            if turn == 0:
                call()
                last_s[place] = time.perf_counter() - start_s
            elif not samples[place] or spent_s[place] < call_s:
                while last_s[place] < settle_s and time.perf_counter() - start_s < settle_s:
                    call()
                last_s[place] = sample_s(call, shortest_s)
                samples[place].append(last_s[place])
                spent_s[place] += time.perf_counter() - start_s
            advance()
    return samples
