"""Who is admitted, who waits, and which batch runs next at which operating points. No I/O and no clock of its own.

The live engine and the simulator drive this same object:

    check(requests, now)      what it would say to these together: before work is spent on them
    offer(request, now)       admits it, or says why not and when to come back
    next_batch(now)           when a worker is free: the batch that starts now, and the requests that can only be late
    on_batch_done(batch, now) gives the worker back and teaches the latency model
    cancel(request)           the client has gone

**Promise.** The *floor plan* cuts the queue, earliest deadline first, into batches of `plan size` with every request at
its floor and gives each to the worker that is free first. A request is admitted only if the floor plan with it meets
every deadline at the q-quantile of predicted latency; a batch is started only if that still holds for the rest. So an
admitted request is late only if a batch took longer than its predicted q-quantile. What cannot be promised is refused
at once.

**Guard.** Policies propose; a proposal that would break the promise is replaced by the largest batch at floors that
keeps it. Where a slow batch has broken it already, the largest batch that still saves the most urgent request runs.

**Shares.** Under contention a class may fill the queue only up to what the others leave, see `server.shares`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.deadline_queue import DeadlineQueue, Request
from server.decision import Batch, Refusal, ServeReason
from server.floor_plan import EPSILON_S, largest_within, most_alone, plan_excess_s
from server.ladder import Ladder
from server.latency import LatencyModel
from server.offered_load import LONG_HORIZON, OfferedLoad
from server.policies.base import Policy, View
from server.shares import Shares


@dataclass(frozen=True)
class Limits:
    """Attributes:
    max_batch_size: images in a batch.
    workers: batches that run at once, to begin with.
    max_requests, max_bytes: bounds of the queue.
    """

    max_batch_size: int
    workers: int = 1
    max_requests: int = 1024
    max_bytes: int = 1 << 30


class Scheduler:
    """One queue of one model.

    Arguments:
        ladder, latency: of the model; `latency` is updated by every batch.
        policy: proposes batches; `use` replaces it.
        limits: of batches and queue.
        horizon_s: how far ahead a burst is foreseen: the shortest deadline.

    Attributes:
        workers: batches that may run at once, as of now. The caller keeps it true; with 0 nobody is admitted.
        floors_only: serve everybody at the floor, whatever the policy says. The caller sets it.
    """

    def __init__(
        self, ladder: Ladder, latency: LatencyModel, policy: Policy, limits: Limits, *, horizon_s: float = 0.1
    ) -> None:
        if limits.max_batch_size > latency.max_batch_size:
            raise ValueError(
                f"max_batch_size must be at most {latency.max_batch_size}, the latency model's, "
                f"got {limits.max_batch_size}"
            )
        self.ladder, self.latency, self.policy, self.limits = ladder, latency, policy, limits
        self.workers, self.floors_only = limits.workers, False
        self.queue = DeadlineQueue()
        self.running: list[Batch] = []
        self._shares = Shares(LONG_HORIZON * horizon_s)
        self._load = OfferedLoad(horizon_s)
        self._kept: tuple[float, list[int]] | None = None  # found to keep the promise: spares the second look
        self._late: list[Request] = []  # kept for `clear` should a policy fail

    # -- what the caller sees of the state

    @property
    def has_work(self) -> bool:
        return bool(self.queue.requests)

    @property
    def free_workers(self) -> int:
        return max(self.workers - len(self.running), 0)

    def arrival_rate_hz(self, now: float) -> float:
        """Requests per second offered lately, shed ones included."""
        return self._load.rate_hz(now)

    def oldest_age_s(self, now: float) -> float:
        """How long the longest-waiting request has waited; 0 when nobody waits. O(n): for scrapes only."""
        return max((now - request.arrival_s for request in self.queue.requests), default=0.0)

    def use(self, policy: Policy, horizon_s: float | None = None) -> None:
        """Takes another policy from now on. What is admitted keeps its range and its deadline.

        Another horizon starts to measure arrivals anew.
        """
        self.policy = policy
        if horizon_s is not None and horizon_s != self._load.horizon_s:
            self._shares.measure_over(LONG_HORIZON * horizon_s)
            self._load = OfferedLoad(horizon_s)

    # -- transitions

    def check(self, requests: Sequence[Request], now: float) -> Refusal | None:
        """What `offer` would answer to all of them at once, without admitting. A refusal counts as their arrival, an
        admission does not.

        Lets the caller refuse before it spends work on requests, such as decoding them.

        Arguments:
            requests: alike in budget, range, arrival and deadline: the images of one form.
        """
        admitted = self._try(requests, now)
        if isinstance(admitted, Refusal):
            for request in requests:
                self._count_arrival(request, now)
                self._tell_policy(admitted, now)
            return admitted
        self.queue.take(admitted, admitted + len(requests))
        return None

    def offer(self, request: Request, now: float) -> Refusal | None:
        """Admits a request; None, or why not."""
        admitted = self._try((request,), now)
        self._count_arrival(request, now)
        if isinstance(admitted, Refusal):
            self._tell_policy(admitted, now)
            return admitted
        self._shares.entered(request)
        return None

    def cancel(self, request: Request) -> bool:
        """Forgets a waiting request; False when it has left the queue already."""
        position = self.queue.find(request)
        if position is None:
            return False
        self._shares.left(self.queue.take(position, position + 1))
        return True

    def next_batch(self, now: float) -> tuple[Batch | None, list[Request]]:
        """The batch that starts now, None without a free worker or work; and the requests that can only be late.

        The late ones have left the queue: the caller answers them with an error.
        """
        self._late += self._take_late(now)
        batch = self._form_batch(now) if self.free_workers and self.has_work else None
        late, self._late = self._late, []
        return batch, late

    def on_batch_done(self, batch: Batch, now: float, *, failed: bool = False) -> None:
        """Gives the worker back. A batch that failed teaches nothing about latency."""
        self.running.remove(batch)
        if failed:
            return
        self.latency.observe(batch.rungs, now - batch.started_s)
        met = sum(request.deadline_s >= now for request in batch.requests)
        self.policy.finished(now, met=met, missed=len(batch.requests) - met)

    def clear(self) -> list[Request]:
        """Takes everything out of the queue: at shutdown, or when nothing is left to run it."""
        requests = self.queue.take(0, len(self.queue))
        self._shares.left(requests)
        late, self._late = self._late, []
        return late + requests

    def keeps_promise(self, rungs: Sequence[int], now: float) -> bool:
        """Would a batch of the first `len(rungs)` requests be in time, and leave the rest a floor plan that is?"""
        high_s = self.latency.predict_s(rungs, high=True)
        end_s = now + high_s
        if end_s > self.queue.deadlines[0] + EPSILON_S or (len(rungs) > 1 and high_s > self.batch_limit_s(now)):
            return False
        free_s = [*self._busy_until_s(now), end_s, *[now] * (self.free_workers - 1)]
        if self._plan_excess_s(free_s, len(rungs), now):
            return False
        self._kept = (now, list(rungs))
        return True

    def batch_limit_s(self, now: float) -> float:
        """Half of the shortest deadline among active classes.

        Who arrives just after a batch has started waits for its end, and then needs as long again.
        """
        return self._shares.shortest_deadline_s(now) / 2

    # -- admission

    def _try(self, requests: Sequence[Request], now: float) -> Refusal | int:
        """Puts requests that are alike into the queue and returns the position of the first, which the others follow;
        leaves the queue as it was where they cannot stay."""
        if not self.policy.degrades:
            for each in requests:
                each.floor = each.ceiling
        limits, queue, request, images = self.limits, self.queue, requests[0], len(requests)
        if not self.workers:
            return Refusal("backend", 1.0, "no inference server is available")
        if len(queue) + images > limits.max_requests:
            detail = f"{len(queue)} images wait and {images} more do not fit: at most {limits.max_requests} may wait"
            return Refusal("queue_full", self._drain_s(request), detail)
        if queue.size_bytes + images * request.size_bytes > limits.max_bytes:
            more = images * request.size_bytes
            detail = f"{queue.size_bytes} bytes wait and {more} more do not fit into {limits.max_bytes}"
            return Refusal("queue_bytes", self._drain_s(request), detail)
        if (excess_s := self._shares.excess_s(request, now, self.workers, self._cost_s, images)) > 0:
            what = "has used up its share of the queue" if images == 1 else f"has no share for {images} images more"
            shed = Refusal("share", excess_s, f"budget {request.budget.name!r} {what}")
            return self._hopeless(request, images, now) or shed
        position = queue.insert(request)
        for each in requests[1:]:
            queue.insert(each)
        if not (excess_s := self._plan_excess_s(self._free_s(now), 0, now)):
            return position
        queue.take(position, position + images)
        return self._hopeless(request, images, now) or self._overloaded(request, images, excess_s, now)

    def _hopeless(self, request: Request, images: int, now: float) -> Refusal | None:
        """Why an idle gateway could not answer as many like `request` in time either; None where it could."""
        allowed_s, spent_s = request.deadline_s - request.arrival_s, now - request.arrival_s
        if self._most_alone(request, allowed_s - spent_s, now) >= images:
            return None
        image_s = self.latency.uniform_s(request.floor, 1, high=True)
        one = f"an image takes {1000 * image_s:.1f} ms on an idle gateway, at the cheapest operating point allowed"
        allowed = f"{1000 * allowed_s:g} ms"
        fit = self._most_alone(request, allowed_s, now)
        if fit >= images:
            spent = f"decoding took {1000 * spent_s:.0f} ms of the {allowed} allowed, and {one}"
            return Refusal("decoding", None, f"{spent}; send smaller images, or allow more time")
        if images == 1 or not fit:
            return Refusal("too_short", None, f"{one}, and {allowed} are allowed; allow more time")
        return Refusal(
            "too_short",
            None,
            f"{images} images take longer than the {allowed} allowed even on an idle gateway, at the cheapest "
            f"operating point allowed; send at most {fit} in a form, or allow more time",
        )

    def _most_alone(self, request: Request, slack_s: float, now: float) -> int:
        """Images like `request` that an idle gateway would admit with `slack_s` left: see `plan_excess_s`."""
        latency, floor, most = self.latency, request.floor, self.limits.max_batch_size
        suitable = largest_within(latency, floor, self.batch_limit_s(now), most)
        return max(most_alone(latency, floor, slack_s, self.workers, size) for size in {suitable, most})

    def _overloaded(self, request: Request, images: int, excess_s: float, now: float) -> Refusal:
        waiting, running = len(self.queue), sum(len(batch.requests) for batch in self.running)
        return Refusal(
            "deadline",
            excess_s,
            f"{waiting} images wait and {running} are in batches: {1000 * (request.deadline_s - now):.0f} ms are left, "
            f"{math.ceil(1000 * excess_s)} ms more are needed for {images} more, even at the cheapest operating point "
            "allowed",
        )

    def _tell_policy(self, refusal: Refusal, now: float) -> None:
        if refusal.retry_after_s is not None:  # what an idle gateway refuses says nothing about load
            self.policy.shed(now)

    def _count_arrival(self, request: Request, now: float) -> None:
        self._load.arrived(request.kind, now)
        self._shares.arrived(request, now)
        self.policy.arrived(now)

    def _plan_excess_s(self, free_s: list[float], start: int, now: float) -> float:
        """See `plan_excess_s`, of the queue from position `start`."""
        return plan_excess_s(
            self.queue, self.latency, free_s, start, self.batch_limit_s(now), self.limits.max_batch_size
        )

    def _cost_s(self, rung: int) -> float:
        """One image's share of a full batch."""
        return self.latency.uniform_s(rung, self.limits.max_batch_size) / self.limits.max_batch_size

    def _drain_s(self, request: Request) -> float:
        """How long a full batch takes at the floor of `request`."""
        return self.latency.uniform_s(request.floor, self.limits.max_batch_size, high=True)

    # -- batches

    def _form_batch(self, now: float) -> Batch:
        if self.floors_only:
            return self._start(self._safe_rungs(now), now)
        view, self._kept = self._view(now), None
        rungs = view.clip(self.policy.decide(view).rungs[: self.limits.max_batch_size])
        if not rungs or not ((now, rungs) == self._kept or self.keeps_promise(rungs, now)):
            rungs = self._safe_rungs(now)
        return self._start(rungs, now)

    def _view(self, now: float) -> View:
        queue = self.queue
        return View(
            now=now,
            deadlines=queue.deadlines,
            kinds=queue.kinds,
            waiting=queue.waiting,
            arrival_rates_hz=self._load.by_kind(now),
            forecasts=self._load.forecasts(now),
            busy_until_s=self._busy_until_s(now),
            workers=self.workers,
            batch_limit_s=self.batch_limit_s(now),
            max_batch_size=self.limits.max_batch_size,
            ladder=self.ladder,
            latency=self.latency,
            keeps_promise=self.keeps_promise,
        )

    def _start(self, rungs: list[int], now: float) -> Batch:
        requests = self.queue.take(0, len(rungs))
        self._shares.left(requests)
        ceilings = [request.ceiling for request in requests]
        at_ceilings_s = self.latency.predict_s(ceilings, high=True)
        cause: ServeReason = "slack" if now + at_ceilings_s > requests[0].deadline_s else "load"
        if self.floors_only:
            cause = "fallback"
        reasons: list[ServeReason] = [
            "pinned" if request.pinned else "ceiling" if rung == request.ceiling else cause
            for request, rung in zip(requests, rungs, strict=True)
        ]
        median_s = self.latency.predict_s(rungs)
        batch = Batch(requests, rungs, reasons, now, median_s, median_s * self.latency.high_factor(len(rungs)))
        self.running.append(batch)
        return batch

    def _safe_rungs(self, now: float) -> list[int]:
        """The largest batch at floors that keeps the promise; where none does, the largest that saves the head."""
        latency, slack_s = self.latency, self.queue.deadlines[0] - now + EPSILON_S
        floors = self.queue.floors[: self.limits.max_batch_size]
        candidates = [floors[:size] for size in range(len(floors), 0, -1)]
        for keeps in (
            lambda rungs: self.keeps_promise(rungs, now),
            lambda rungs: latency.predict_s(rungs, high=True) <= slack_s,
            lambda rungs: latency.predict_s(rungs) <= slack_s,
        ):
            if best := next(filter(keeps, candidates), None):
                return best
        return floors[:1]

    def _take_late(self, now: float) -> list[Request]:
        """Heads whose deadline has passed, or passes before the fastest answer (median) could be there."""
        late: list[Request] = []
        while self.queue.deadlines:
            soonest_s = now + self.latency.uniform_s(self.queue.floors[0], 1)
            if self.queue.deadlines[0] >= soonest_s - EPSILON_S:
                break
            late += self.queue.take(0, 1)
        if late:
            self._shares.left(late)
            self.policy.finished(now, met=0, missed=len(late))
        return late

    def _busy_until_s(self, now: float) -> list[float]:
        """Predicted ends; a batch that is overdue may end any moment."""
        return [max(now, batch.started_s + batch.high_s) for batch in self.running]

    def _free_s(self, now: float) -> list[float]:
        """When each worker becomes free. Where some were taken away, the batches that end first give none back."""
        busy_s = self._busy_until_s(now)
        surplus = max(len(busy_s) - self.workers, 0)
        return sorted(busy_s)[surplus:] + [now] * self.free_workers
