"""The live engine on a virtual clock and the simulator, over one trace: the same decisions at the same times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from loadtest.arrivals import on_off
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.trace import Trace
from server.backends.base import Batch as Tensors
from server.backends.base import Outputs
from server.deadline_queue import Request
from server.decision import Batch, Refusal
from server.engine import Engine
from server.errors import DeadlineExceeded, Unavailable
from server.metrics import Metrics
from server.policy_file import ActivePolicy
from server.scheduler import Limits, Scheduler
from server.work import Work
from tests.server.virtual_clock import VirtualClockLoop

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"
BUDGETS = ("auto", "max", "low", "high")


@dataclass
class Diary:
    """What a scheduler decided: (time, who, where, why) of each batch, and (time, who) of each refusal."""

    batches: list[tuple[float, list[float], list[int], list[str]]] = field(default_factory=list)
    refusals: list[tuple[float, str]] = field(default_factory=list)


class Recording(Scheduler):
    """Writes down every decision. Requests are known by their arrival, which no two share."""

    diary: Diary

    def offer(self, request: Request, now: float) -> Refusal | None:
        refusal = super().offer(request, now)
        if refusal is not None:
            self.diary.refusals.append((request.arrival_s, refusal.reason))
        return refusal

    def next_batch(self, now: float) -> tuple[Batch | None, list[Request]]:
        batch, late = super().next_batch(now)
        if batch is not None:
            arrivals = [request.arrival_s for request in batch.requests]
            self.diary.batches.append((now, arrivals, list(batch.rungs), list(batch.reasons)))
        return batch, late


def recording(subject: Subject, active: ActivePolicy, workers: int) -> Recording:
    latency = subject.latency(quantile=active.config.quantile)
    limits = Limits(latency.max_batch_size, workers)
    scheduler = Recording(subject.ladder, latency, active.build(), limits, horizon_s=active.horizon_s)
    scheduler.diary = Diary()
    return scheduler


class MachineBackend:
    """Takes as long as the simulator's machine would, on the clock of the loop."""

    floors_only = cancellable = False

    def __init__(self, subject: Subject, machine: Machine, workers: int) -> None:
        self.num_workers = workers
        self._ladder, self._duration_s = subject.ladder, machine.durations()

    async def infer(self, batch: Tensors) -> Outputs:
        rungs = []
        for slots, (experts,) in zip(batch.slots.tolist(), batch.num_selected_experts.tolist(), strict=True):
            rung = self._ladder.find(experts, tuple(slots))
            assert rung is not None
            rungs.append(rung)
        loop = asyncio.get_running_loop()
        # call_at, not sleep: the simulator adds to the start in the same way, to the last bit
        done = loop.create_future()
        loop.call_at(loop.time() + self._duration_s(rungs, loop.time()), done.set_result, None)
        await done
        rows, layers = batch.slots.shape
        return Outputs(
            logits=np.zeros((rows, 10), np.float32),
            kept=np.ones((rows, layers), np.float32),
            expert_load=np.zeros((rows, layers, 8), np.int64),
            token_experts=None,
        )

    async def start(self, changed: Callable[[], None]) -> None:
        raise AssertionError("not the engine's to start")

    async def close(self) -> None:
        raise AssertionError("not the engine's to close")


def live(subject: Subject, active: ActivePolicy, trace: Trace, machine: Machine, workers: int) -> Diary:
    scheduler = recording(subject, active, workers)
    image = np.zeros((28, 28, 1), np.uint8)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        metrics = Metrics(CollectorRegistry(), subject.manifest.architecture.moe)
        engine = Engine(MachineBackend(subject, machine, workers), scheduler, metrics)
        engine.start()
        tasks: list[asyncio.Task[object]] = []

        def arrive(arrival_s: float, name: str) -> None:
            budget = active.budgets[name]
            request = Request(arrival_s, arrival_s + budget.deadline_s, budget, budget.floor, budget.ceiling)
            tasks.append(loop.create_task(engine.infer(request, Work(image, explain=False, pinned=None))))

        for arrival_s, code in zip(trace.arrival_s.tolist(), trace.budget.tolist(), strict=True):
            loop.call_at(arrival_s, arrive, arrival_s, trace.budgets[code])
        end = loop.create_future()
        loop.call_at(float(trace.arrival_s[-1]) + 1.0, end.set_result, None)
        await end
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert len(answers) == len(trace)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        assert all(isinstance(error, Unavailable | DeadlineExceeded) for error in errors)
        await engine.close()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())
    return scheduler.diary


@pytest.mark.parametrize(("policy", "workers"), [("foresight", 1), ("foresight", 2), ("slackfit", 1), ("aimd", 1)])
def test_decisions_when_engine_and_simulator_see_one_trace_then_they_are_the_same(policy: str, workers: int) -> None:
    subject = Subject.load(SHIPPED)
    active = subject.policy(policy)
    # bursts beyond what the cheapest point can serve, about 710 images a second and worker
    arrival_s = on_off(600.0 * workers, 3.0, np.random.default_rng(5), on_s=0.3, off_s=0.7)
    budget = np.random.default_rng(6).integers(0, len(BUDGETS), len(arrival_s))
    trace = Trace.of(arrival_s, budget, BUDGETS)
    machine = Machine(subject.latency(), seed=7, slowdown=1.3, slow_from_s=1.0)
    scheduler = recording(subject, active, workers)
    simulate(trace, scheduler, active, machine)
    simulated = scheduler.diary
    assert len(simulated.batches) > 100
    assert len(simulated.refusals) > 100
    assert live(subject, active, trace, machine, workers) == simulated
