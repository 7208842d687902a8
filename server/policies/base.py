"""What a capacity policy sees and answers. One small protocol; live gateway and simulator call the same objects.

A policy is called when a worker is free and somebody waits. It proposes how many requests of the head of the queue form
the batch, and the rung of each. It need not respect deadlines, floors, ceilings or pins: the scheduler clips every rung
into its request's range, and replaces a proposal that would break a promise of admission (see `server.scheduler`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from server.ladder import Ladder
from server.latency import LatencyModel


class Kind(NamedTuple):
    """Requests that a policy may treat alike: their range on the ladder and their weight.

    A tuple, not a dataclass: it is hashed and compared about a hundred times in a decision.
    """

    floor: int
    ceiling: int
    weight: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Arrivals within the next `horizon_s`: mean and variance of their number."""

    horizon_s: float
    mean: float
    variance: float


@dataclass(frozen=True, slots=True)
class View:
    """The state at a decision, read-only. The queue is in order of deadlines, earliest first.

    Attributes:
        now: on the clock of the scheduler, s.
        deadlines: of the queue, absolute, s.
        kinds: of the queue.
        waiting: queued requests of each kind.
        arrival_rates_hz: arrivals per second of each kind seen lately, shed ones included.
        forecasts: how many requests to expect, over a short and a long horizon.
        busy_until_s: predicted end (q-quantile) of every batch that runs.
        workers: how many batches may run at once.
        batch_limit_s: longest that a batch of several may take, so that whoever arrives meanwhile can still be served.
        keeps_promise: see `fits`.
    """

    now: float
    deadlines: Sequence[float]
    kinds: Sequence[Kind]
    waiting: Mapping[Kind, int]
    arrival_rates_hz: Mapping[Kind, float]
    forecasts: Sequence[Forecast]
    busy_until_s: Sequence[float]
    workers: int
    batch_limit_s: float
    max_batch_size: int
    ladder: Ladder
    latency: LatencyModel
    keeps_promise: Callable[[Sequence[int], float], bool]

    def clip(self, rungs: Sequence[int]) -> list[int]:
        """Each rung moved into its request's range."""
        return [min(max(rung, kind.floor), kind.ceiling) for rung, kind in zip(rungs, self.kinds, strict=False)]

    def fits(self, rungs: Sequence[int]) -> bool:
        """Would a batch of the first `len(rungs)` requests at these rungs keep every promise of admission?"""
        return self.keeps_promise(rungs, self.now)


@dataclass(frozen=True, slots=True)
class Proposal:
    """The first `len(rungs)` requests of the queue, at these rungs."""

    rungs: Sequence[int]


class Policy(Protocol):
    """Chooses batch and operating points together.

    Attributes:
        name: as in policy.toml.
        degrades: False serves every request at its ceiling; admission then promises no less.
    """

    name: str
    degrades: bool

    def decide(self, view: View) -> Proposal:
        """Called with a non-empty queue and a free worker."""

    def arrived(self, now: float) -> None:
        """A request was offered, whether admitted or not."""

    def finished(self, now: float, *, met: int, missed: int) -> None:
        """A batch is done, or requests left the queue late (`missed` then)."""

    def shed(self, now: float) -> None:
        """A request was refused."""


class Stateless:
    """The hooks of a policy that needs none."""

    degrades = True

    def arrived(self, now: float) -> None:
        pass

    def finished(self, now: float, *, met: int, missed: int) -> None:
        pass

    def shed(self, now: float) -> None:
        pass
