"""The engine around a backend that obeys the protocol, on a virtual clock: a batch takes as long as its model says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from server.backends.base import Batch, Outputs
from server.budgets import Budget
from server.deadline_queue import Request
from server.engine import Engine
from server.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    GatewayError,
    InferenceFailed,
    Overloaded,
    OverShare,
    QueueFull,
    ShuttingDown,
)
from server.ladder import Ladder
from server.latency import LatencyModel
from server.metrics import Metrics
from server.pinned_point import pin
from server.policies.base import Proposal, Stateless, View
from server.policies.fixed import Fixed
from server.policies.foresight import Foresight, ForesightConfig
from server.scheduler import Limits, Scheduler
from server.work import Inference, Work
from tests.server.conftest import small_manifest
from tests.server.virtual_clock import VirtualClockLoop
from vmoe.config import MoeConfig

LADDER = Ladder.of(small_manifest())  # slots 1, 1, 2, 3; K 1, 2, 1, 2; the second is dominated
AUTO = Budget("auto", 0, 3, deadline_s=1.0)
# Seconds of a batch of n at each rung: one alone takes 0.1 at the full rung, every further image half as long.
FULL_S = [0.1 * (n + 1) / 2 for n in range(1, 9)]


class SleepingBackend:
    """Class = first pixel. A batch takes `seconds(n)`; the second worker, where there is one, is as fast."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.floors_only = False
        self.cancellable = False
        self.batches: list[Batch] = []
        self.slow_down = 1.0
        self.failure: Exception | None = None
        self.poison = False

    async def start(self, changed: Callable[[], None]) -> None:
        raise AssertionError("the gateway starts the backend, not the engine")

    async def infer(self, batch: Batch) -> Outputs:
        self.batches.append(batch)
        rows, layers = batch.slots.shape
        await asyncio.sleep(self.slow_down * FULL_S[rows - 1])
        if self.failure is not None:
            raise self.failure
        logits = np.zeros((rows, 4), np.float32)
        logits[np.arange(rows), batch.images[:, 0, 0, 0]] = np.nan if self.poison else 5
        experts = np.zeros((rows, layers, 5, 2), np.int64) if batch.explain else None
        return Outputs(logits, np.ones((rows, layers), np.float32), np.ones((rows, layers, 4), np.int64), experts)

    async def close(self) -> None:
        raise AssertionError("the gateway closes the backend, not the engine")


@dataclass
class Bench:
    """A started engine and what surrounds it."""

    engine: Engine
    scheduler: Scheduler
    backend: SleepingBackend
    registry: CollectorRegistry
    tasks: list[asyncio.Task[Inference]] = field(default_factory=list)

    def send(
        self, pixel: int = 0, deadline_s: float = 1.0, floor: int = 3, *, explain: bool = False
    ) -> asyncio.Task[Inference]:
        now = asyncio.get_running_loop().time()
        request = Request(now, now + deadline_s, AUTO, floor, 3, size_bytes=64)
        work = Work(np.full((8, 8, 1), pixel, np.uint8), explain)
        self.tasks.append(asyncio.create_task(self.engine.infer(request, work)))
        return self.tasks[-1]

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def pixels(self) -> list[list[int]]:
        return [batch.images[:, 0, 0, 0].tolist() for batch in self.backend.batches]


def run(scenario: Callable[[Bench], Awaitable[None]], policy: object = None, **limits: int) -> None:
    """Runs a scenario on a started engine, closes it, and checks that nothing is left of it."""

    async def main() -> None:
        settings = Limits(**{"max_batch_size": 8, **limits})
        latency = LatencyModel(np.outer([0.7, 0.8, 0.85, 1], FULL_S), [0.02] * 8, range(1, 9), 8, quantile=0.5)
        scheduler = Scheduler(LADDER, latency, policy or Fixed(), settings)  # type: ignore[arg-type]
        registry, backend = CollectorRegistry(), SleepingBackend(settings.workers)
        engine = Engine(backend, scheduler, Metrics(registry, MoeConfig(4, (1,))))
        engine.start()
        bench = Bench(engine, scheduler, backend, registry)
        await scenario(bench)
        await engine.close()
        await asyncio.gather(*bench.tasks, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert (scheduler.running, len(scheduler.queue), scheduler.queue.size_bytes) == ([], 0, 0)

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())


