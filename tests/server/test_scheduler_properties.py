"""Whatever arrives, is cancelled or takes long: nothing is lost, orders and ranges hold, and promises are kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from server.budgets import Budget
from server.deadline_queue import Request
from server.decision import Batch
from server.latency import LatencyModel
from server.policies.aimd import Aimd, AimdConfig
from server.policies.base import Policy, Proposal, Stateless, View
from server.policies.fixed import Fixed
from server.policies.foresight import Foresight, ForesightConfig
from server.policies.proteus import Proteus, ProteusConfig
from server.policies.queue_depth import QueueDepth, QueueDepthConfig
from server.policies.slackfit import SlackFit, SlackFitConfig
from server.scheduler import Limits, Scheduler
from tests.server.ladders import BASE_S, FULL, IMAGE_S, MAX_BATCH, ladder

CLASSES = (
    Budget("auto", 0, FULL, 0.03),
    Budget("strict", 1, 2, 0.012),
    Budget("lax", 0, 1, 0.2, weight=3.0),
    Budget("pinned", FULL, FULL, 0.05),
)
MAX_REQUESTS, MAX_BYTES = 60, 400


class Arbitrary(Stateless):
    """Proposes anything, also nothing."""

    name = "arbitrary"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def decide(self, view: View) -> Proposal:
        size = self._random.randint(0, view.max_batch_size)
        return Proposal([self._random.randint(0, FULL) for _ in range(min(size, len(view.deadlines)))])


class Frozen(LatencyModel):
    """Learns nothing: what was predicted at admission is predicted at the end."""

    def observe(self, rungs: Sequence[int], measured_s: float) -> None:
        pass


policies = st.sampled_from(
    (
        lambda: Foresight(ForesightConfig()),
        Fixed,
        lambda: QueueDepth(QueueDepthConfig(dwell_s=0.0)),
        lambda: Aimd(AimdConfig()),
        lambda: SlackFit(SlackFitConfig()),
        lambda: Proteus(ProteusConfig(period_s=0.05)),
        lambda: Arbitrary(0),
        lambda: Arbitrary(1),
    )
)


@dataclass
class World:
    """Drives a scheduler and keeps the books."""

    target: Scheduler
    outcomes: dict[Request, str] = field(default_factory=dict)
    running: list[tuple[float, Batch]] = field(default_factory=list)
    late: list[Request] = field(default_factory=list)

    def settle(self, request: Request, outcome: str) -> None:
        assert request not in self.outcomes, f"{outcome} after {self.outcomes[request]}"
        self.outcomes[request] = outcome

    def start(self, now: float, pace: float) -> None:
        """Starts whatever can start; each batch takes `pace` times its predicted quantile."""
        while True:
            waiting = list(self.target.queue.requests)
            batch, late = self.target.next_batch(now)
            for request in late:
                self.settle(request, "late")
                self.late.append(request)
            if batch is None:
                break
            assert batch.requests
            assert len(batch.requests) <= MAX_BATCH
            taken = {id(request) for request in batch.requests}
            deadlines = [request.deadline_s for request in batch.requests]
            rest = [r.deadline_s for r in waiting if id(r) not in taken and r not in self.outcomes]
            assert deadlines == sorted(deadlines)
            assert not rest or deadlines[-1] <= min(rest)
            for request, rung in zip(batch.requests, batch.rungs, strict=True):
                assert request.floor <= rung <= request.ceiling
            self.running.append((now + pace * batch.high_s, batch))
        assert self.target.free_workers == 0 or not self.target.has_work  # work-conserving, so nothing can be stuck

    def finish_until(self, now: float, pace: float) -> None:
        while self.running and min(self.running, key=lambda entry: entry[0])[0] <= now:
            entry = min(self.running, key=lambda entry: entry[0])
            self.running.remove(entry)
            end_s, batch = entry
            self.target.on_batch_done(batch, end_s)
            for request in batch.requests:
                self.settle(request, "served")
                if end_s > request.deadline_s + 1e-6:
                    self.late.append(request)
            self.start(end_s, pace)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[float, int, bool, int]]:
    """Events (time, class, cancel somebody instead, bytes or whom to cancel) around the capacity of about 800 a second.

    Drawn as parameters of a seeded generator: event by event, hypothesis hardly ever builds up a queue.
    """
    generator = random.Random(draw(st.integers(0, 1 << 30)))
    mean_gap_s = draw(st.sampled_from((0.0002, 0.0007, 0.0012, 0.003)))
    burst = draw(st.integers(1, 25))
    cancelled = draw(st.sampled_from((0.0, 0.1, 0.4)))
    classes = draw(st.lists(st.integers(0, len(CLASSES) - 1), min_size=1, max_size=3))
    now, history = 0.0, []
    for _ in range(draw(st.integers(1, 150))):
        if generator.random() < 1 / burst:
            now += generator.expovariate(1 / (mean_gap_s * burst))
        history.append((now, generator.choice(classes), generator.random() < cancelled, generator.randint(0, 20)))
    return history


def play(target: Scheduler, history: list[tuple[float, int, bool, int]], pace: float) -> World:
    world, offered = World(target), []
    for now, index, cancel, number in history:
        world.finish_until(now, pace)
        if cancel and offered:
            victim = offered[number % len(offered)]
            if target.cancel(victim):
                world.settle(victim, "cancelled")
        else:
            budget = CLASSES[index]
            request = Request(now, now + budget.deadline_s, budget, budget.floor, budget.ceiling, number)
            offered.append(request)
            refusal = target.offer(request, now)
            if refusal is not None:
                assert refusal.retry_after_s is None or refusal.retry_after_s >= 0
                world.settle(request, "refused")
        assert len(target.queue) <= MAX_REQUESTS
        assert target.queue.size_bytes <= MAX_BYTES
        world.start(now, pace)
    world.finish_until(float("inf"), pace)
    assert set(world.outcomes) == set(offered)  # nobody is forgotten
    assert (len(target.queue), target.queue.size_bytes, target.running) == (0, 0, [])
    return world


def build(policy: Policy, workers: int, *, frozen: bool) -> Scheduler:
    sizes = (1, 2, 4, 8)
    table = [[BASE_S + image_s * size for size in sizes] for image_s in IMAGE_S]
    model = (Frozen if frozen else LatencyModel)(table, [0.05] * 4, sizes, MAX_BATCH)
    limits = Limits(MAX_BATCH, workers, max_requests=MAX_REQUESTS, max_bytes=MAX_BYTES)
    return Scheduler(ladder(), model, policy, limits, horizon_s=0.012)


@settings(max_examples=300, deadline=None)
@given(policies, st.integers(1, 3), histories(), st.floats(0.3, 4.0))
def test_scheduler_when_anything_happens_then_nothing_is_lost_and_orders_and_ranges_hold(
    policy: type[Policy], workers: int, history: list[tuple[float, int, bool, int]], pace: float
) -> None:
    play(build(policy(), workers, frozen=False), history, pace)


@settings(max_examples=600, deadline=None)
@given(policies, st.integers(1, 3), histories(), st.floats(0.3, 1.0))
def test_admission_when_no_batch_exceeds_its_predicted_quantile_then_nobody_admitted_is_late(
    policy: type[Policy], workers: int, history: list[tuple[float, int, bool, int]], pace: float
) -> None:
    world = play(build(policy(), workers, frozen=True), history, pace)
    assert world.late == []
