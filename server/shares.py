"""Classes of requests under contention: who is active, and how much of the queue each may fill.

A class may fill the queue only up to what the others leave. Of the time to its deadline D, every other active class o
keeps free what it is expected to need, at most its weighted share:

    limit = max(share * D, D - sum over o of min(share_o * D, rate_o * cost_o * D)),   share = weight / sum of weights

times the number of workers, with the cost of an image in a full batch at its floor. A class that is alone has no limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from server.arrival_rate import ArrivalRate
from server.budgets import Budget
from server.deadline_queue import Request

# A class counts as active this long after its last arrival. Chosen, not tuned.
ACTIVE_S: Final = 2.0


@dataclass(slots=True)
class _Class:
    """Attributes:
    floor: of the last arrival.
    waiting: queued requests by floor.
    seen_s: the last arrival.
    """

    budget: Budget
    floor: int
    seen_s: float
    waiting: Counter[int] = field(default_factory=Counter)


class Shares:
    """Keeps the books of every class.

    Arguments:
        window_s: over which arrival rates are measured.
    """

    def __init__(self, window_s: float) -> None:
        self._classes: dict[str, _Class] = {}
        self.measure_over(window_s)

    def measure_over(self, window_s: float) -> None:
        """Starts to measure arrivals anew."""
        self._rates: ArrivalRate[str] = ArrivalRate(window_s)

    def arrived(self, request: Request, now: float) -> None:
        """Counts a request, whether it is admitted or not."""
        budget = request.budget
        self._rates.arrived(budget.name, now)
        entry = self._classes.get(budget.name)
        if entry is None:
            entry = self._classes[budget.name] = _Class(budget, request.floor, now)
        entry.budget, entry.floor, entry.seen_s = budget, request.floor, now

    def entered(self, request: Request) -> None:
        """The request, which has arrived, is in the queue."""
        self._classes[request.budget.name].waiting[request.floor] += 1

    def left(self, requests: Iterable[Request]) -> None:
        """Gives back what requests that have left the queue took of their class's share."""
        for request in requests:
            waiting = self._classes[request.budget.name].waiting
            waiting[request.floor] -= 1
            if not waiting[request.floor]:
                del waiting[request.floor]

    def shortest_deadline_s(self, now: float) -> float:
        """Of the active classes; infinite when there are none."""
        active = (c.budget.deadline_s for c in self._classes.values() if now - c.seen_s < ACTIVE_S)
        return min(active, default=float("inf"))

    def excess_s(
        self, request: Request, now: float, workers: int, cost_s: Callable[[int], float], images: int = 1
    ) -> float:
        """By how many seconds of floor work its class would exceed its limit; not above 0 where it would not.

        Arguments:
            cost_s: of an image in a full batch at a rung.
            images: as many like `request` at once. A class of which nobody waits may always have one.
        """
        mine = self._classes.get(request.budget.name)
        waiting = {} if mine is None else mine.waiting
        if not waiting and images == 1:
            return 0.0
        others = [c for c in self._classes.values() if c is not mine and now - c.seen_s < ACTIVE_S]
        if not others:
            return 0.0
        weights = request.budget.weight + sum(c.budget.weight for c in others)
        rates = self._rates.by_kind(now)
        reserved = sum(
            min(c.budget.weight / weights, rates.get(c.budget.name, 0.0) * cost_s(c.floor) / workers) for c in others
        )
        share = max(request.budget.weight / weights, 1.0 - reserved)
        work_s = sum(count * cost_s(floor) for floor, count in waiting.items())
        return work_s + images * cost_s(request.floor) - max(request.deadline_s - now, 0.0) * share * workers