async def until_queued() -> None:
    """Lets every task that can run reach its next wait; no time passes."""
    for _ in range(5):
        await asyncio.sleep(0)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_engine_when_requests_come_while_a_batch_runs_then_they_share_the_next_one() -> None:
    async def scenario(bench: Bench) -> None:
        first = bench.send(0)
        await until_queued()
        others = [bench.send(pixel) for pixel in (1, 2, 3)]
        answers = await asyncio.gather(first, *others)
        assert [int(answer.classes[0]) for answer in answers] == [0, 1, 2, 3]
        assert bench.pixels() == [[0], [1, 2, 3]]
        # One alone takes 0.1 s, for which the others wait, and three take 0.2 s.
        assert [answer.queue_s for answer in answers] == pytest.approx([0, 0.1, 0.1, 0.1])
        assert [answer.inference_s for answer in answers] == pytest.approx([0.1, 0.2, 0.2, 0.2])

    run(scenario)


def test_engine_when_a_request_is_urgent_then_it_overtakes() -> None:
    async def scenario(bench: Bench) -> None:
        for pixel, deadline_s in ((0, 1.0), (1, 1.0), (2, 0.9), (3, 0.8)):
            bench.send(pixel, deadline_s)
            await until_queued()
        await asyncio.gather(*bench.tasks)
        assert bench.pixels() == [[0], [3, 2], [1]]

    run(scenario, max_batch_size=2)


def test_engine_when_two_workers_are_free_then_two_batches_run_at_once() -> None:
    async def scenario(bench: Bench) -> None:
        bench.send(0)
        await until_queued()
        bench.send(1)
        await asyncio.gather(*bench.tasks)
        assert now_s() == pytest.approx(0.1)

    run(scenario, workers=2)


def test_engine_when_a_batch_is_done_then_the_backend_has_the_next_before_anybody_hears_of_it() -> None:
    async def scenario(bench: Bench) -> None:
        begun: list[int] = []
        first = bench.send(0)
        first.add_done_callback(lambda _: begun.append(len(bench.backend.batches)))
        await until_queued()
        await asyncio.gather(first, bench.send(1))
        assert begun == [2]

    run(scenario)


def test_engine_when_nothing_waits_then_an_image_starts_at_once() -> None:
    async def scenario(bench: Bench) -> None:
        await asyncio.sleep(5)
        answer = await bench.send()
        assert (answer.queue_s, answer.deadline_met) == (0, True)
        assert now_s() == pytest.approx(5.1)

    run(scenario)


def test_engine_when_the_policy_goes_down_the_ladder_then_the_backend_gets_that_points_slots() -> None:
    class Cheapest(Stateless):
        name = "cheapest"

        def decide(self, view: View) -> Proposal:
            return Proposal([0] * len(view.kinds))

    async def scenario(bench: Bench) -> None:
        low, high = await asyncio.gather(bench.send(floor=0), bench.send(floor=2))
        (batch,) = bench.backend.batches
        assert (batch.slots.tolist(), batch.num_selected_experts.tolist()) == ([[1], [2]], [[1], [1]])
        assert [answer.rung.accuracy for answer in (low, high)] == [0.8, 0.85]
        assert [(answer.degraded, answer.reason) for answer in (low, high)] == [(True, "load")] * 2
        assert bench.value("vmoe_served_images_total", operating_point="(0.5, 1)", budget="auto") == 1
        assert bench.value("vmoe_degraded_images_total", budget="auto") == 2
        assert bench.value("vmoe_effective_accuracy_total", budget="auto") == pytest.approx(1.65)

    run(scenario, Cheapest())


def test_engine_when_a_point_is_pinned_off_the_ladder_then_it_is_that_one() -> None:
    async def scenario(bench: Bench) -> None:
        pinned, charged = pin(small_manifest(), LADDER, 4.0, 1)
        request = Request(0, 1, Budget("custom", charged, charged, 1), charged, charged, pinned=True)
        answer = await bench.engine.infer(request, Work(np.zeros((8, 8, 1), np.uint8), False, pinned))
        assert bench.backend.batches[0].slots.tolist() == [[5]]
        assert (answer.rung, answer.reason, answer.degraded) == (pinned, "pinned", False)
        assert bench.value("vmoe_served_images_total", operating_point="custom", budget="custom") == 1

    run(scenario)


