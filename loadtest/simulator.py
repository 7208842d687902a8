"""Drives the gateway's own `Scheduler` over a trace on a virtual clock. No waiting, no randomness but seeded.

The calls come in the order in which a live engine makes them:

    a batch ends      on_batch_done(batch, now), then next_batch(now) while a worker is free
    a request comes   offer(request, now), then next_batch(now) while a worker is free

Of two events at one instant the end of a batch comes first.

**True latency.** A second, frozen latency model is the machine: a batch takes its median there times exp(sigma z -
sigma^2 / 2), z standard normal and sigma the profile's spread at that batch size, so that the noise has mean 1. The
k-th batch of every run with one seed draws the same z. The scheduler's own model knows only what it observes.

**Surroundings.** A machine with `surroundings` also spends time on HTTP, decoding and answers, on an event loop that
may compete with inference; `loadtest.surroundings` runs it. Without, a request costs nothing but its share of batches.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from loadtest.errors import LoadtestError
from loadtest.outcomes import REASON_CODES, SHED_CODES, Outcome, Outcomes
from loadtest.surroundings import SurroundedRun, Surroundings
from loadtest.trace import Trace
from server.budgets import Budget
from server.deadline_queue import Request
from server.decision import Batch
from server.latency import LatencyModel
from server.policy_file import ActivePolicy
from server.scheduler import Scheduler

_CHUNK = 1 << 14  # requests between two reports of progress, and normals drawn at once


@dataclass(frozen=True)
class Machine:
    """What really runs the batches.

    Attributes:
        latency: true medians and spread; never updated.
        noise: multiplies the spread; 0 makes every batch take its median.
        slowdown: true time over the profile's, for batches that start in [slow_from_s, slow_until_s).
        seed: of the noise.
        surroundings: costs beside inference; None for none.
    """

    latency: LatencyModel
    noise: float = 1.0
    slowdown: float = 1.0
    slow_from_s: float = 0.0
    slow_until_s: float = math.inf
    seed: int = 0
    surroundings: Surroundings | None = None

    def __post_init__(self) -> None:
        if not (self.noise >= 0 and self.slowdown > 0):
            raise LoadtestError(
                f"noise must be at least 0 and slowdown above 0, got noise {self.noise} and slowdown {self.slowdown}"
            )

    def durations(self) -> Callable[[list[int], float], float]:
        """How long a batch at these rungs takes that starts at a time, s; call it in the order of the batches."""
        normals = self._normals()
        sigmas = [self.noise * sigma for sigma in self.latency.sigma]
        predict_s, exp = self.latency.predict_s, math.exp

        def duration_s(rungs: list[int], start_s: float) -> float:
            sigma = sigmas[len(rungs)]
            seconds = predict_s(rungs) * exp(sigma * (next(normals) - sigma / 2))
            return seconds * self.slowdown if self.slow_from_s <= start_s < self.slow_until_s else seconds

        return duration_s

    def _normals(self) -> Iterator[float]:
        generator = np.random.default_rng(self.seed)
        while True:
            yield from generator.standard_normal(_CHUNK).tolist()


def simulate(
    trace: Trace,
    scheduler: Scheduler,
    active: ActivePolicy,
    machine: Machine,
    progress: Callable[[int], None] = lambda done: None,
    *,
    grace_s: float = 0.0,
) -> Outcomes:
    """Runs a trace to its end: every request gets exactly one outcome.

    Arguments:
        scheduler: fresh, with as many workers as the machine has.
        active: gives the budgets.
        progress: called with the number of requests that have arrived, now and then.
        grace_s: beyond the deadline, for the client of a machine with surroundings; see `report.Live`.

    Raises:
        LoadtestError: a budget of the trace does not exist.
    """
    budgets = budgets_of(trace, active)
    if machine.surroundings is not None:
        surrounded = SurroundedRun(trace, scheduler, machine.surroundings, machine.durations(), grace_s)
        return surrounded.to_the_end(budgets, progress, _CHUNK)
    run = _Run(trace, scheduler, machine)
    for start in range(0, len(trace), _CHUNK):
        progress(start)
        run.offer_all(start, min(start + _CHUNK, len(trace)), budgets)
    run.finish_until(math.inf)
    progress(len(trace))
    return run.outcomes()


def budgets_of(trace: Trace, active: ActivePolicy) -> list[Budget]:
    """The budgets of a trace, in its order.

    Raises:
        LoadtestError: one does not exist.
    """
    if unknown := [name for name in trace.budgets if name not in active.budgets]:
        raise LoadtestError(f"unknown budget {unknown[0]!r} in the trace; the policy has {', '.join(active.budgets)}")
    return [active.budgets[name] for name in trace.budgets]


class _Run:
    """The state of one simulation. A batch's end is known when it starts; its requests are recorded then."""

    def __init__(self, trace: Trace, scheduler: Scheduler, machine: Machine) -> None:
        self._trace, self._scheduler = trace, scheduler
        self._duration_s = machine.durations()
        self._ends: list[tuple[float, int, Batch]] = []
        self._out = Outcomes.empty(len(trace))
        # Answers in the order of their batches, sorted into the order of arrival at the end: one slice per batch
        # instead of one assignment per request.
        self._index = np.zeros(len(trace), np.int64)
        self._rung = np.zeros(len(trace), np.int16)
        self._reason = np.zeros(len(trace), np.uint8)
        self._deadline = np.zeros(len(trace))
        self._answers = 0
        self._starts: list[float] = []
        self._finishes: list[float] = []
        self._sizes: list[int] = []
        self._decisions: list[float] = []

    def offer_all(self, start: int, stop: int, budgets: list[Budget]) -> None:
        """Requests `start` to `stop` of the trace, and all that happens before the last of them."""
        trace, ends, scheduler, outcome = self._trace, self._ends, self._scheduler, self._out.outcome
        part = slice(start, stop)
        own_s = np.array([budget.deadline_s for budget in budgets])[trace.budget[part]]
        asked_s = trace.deadline_s[part]
        self._out.deadline_s[part] = np.where(np.isnan(asked_s), own_s, asked_s)
        deadlines = trace.arrival_s[part] + self._out.deadline_s[part]
        rows = zip(trace.arrival_s[part].tolist(), deadlines.tolist(), trace.budget[part].tolist(), strict=True)
        for index, (now, deadline_s, code) in enumerate(rows, start):
            if ends and ends[0][0] <= now:
                self.finish_until(now)
            budget = budgets[code]
            request = Request(now, deadline_s, budget, budget.floor, budget.ceiling, payload=index)
            refusal = scheduler.offer(request, now)
            if refusal is not None:
                outcome[index] = SHED_CODES[refusal.reason]
            if scheduler.free_workers:
                self._dispatch(now)

    def finish_until(self, now: float) -> None:
        """Ends every batch that is due, and starts the next ones."""
        ends, scheduler = self._ends, self._scheduler
        while ends and ends[0][0] <= now:
            end_s, _, batch = heapq.heappop(ends)
            scheduler.on_batch_done(batch, end_s)
            self._dispatch(end_s)

    def _dispatch(self, now: float) -> None:
        scheduler = self._scheduler
        while scheduler.has_work and scheduler.free_workers:
            before_s = time.perf_counter()
            batch, late = scheduler.next_batch(now)
            elapsed_s = time.perf_counter() - before_s
            for request in late:
                self._expire(request, now)
            if batch is None:
                return
            self._decisions.append(elapsed_s)
            self._start(batch, now)

    def _start(self, batch: Batch, now: float) -> None:
        end_s = now + self._duration_s(batch.rungs, now)
        # The number of the batch breaks ties: batches do not compare.
        heapq.heappush(self._ends, (end_s, len(self._starts), batch))
        self._starts.append(now)
        self._finishes.append(end_s)
        self._sizes.append(len(batch.requests))
        part = slice(self._answers, self._answers + len(batch.requests))
        self._index[part] = [request.payload for request in batch.requests]
        self._deadline[part] = [request.deadline_s for request in batch.requests]
        self._rung[part] = batch.rungs
        self._reason[part] = [REASON_CODES[reason] for reason in batch.reasons]
        self._answers = part.stop

    def _expire(self, request: Request, now: float) -> None:
        index = request.payload
        self._out.outcome[index] = Outcome.expired
        self._out.queue_s[index] = now - request.arrival_s
        self._out.latency_s[index] = max(now, request.deadline_s) - request.arrival_s

    def outcomes(self) -> Outcomes:
        """Once everything has ended."""
        out, index = self._out, self._index[: self._answers]
        sizes = np.array(self._sizes, np.int64)
        start_s, end_s = np.repeat(np.array(self._starts), sizes), np.repeat(np.array(self._finishes), sizes)
        arrival_s = self._trace.arrival_s[index]
        out.outcome[index] = np.where(end_s <= self._deadline[: self._answers], Outcome.met, Outcome.late)
        out.rung[index] = self._rung[: self._answers]
        out.reason[index] = self._reason[: self._answers]
        out.queue_s[index] = start_s - arrival_s
        out.latency_s[index] = end_s - arrival_s
        out.inference_s[index] = end_s - start_s
        assert not (out.outcome == Outcome.unfinished).any(), "the scheduler has lost a request"
        return replace(out, batch_size=sizes.astype(np.uint16), decision_s=np.array(self._decisions, np.float32))
