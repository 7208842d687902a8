"""What a request costs beside inference, and a run of the simulator that counts it.

One event loop does everything that is not inference, in the order in which it comes up; inference runs beside it:

    client --way/2--> front: parse, read the upload -> check -> decode -> offer -> queue -> batch, on a worker
    client <--way/2-- answer <----------------------------------------- end of batch: decide, start the next

**Contention.** While loop and inference both have work, each takes 1 + c times as long: c is 0 where both have
processors enough and 1 where they share one fairly. With W s of loop work during a batch of I s, W <= I, the batch
ends after I + c W. So everything that is under way advances on one clock v that runs at the speed 1 / (1 + c) while
both have work and at that of t otherwise. v = t - lost, with `lost` what contention has taken so far: with c = 0 it
stays 0 to the last bit.

The deadline of a request runs from the end of its upload, as in the gateway. Whether it was met is judged by the
client, as in a live run: from the arrival, with a grace.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from loadtest.errors import LoadtestError
from loadtest.outcomes import REASON_CODES, SHED_CODES, Outcome, Outcomes
from loadtest.trace import Trace
from server.budgets import Budget
from server.deadline_queue import Request
from server.decision import Batch, ShedReason
from server.scheduler import Scheduler


@dataclass(frozen=True)
class Surroundings:
    """Costs beside inference; times of the loop's processor unless they say otherwise.

    Attributes:
        front_s: of every request, until the end of its upload.
        decode_s: of a request that may be in time, from there to the queue.
        batch_s: to note the end of a batch and start the next.
        answer_s: of an answer, or of telling that it is too late for one.
        refuse_s: of a refusal.
        way_s: between client and gateway, there and back; costs the gateway no work.
        contention: c, see the module.
    """

    front_s: float = 0.0
    decode_s: float = 0.0
    batch_s: float = 0.0
    answer_s: float = 0.0
    refuse_s: float = 0.0
    way_s: float = 0.0
    contention: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (math.isfinite(value) and value >= 0):
                raise LoadtestError(f"{each.name} of the surroundings must be finite and at least 0, got {value}")


@dataclass(frozen=True, slots=True)
class _Job:
    """Work of the loop, and what follows when it is done."""

    work_s: float
    then: Callable[[], None]


class SurroundedRun:
    """One simulation with surroundings.

    Arguments:
        duration_s: of a batch at these rungs that starts at a time, undisturbed; called in the order of the batches.
        grace_s: beyond the deadline, for the client.
    """

    def __init__(
        self,
        trace: Trace,
        scheduler: Scheduler,
        surroundings: Surroundings,
        duration_s: Callable[[list[int], float], float],
        grace_s: float,
    ) -> None:
        self._trace, self._scheduler, self._costs, self._duration_s = trace, scheduler, surroundings, duration_s
        self._grace_s = grace_s
        self._now = self._lost_s = 0.0
        self._jobs: deque[_Job] = deque()
        self._job_ends_v = math.inf  # of the first job
        self._batches: list[tuple[float, int, Batch]] = []  # end on the clock v, number
        self._sizes: list[int] = []
        self._decisions: list[float] = []
        self._out = Outcomes.empty(len(trace))

    def to_the_end(self, budgets: list[Budget], progress: Callable[[int], None], every: int) -> Outcomes:
        """Runs the trace.

        Arguments:
            budgets: of the trace.
            progress: called with the number of requests that have arrived, after `every` so many.
        """
        trace, half_s = self._trace, self._costs.way_s / 2
        own_s = np.array([budget.deadline_s for budget in budgets])[trace.budget]
        self._out.deadline_s[:] = np.where(np.isnan(trace.deadline_s), own_s, trace.deadline_s)
        for index, (arrival_s, code) in enumerate(zip(trace.arrival_s.tolist(), trace.budget.tolist(), strict=True)):
            if index % every == 0:
                progress(index)
            self._advance(arrival_s + half_s)
            self._arrive(index, budgets[code])
        self._advance(math.inf)
        progress(len(trace))
        assert not (self._out.outcome == Outcome.unfinished).any(), "the scheduler has lost a request"
        return replace(
            self._out,
            batch_size=np.array(self._sizes, np.uint16),
            decision_s=np.array(self._decisions, np.float32),
        )

    def _advance(self, until_s: float) -> None:
        """All that happens until then. Of two events at one instant the end of a batch comes first, an arrival last."""
        contention = self._costs.contention
        while True:
            batch_ends_v = self._batches[0][0] if self._batches else math.inf
            due_v = min(batch_ends_v, self._job_ends_v)
            both = bool(self._batches and self._jobs)
            due_s = due_v + self._lost_s
            if both:
                due_s += contention * (due_s - self._now)
            if due_s > until_s or due_v == math.inf:
                break
            if both:
                self._lost_s = due_s - due_v
            self._now = due_s
            if batch_ends_v <= self._job_ends_v:
                batch = heapq.heappop(self._batches)[2]
                self._do(self._costs.batch_s, lambda batch=batch: self._end(batch))  # type: ignore[misc]
            else:
                job = self._jobs.popleft()
                self._begin_job()
                job.then()
        if until_s < math.inf:
            if both:
                self._lost_s += (until_s - self._now) * contention / (1 + contention)
            self._now = until_s

    def _do(self, work_s: float, then: Callable[[], None]) -> None:
        self._jobs.append(_Job(work_s, then))
        if len(self._jobs) == 1:
            self._begin_job()

    def _begin_job(self) -> None:
        self._job_ends_v = self._now - self._lost_s + self._jobs[0].work_s if self._jobs else math.inf

    def _arrive(self, index: int, budget: Budget) -> None:
        self._do(self._costs.front_s, lambda: self._uploaded(index, budget))

    def _uploaded(self, index: int, budget: Budget) -> None:
        now = self._now
        deadline_s = now + float(self._out.deadline_s[index])
        request = Request(now, deadline_s, budget, budget.floor, budget.ceiling, payload=(index, now))
        refusal = self._scheduler.check((request,), now)
        if refusal is not None:
            self._refuse(index, refusal.reason)
        else:
            self._do(self._costs.decode_s, lambda: self._decoded(request))

    def _decoded(self, request: Request) -> None:
        index = request.payload[0]
        request.payload = (index, self._now)
        refusal = self._scheduler.offer(request, self._now)
        if refusal is not None:
            self._refuse(index, refusal.reason)
        elif self._scheduler.free_workers:
            self._dispatch()

    def _refuse(self, index: int, reason: ShedReason) -> None:
        self._out.outcome[index] = SHED_CODES[reason]
        self._do(self._costs.refuse_s, _nothing)

    def _end(self, batch: Batch) -> None:
        """The next batch first, as the engine does."""
        self._scheduler.on_batch_done(batch, self._now)
        self._dispatch()
        for request, rung, reason in zip(batch.requests, batch.rungs, batch.reasons, strict=True):
            index, queued_s = request.payload
            self._out.rung[index], self._out.reason[index] = rung, REASON_CODES[reason]
            self._out.queue_s[index] = batch.started_s - queued_s
            self._out.inference_s[index] = self._now - batch.started_s
            self._do(self._costs.answer_s, lambda index=index: self._answer(index))  # type: ignore[misc]

    def _dispatch(self) -> None:
        scheduler, now = self._scheduler, self._now
        while scheduler.has_work and scheduler.free_workers:
            before_s = time.perf_counter()
            batch, late = scheduler.next_batch(now)
            elapsed_s = time.perf_counter() - before_s
            for request in late:
                index, queued_s = request.payload
                self._out.outcome[index], self._out.queue_s[index] = Outcome.expired, now - queued_s
                self._do(self._costs.answer_s, lambda index=index: self._expire(index))  # type: ignore[misc]
            if batch is None:
                return
            self._decisions.append(elapsed_s)
            end_v = now - self._lost_s + self._duration_s(batch.rungs, now)
            # The number of the batch breaks ties: batches do not compare.
            heapq.heappush(self._batches, (end_v, len(self._sizes), batch))
            self._sizes.append(len(batch.requests))

    def _latency_s(self, index: int) -> float:
        """For the client, of an answer that is written now."""
        return self._now + self._costs.way_s / 2 - float(self._trace.arrival_s[index])

    def _answer(self, index: int) -> None:
        latency_s = self._latency_s(index)
        in_time = latency_s <= self._out.deadline_s[index] + self._grace_s
        self._out.outcome[index] = Outcome.met if in_time else Outcome.late
        self._out.latency_s[index] = latency_s

    def _expire(self, index: int) -> None:
        self._out.latency_s[index] = max(self._latency_s(index), self._out.deadline_s[index] + self._grace_s)


def _nothing() -> None:
    """Follows a refusal."""