def test_engine_when_a_deadline_cannot_be_met_then_it_is_refused_at_once() -> None:
    async def scenario(bench: Bench) -> None:
        # 8 images take 0.45 s: the ninth would be done at 0.1 + 0.45 + 0.1 s at best.
        for _ in range(9):
            bench.send()
            await until_queued()
        with pytest.raises(Overloaded) as refused:
            await bench.send(deadline_s=0.11)
        assert now_s() == 0
        assert refused.value.retry_after_s == 1
        with pytest.raises(Overloaded):
            bench.engine.check([Request(0, 0.11, AUTO, 3, 3)])
        await asyncio.gather(*bench.tasks[:9])
        assert bench.value("vmoe_offered_images_total", budget="auto") == 11
        assert bench.value("vmoe_admitted_images_total", budget="auto") == 9
        assert bench.value("vmoe_shed_images_total", budget="auto", reason="deadline") == 2
        assert bench.value("vmoe_deadline_images_total", budget="auto", outcome="met") == 9

    run(scenario)


def test_engine_when_decoding_took_the_time_then_it_says_so_and_does_not_ask_to_try_again() -> None:
    async def scenario(bench: Bench) -> None:
        request, work = Request(now_s(), now_s() + 0.5, AUTO, 3, 3), Work(np.zeros((8, 8, 1), np.uint8), False)
        bench.engine.check([request])
        await asyncio.sleep(0.45)  # 50 ms are left, one image takes 100
        with pytest.raises(
            DeadlineExceeded, match="decoding took 450 ms of the 500 ms allowed, and an image takes 100"
        ) as late:
            await bench.engine.infer(request, work)
        assert late.value.retry_after_s is None
        await asyncio.sleep(0.2)  # passed
        with pytest.raises(DeadlineExceeded, match="decoding took 650 ms of the 500 ms allowed"):
            await bench.engine.infer(request, work)
        assert bench.value("vmoe_offered_images_total", budget="auto") == 2
        assert bench.value("vmoe_shed_images_total", budget="auto", reason="decoding") == 2

    run(scenario)


def test_engine_when_a_budget_leaves_others_no_room_then_it_is_told_so() -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(10):
            bench.send()
        await until_queued()
        greedy = Budget("greedy", 3, 3, deadline_s=2.0, weight=0.01)
        work = Work(np.zeros((8, 8, 1), np.uint8), False)
        # The first budget is expected to need 10 images/s * 0.45 s / 8, which leaves 0.9 of the next 2 s: 15 images.
        requests = [Request(0, 2, greedy, 3, 3) for _ in range(20)]
        tasks = [asyncio.create_task(bench.engine.infer(request, work)) for request in requests]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {Inference, OverShare}
        assert bench.value("vmoe_shed_images_total", budget="greedy", reason="share") >= 1

    run(scenario)


def test_engine_when_the_queue_is_full_then_it_says_so() -> None:
    async def scenario(bench: Bench) -> None:
        bench.send()
        await until_queued()
        bench.send()
        await until_queued()
        with pytest.raises(QueueFull, match="1 images wait and 1 more do not fit: at most 1"):
            await bench.send()
        await asyncio.gather(*bench.tasks[:2])

    run(scenario, max_requests=1)


def test_engine_when_bytes_run_out_then_the_queue_is_full() -> None:
    async def scenario(bench: Bench) -> None:
        bench.send()
        await until_queued()
        bench.send()
        await until_queued()
        with pytest.raises(QueueFull, match="64 bytes wait"):
            await bench.send()
        assert bench.value("vmoe_shed_images_total", budget="auto", reason="queue_bytes") == 1
        assert bench.value("vmoe_queue_bytes") == 64

    run(scenario, max_bytes=100)


def test_engine_when_an_answer_is_a_little_late_then_it_still_comes_and_counts_as_missed() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.slow_down = 10.4
        answer = await bench.send(deadline_s=1.0)
        assert (answer.deadline_met, answer.inference_s) == (False, pytest.approx(1.04))
        assert bench.value("vmoe_deadline_images_total", budget="auto", outcome="missed") == 1
        assert bench.value("vmoe_effective_accuracy_total", budget="auto") == 0
        assert bench.value("vmoe_batch_latency_ratio_sum") == pytest.approx(10.4)

    run(scenario)


