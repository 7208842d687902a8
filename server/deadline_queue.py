"""Waiting requests, earliest deadline first; equal deadlines in order of arrival.

Parallel lists, because decisions read columns.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

from server.budgets import Budget
from server.policies.base import Kind

_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class Request:
    """One image that waits for its turn. Times are absolute, on the clock of whoever calls the scheduler.

    Attributes:
        arrival_s: when it was received.
        deadline_s: when its answer is due.
        budget: the class under which it counts.
        floor, ceiling: rungs between which it may be served; equal for a pinned point.
        size_bytes: memory that it holds while it waits.
        pinned: the client chose the point.
        payload: what the caller wants back with the batch.
    """

    arrival_s: float
    deadline_s: float
    budget: Budget
    floor: int
    ceiling: int
    size_bytes: int = 0
    pinned: bool = False
    payload: Any = None

    @property
    def kind(self) -> Kind:
        return Kind(self.floor, self.ceiling, self.budget.weight)


class DeadlineQueue:
    """Attributes:
    requests, deadlines, floors, kinds: columns, in order; read-only for others.
    waiting: requests of each kind.
    size_bytes: what the requests hold.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.deadlines: list[float] = []
        self.floors: list[int] = []
        self.kinds: list[Kind] = []
        self.waiting: Counter[Kind] = Counter()
        self.size_bytes = 0
        self._floors: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def uniform_floor(self) -> int | None:
        """The floor that all requests share, None where they differ."""
        return next(iter(self._floors)) if len(self._floors) == 1 else None

    @property
    def heaviest_floor(self) -> int:
        """The costliest floor of a queue that is not empty."""
        return max(self._floors)

    def insert(self, request: Request) -> int:
        """Returns the position."""
        position, kind = bisect_right(self.deadlines, request.deadline_s), request.kind
        self.requests.insert(position, request)
        self.deadlines.insert(position, request.deadline_s)
        self.floors.insert(position, request.floor)
        self.kinds.insert(position, kind)
        self.waiting[kind] += 1
        self._floors[request.floor] += 1
        self.size_bytes += request.size_bytes
        return position

    def take(self, start: int, stop: int) -> list[Request]:
        """Removes and returns the requests at these positions."""
        taken = self.requests[start:stop]
        for request, kind in zip(taken, self.kinds[start:stop], strict=True):
            _decrement(self.waiting, kind)
            _decrement(self._floors, request.floor)
            self.size_bytes -= request.size_bytes
        del self.requests[start:stop], self.deadlines[start:stop], self.floors[start:stop], self.kinds[start:stop]
        return taken

    def find(self, request: Request) -> int | None:
        """Its position; None when it has left."""
        for position in range(bisect_left(self.deadlines, request.deadline_s), len(self.requests)):
            if self.requests[position] is request:
                return position
            if self.deadlines[position] > request.deadline_s:
                break
        return None


def _decrement(counts: Counter[_T], key: _T) -> None:
    """Counters keep zeros; here the keys are what occurs."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
