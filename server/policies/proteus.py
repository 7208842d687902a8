"""Proteus (Ahmad et al., ASPLOS 2024): every period, plan for the arrival rate that was measured.

The plan is the most accurate split of the traffic over two neighbouring rungs whose work fits into the workers:

    x * rate * c_high + (1 - x) * rate * c_low <= headroom * workers,      c = latency(rung, b) / b

with b the largest batch that runs within half a deadline, their adaptive batching rule. Between two plans nothing
reacts to the queue.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from server.floor_plan import largest_within
from server.policies.base import Proposal, View


class ProteusConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    period_s: float = Field(default=10.0, gt=0, description="time between two plans")
    headroom: float = Field(default=0.95, gt=0, le=1, description="share of the workers' time that a plan may use")


class Proteus:
    name = "proteus"
    degrades = True

    def __init__(self, config: ProteusConfig) -> None:
        self._config = config
        self._planned_s: float | None = None
        self._arrivals = 0
        self._low, self._high, self._share = 0, 0, 1.0
        self._owed = 0.0  # how far the higher rung is behind its share, in requests

    def decide(self, view: View) -> Proposal:
        if self._planned_s is None:
            self._low = self._high = view.ladder.full
            self._planned_s, self._arrivals = view.now, 0
        elif view.now - self._planned_s >= self._config.period_s:
            self._plan(view, self._arrivals / (view.now - self._planned_s))
            self._planned_s, self._arrivals = view.now, 0
        size = min(len(view.deadlines), self._batch_size(view))
        self._owed += self._share * size
        high = round(min(max(self._owed, 0.0), size))
        self._owed -= high
        return Proposal([self._high] * high + [self._low] * (size - high))

    def arrived(self, now: float) -> None:
        self._arrivals += 1

    def finished(self, now: float, *, met: int, missed: int) -> None:
        pass

    def shed(self, now: float) -> None:
        pass

    def _plan(self, view: View, rate_hz: float) -> None:
        frontier = view.ladder.frontier
        available = self._config.headroom * view.workers
        size = self._batch_size(view)
        cost_s = [view.latency.uniform_s(rung, size) / size for rung in frontier]
        fitting = [index for index, cost in enumerate(cost_s) if rate_hz * cost <= available]
        low = fitting[-1] if fitting else 0
        high = min(low + 1, len(frontier) - 1) if fitting else 0
        extra_s = rate_hz * (cost_s[high] - cost_s[low])
        self._share = min((available - rate_hz * cost_s[low]) / extra_s, 1.0) if extra_s > 0 else 1.0
        self._low, self._high, self._owed = frontier[low], frontier[high], 0.0

    def _batch_size(self, view: View) -> int:
        """The largest batch within half a deadline at the plan's rung."""
        return largest_within(view.latency, self._high, view.batch_limit_s, view.max_batch_size)