def test_engine_when_a_batch_takes_too_long_then_each_image_hears_at_its_own_deadline() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.slow_down = 8  # four images take 0.25 s, now 2 s
        heard: dict[int, tuple[float, str]] = {}

        async def client(pixel: int, deadline_s: float) -> None:
            try:
                await bench.send(pixel, deadline_s)
            except DeadlineExceeded as error:
                heard[pixel] = (now_s(), str(error))
            else:
                heard[pixel] = (now_s(), "answered")

        await asyncio.gather(client(0, 1.5), client(1, 0.5), client(2, 3.0), client(3, 0.5))
        assert [len(batch) for batch in bench.pixels()] == [4]
        # 50 ms of grace each.
        assert {pixel: at_s for pixel, (at_s, _) in heard.items()} == pytest.approx({1: 0.55, 3: 0.55, 0: 1.55, 2: 2})
        assert [heard[pixel][1] for pixel in (1, 0, 2)] == [
            "the model did not answer within 500 ms",
            "the model did not answer within 1500 ms",
            "answered",
        ]
        # The batch was one batch to the end, and nobody is counted twice.
        assert bench.value("vmoe_batch_size_sum") == 4
        assert bench.value("vmoe_deadline_images_total", budget="auto", outcome="missed") == 3
        assert bench.value("vmoe_deadline_images_total", budget="auto", outcome="met") == 1

    run(scenario)


