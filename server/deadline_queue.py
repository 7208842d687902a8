"""Waiting requests, earliest deadline first; equal deadlines in order of arrival.

Parallel lists, because decisions read columns.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

from server.budgets import Budget
from server.policies.base import Kind


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
        payload: what the caller wants back with the batch; dropped on cancellation.
    """

    arrival_s: float
    deadline_s: float
    budget: Budget
    floor: int
    ceiling: int
    size_bytes: int = 0
    pinned: bool = False
    payload: Any = None
    cancelled: bool = False

    @property
    def kind(self) -> Kind:
        return Kind(self.floor, self.ceiling, self.budget.weight)


class DeadlineQueue:
    """Attributes:
    requests, deadlines, floors, kinds: columns, in order; read-only for others.
    waiting: live requests of each kind.
    num_waiting: live requests.
    size_bytes: what the live requests hold.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.deadlines: list[float] = []
        self.floors: list[int] = []
        self.kinds: list[Kind] = []
        self.waiting: dict[Kind, int] = {}
        self.num_waiting = 0
        self.size_bytes = 0
        self._floor_counts: dict[int, int] = {}

    def __len__(self) -> int:
        """Positions, cancelled ones included."""
        return len(self.requests)

    @property
    def uniform_floor(self) -> int | None:
        """The floor that all positions share, None where they differ."""
        return next(iter(self._floor_counts)) if len(self._floor_counts) == 1 else None

    @property
    def heaviest_floor(self) -> int:
        """The costliest floor of a queue that is not empty."""
        return max(self._floor_counts)

    def insert(self, request: Request, kind: Kind) -> int:
        """Returns the position."""
        position = bisect_right(self.deadlines, request.deadline_s)
        self.requests.insert(position, request)
        self.deadlines.insert(position, request.deadline_s)
        self.floors.insert(position, request.floor)
        self.kinds.insert(position, kind)
        self._count_floor(request.floor, 1)
        self._count(request, kind, 1)
        return position

    def take(self, start: int, stop: int) -> list[Request]:
        """Removes positions and returns their live requests."""
        taken = self.requests[start:stop]
        for request, kind, floor in zip(taken, self.kinds[start:stop], self.floors[start:stop], strict=True):
            self._count_floor(floor, -1)
            if not request.cancelled:
                self._count(request, kind, -1)
        del self.requests[start:stop], self.deadlines[start:stop], self.floors[start:stop], self.kinds[start:stop]
        return [request for request in taken if not request.cancelled]

    def cancel(self, request: Request) -> bool:
        """Leaves a hole at the lowest rung in its place, so that no planned batch changes; False when it has left.

        Closing the hole at once could move a costlier request into an earlier batch and so delay the batch mates.
        """
        position = self._position(request)
        if position is None or request.cancelled:
            return False
        self._count(request, self.kinds[position], -1)
        self._count_floor(self.floors[position], -1)
        self._count_floor(0, 1)
        self.floors[position] = 0
        request.cancelled = True
        request.payload = None
        return True

    def without_holes(self) -> DeadlineQueue:
        """A copy whose cancelled positions are closed."""
        copy = DeadlineQueue()
        for request, kind in zip(self.requests, self.kinds, strict=True):
            if not request.cancelled:
                copy.insert(request, kind)
        return copy

    @property
    def has_holes(self) -> bool:
        return self.num_waiting < len(self.requests)

    def _position(self, request: Request) -> int | None:
        for position in range(bisect_left(self.deadlines, request.deadline_s), len(self.requests)):
            if self.requests[position] is request:
                return position
            if self.deadlines[position] > request.deadline_s:
                return None
        return None

    def _count(self, request: Request, kind: Kind, step: int) -> None:
        self.num_waiting += step
        self.size_bytes += step * request.size_bytes
        if count := self.waiting.get(kind, 0) + step:
            self.waiting[kind] = count
        else:
            del self.waiting[kind]

    def _count_floor(self, floor: int, step: int) -> None:
        if count := self._floor_counts.get(floor, 0) + step:
            self._floor_counts[floor] = count
        else:
            del self._floor_counts[floor]