def test_engine_when_a_batch_never_ends_then_its_clients_hear_and_the_backend_is_not_interrupted() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.cancellable = True
        bench.backend.slow_down = 1e6
        outcomes = await asyncio.gather(bench.send(0), bench.send(1), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 2
        assert now_s() == pytest.approx(1.05)
        await until_queued()
        # It has the deadline, too, and learns from a call that exceeds it more than from one that is cancelled.
        assert len(bench.scheduler.running) == 1

    run(scenario)


def test_engine_when_a_batch_fails_after_one_of_it_was_told_then_only_the_others_hear_of_the_failure() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.slow_down, bench.backend.failure = 10, BackendUnavailable("the server is gone")
        outcomes = await asyncio.gather(bench.send(0, 0.5), bench.send(1, 2.0), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded, BackendUnavailable]
        assert now_s() == pytest.approx(1.5)
        assert bench.value("vmoe_deadline_images_total", budget="auto", outcome="missed") == 1
        assert bench.value("vmoe_failed_images_total", budget="auto", code="backend_unavailable") == 1

    run(scenario)


def test_engine_when_a_batch_hangs_then_a_request_that_waits_fails_at_its_deadline() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.slow_down = 20
        first = bench.send()
        await until_queued()
        with pytest.raises(DeadlineExceeded, match="waited 500 ms and cannot be answered within 500 ms"):
            await bench.send(1, deadline_s=0.5)
        with pytest.raises(DeadlineExceeded, match="the model did not answer within 1000 ms"):
            await first
        assert bench.pixels() == [[0]]
        assert bench.value("vmoe_deadline_images_total", budget="auto", outcome="missed") == 2

    run(scenario)


def test_engine_when_client_cancels_in_the_queue_then_its_image_is_never_inferred() -> None:
    async def scenario(bench: Bench) -> None:
        bench.send(0)
        await until_queued()
        gone, stays = bench.send(1), bench.send(2)
        await until_queued()
        gone.cancel()
        await stays
        assert gone.cancelled()
        assert bench.pixels() == [[0], [2]]
        assert bench.value("vmoe_cancelled_images_total", budget="auto") == 1

    run(scenario)


def test_engine_when_client_cancels_while_its_batch_runs_then_mates_are_answered() -> None:
    async def scenario(bench: Bench) -> None:
        gone, stays = bench.send(1), bench.send(2)
        await asyncio.sleep(0.05)
        gone.cancel()
        assert int((await stays).classes[0]) == 2
        assert bench.pixels() == [[1, 2]]

    run(scenario)


def test_engine_when_clients_of_a_full_queue_have_gone_then_there_is_room_at_once() -> None:
    async def scenario(bench: Bench) -> None:
        bench.send(0)
        await until_queued()
        gone = [bench.send(1, deadline_s=9) for _ in range(4)]
        await until_queued()
        for task in gone:
            task.cancel()
        await until_queued()
        assert int((await bench.send(3)).classes[0]) == 3
        assert bench.pixels() == [[0], [3]]

    run(scenario, max_requests=4)


def test_engine_when_clients_cancel_at_any_time_then_everybody_else_is_answered_once_and_nothing_is_left() -> None:
    async def scenario(bench: Bench) -> None:
        chance = random.Random(0)
        outcomes: list[tuple[int, str]] = []

        async def client(number: int) -> None:
            await asyncio.sleep(chance.expovariate(1 / 20))
            task = bench.send(number % 4, deadline_s=chance.uniform(0.05, 2), floor=chance.choice((0, 2, 3)))
            patience = asyncio.get_running_loop().call_later(chance.expovariate(2), task.cancel)
            try:
                answer = await task
            except asyncio.CancelledError:
                outcomes.append((number, "cancelled"))
            except GatewayError as error:
                outcomes.append((number, error.code))
            else:
                assert int(answer.classes[0]) == number % 4
                outcomes.append((number, "answered"))
            finally:
                patience.cancel()

        clients = 1000
        await asyncio.gather(*(client(number) for number in range(clients)))
        assert sorted(number for number, _ in outcomes) == list(range(clients))
        kinds = [kind for _, kind in outcomes]
        assert min(kinds.count(kind) for kind in ("answered", "cancelled", "overloaded")) > 20, "it tests nothing"
        offered = bench.value("vmoe_offered_images_total", budget="auto")
        shed = sum(
            bench.value("vmoe_shed_images_total", budget="auto", reason=reason) for reason in ("deadline", "too_short")
        )
        ended = bench.value("vmoe_cancelled_images_total", budget="auto") + sum(
            bench.value("vmoe_deadline_images_total", budget="auto", outcome=outcome) for outcome in ("met", "missed")
        )
        assert offered == shed + ended

    run(scenario, Foresight(ForesightConfig()), workers=2)


def test_engine_when_backend_fails_then_only_that_batch_fails() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.failure = RuntimeError("secret detail")
        failed = await asyncio.gather(bench.send(0), bench.send(1), return_exceptions=True)
        assert all(isinstance(error, InferenceFailed) and "secret" not in str(error) for error in failed)
        bench.backend.failure = None
        assert int((await bench.send(3)).classes[0]) == 3

    run(scenario)


def test_engine_when_the_policy_fails_then_those_who_wait_fail_and_the_next_are_served() -> None:
    class Flaky(Stateless):
        name = "flaky"
        broken = True

        def decide(self, view: View) -> Proposal:
            if self.broken:
                raise ZeroDivisionError("secret detail")
            return Proposal([3])

    policy = Flaky()

    async def scenario(bench: Bench) -> None:
        with pytest.raises(InferenceFailed, match="the scheduler failed"):
            await bench.send(0)
        policy.broken = False
        assert int((await bench.send(1)).classes[0]) == 1

    run(scenario, policy)


def test_engine_when_logits_are_not_finite_then_the_image_fails() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.poison = True
        with pytest.raises(InferenceFailed, match="not finite"):
            await bench.send(0)

    run(scenario)


def test_engine_when_one_of_a_batch_wants_explanation_then_the_others_get_none() -> None:
    async def scenario(bench: Bench) -> None:
        plain, explained = await asyncio.gather(bench.send(0), bench.send(1, explain=True))
        assert len(bench.backend.batches) == 1
        assert plain.token_experts is None
        assert explained.token_experts is not None

    run(scenario)


def test_engine_when_nobody_wants_explanation_then_the_backend_is_not_asked() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(0)
        assert [batch.explain for batch in bench.backend.batches] == [False]

    run(scenario)


def test_close_when_images_run_and_wait_then_all_are_refused_and_so_are_new_ones() -> None:
    async def scenario(bench: Bench) -> None:
        running = bench.send(0)
        await until_queued()
        queued = bench.send(1)
        await until_queued()
        await bench.engine.close()
        outcomes = await asyncio.gather(running, queued, bench.send(2), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ShuttingDown] * 3
        assert now_s() == 0

    run(scenario)


def test_close_when_a_batch_was_chosen_but_has_not_begun_then_its_images_are_refused_too() -> None:
    async def scenario(bench: Bench) -> None:
        task = bench.send(0)
        await asyncio.sleep(0)  # the request is queued
        await asyncio.sleep(0)  # the batch has a task
        assert bench.scheduler.running
        assert not bench.backend.batches
        await bench.engine.close()
        with pytest.raises(ShuttingDown):
            await task

    run(scenario)


def test_backend_when_it_has_no_worker_left_then_whoever_waits_and_comes_is_refused_until_it_has() -> None:
    async def scenario(bench: Bench) -> None:
        running = bench.send(0)
        await until_queued()
        waiting = bench.send(1)
        await until_queued()
        bench.backend.num_workers = 0
        bench.engine.wake()
        with pytest.raises(BackendUnavailable):
            await waiting
        with pytest.raises(BackendUnavailable):
            await bench.send(2)
        assert now_s() == 0
        assert (await running).deadline_met
        bench.backend.num_workers = 1
        bench.engine.wake()
        assert int((await bench.send(3)).classes[0]) == 3
        assert bench.value("vmoe_failed_images_total", budget="auto", code="backend_unavailable") == 1
        assert bench.value("vmoe_shed_images_total", budget="auto", reason="backend") == 1

    run(scenario)


def test_backend_when_it_fails_with_a_reason_then_clients_get_it_and_the_books_balance() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.failure = DeadlineExceeded("the server did not answer in time")
        with pytest.raises(DeadlineExceeded, match="the server did not answer"):
            await bench.send(0)
        bench.backend.failure = BackendUnavailable("the server is gone")
        with pytest.raises(BackendUnavailable, match="the server is gone"):
            await bench.send(0)
        assert bench.value("vmoe_admitted_images_total", budget="auto") == 2
        assert bench.value("vmoe_deadline_images_total", budget="auto", outcome="missed") == 1
        assert bench.value("vmoe_failed_images_total", budget="auto", code="backend_unavailable") == 1

    run(scenario)


@pytest.mark.parametrize("cancellable", [True, False])
def test_cancel_when_all_clients_of_a_batch_have_gone_then_it_is_stopped_if_that_frees_the_worker(
    cancellable: bool,
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.cancellable = cancellable
        pair = [bench.send(0), bench.send(1)]
        await until_queued()
        pair[0].cancel()
        await until_queued()
        assert len(bench.scheduler.running) == 1
        pair[1].cancel()
        await until_queued()
        assert len(bench.scheduler.running) == (0 if cancellable else 1)
        await bench.send(2)
        # Two images take 0.15 s, which the third waits for unless they were stopped; alone it takes 0.1 s.
        assert now_s() == pytest.approx(0.1 if cancellable else 0.25)

    run(scenario)


def test_cancel_when_the_batch_has_not_begun_then_its_worker_comes_back() -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend.cancellable = True
        task = bench.send(0)
        await asyncio.sleep(0)  # the request is queued
        await asyncio.sleep(0)  # the batch has a task
        assert bench.scheduler.running
        assert not bench.backend.batches
        task.cancel()
        await until_queued()
        assert not bench.scheduler.running
        await bench.send(1)

    run(scenario)


def test_gauges_when_scraped_then_they_show_the_moment() -> None:
    async def scenario(bench: Bench) -> None:
        bench.send()
        await until_queued()
        bench.send()
        await asyncio.sleep(0.06)
        assert bench.value("vmoe_queue_images") == 1
        assert bench.value("vmoe_queue_oldest_seconds") == pytest.approx(0.06)
        assert bench.value("vmoe_running_batches") == 1
        assert bench.value("vmoe_arrival_rate_hertz") > 0
        assert bench.value("vmoe_latency_scale_ratio") == 1
        await asyncio.gather(*bench.tasks)
        assert bench.value("vmoe_decision_seconds_count") == 2
        assert bench.value("vmoe_batch_predicted_seconds_sum") == pytest.approx(0.2)
        assert bench.value("vmoe_batch_seconds_sum") == pytest.approx(0.2)

    run(scenario)
