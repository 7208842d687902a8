"""Admission, batches and shares, worked out by hand. Times are in seconds; batches take 2 ms and 1 to 2 ms an image."""

from __future__ import annotations

import pytest

from server.budgets import Budget
from server.deadline_queue import Request
from server.decision import Refusal
from server.policies.base import Proposal, Stateless, View
from server.policies.fixed import Fixed
from server.policies.foresight import Foresight, ForesightConfig
from server.scheduler import Limits, Scheduler
from tests.server.ladders import AUTO, FULL, MAX_BATCH, ladder, latency, request, scheduler


class Propose(Stateless):
    """Proposes what it is told, whether that makes sense or not."""

    name = "propose"

    def __init__(self, *rungs: int) -> None:
        self.rungs = list(rungs)

    def decide(self, view: View) -> Proposal:
        return Proposal(self.rungs)


HIGH = latency().high_factor(8)  # 1.026: the 90 % quantile over the median


def admitted(target: Scheduler, *requests: Request, now: float = 0.0) -> None:
    for entry in requests:
        assert target.offer(entry, now) is None


def test_offer_when_the_floor_plan_is_in_time_then_it_is_admitted_until_it_is_not() -> None:
    # A batch of 8 at rung 0 takes (2 + 8 * 1.0) ms * 1.026 = 10.26 ms: nine such batches fit into 100 ms, ten do not.
    target = scheduler(Propose(0))
    answers = [target.offer(request(), 0.0) for _ in range(81)]
    # of the tenth batch, 7.7 ms remain: (2 + 5) * 1.026 = 7.2 fits, (2 + 6) * 1.026 = 8.2 does not
    assert sum(answer is None for answer in answers) == 9 * 8 + 5
    refusal = answers[-1]
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "deadline"
    assert refusal.retry_after_s == pytest.approx(9 * 0.010 * HIGH + 0.008 * HIGH - 0.1, abs=1e-4)
    assert "77 images wait and 0 are in batches" in refusal.detail


def test_offer_when_a_batch_runs_then_its_predicted_end_counts() -> None:
    target = scheduler(Propose(*[3] * 8))
    admitted(target, *[request() for _ in range(8)])
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    # it ends at 18 * 1.026 = 18.5 ms; then at least 3 * 1.026 = 3.1 ms
    assert target.offer(request(deadline_s=0.0210), 0.001) is not None
    assert target.offer(request(deadline_s=0.0220), 0.001) is None


def test_offer_when_the_policy_never_degrades_then_admission_promises_the_ceiling() -> None:
    target = scheduler(Fixed())
    # 18.5 ms a batch of 8 at the full rung: five in 100 ms, and (2 + 2 * 1) * 1.026 = 4.1 ms of the 7.6 ms left
    assert sum(target.offer(request(), 0.0) is None for _ in range(80)) == 5 * 8 + 2


def test_offer_when_an_urgent_request_would_make_an_admitted_one_late_then_it_is_refused() -> None:
    target = scheduler(Propose(0))
    admitted(target, *[request() for _ in range(77)])
    refusal = target.offer(request(deadline_s=0.02), 0.0)
    assert refusal is not None
    assert refusal.reason == "deadline"
    assert len(target.queue) == 77


def test_offer_when_full_then_requests_and_bytes_are_bounded() -> None:
    target = scheduler(max_requests=2, max_bytes=100)
    admitted(target, request(size_bytes=60))
    by_bytes = target.offer(request(size_bytes=50), 0.0)
    admitted(target, request(size_bytes=40))
    by_count = target.offer(request(), 0.0)
    assert by_bytes is not None
    assert by_bytes.reason == "queue_bytes"
    assert by_count is not None
    assert by_count.reason == "queue_full"


def test_offer_when_one_request_exceeds_all_bytes_then_it_is_refused_by_an_empty_queue_too() -> None:
    refusal = scheduler(max_bytes=10).offer(request(size_bytes=11), 0.0)
    assert refusal is not None
    assert refusal.reason == "queue_bytes"


def test_check_when_it_would_be_admitted_then_nothing_is_left_behind() -> None:
    target = scheduler(Propose(0))
    assert target.check([request()], 0.0) is None
    assert (len(target.queue), target.has_work, target.arrival_rate_hz(0.0)) == (0, False, 0)


def test_check_when_it_would_be_refused_then_it_counts_as_an_arrival() -> None:
    target = scheduler(Propose(0))
    assert target.check([request(deadline_s=0.001)], 0.0) is not None
    assert target.arrival_rate_hz(0.0) > 0


class CountShed(Propose):
    """Remembers how often it heard of a refusal."""

    heard = 0

    def shed(self, now: float) -> None:
        self.heard += 1


def test_offer_when_an_idle_gateway_could_not_either_then_there_is_no_point_in_trying_again() -> None:
    policy = CountShed(0)
    target = scheduler(policy)
    # One image takes (2 + 1) * 1.026 = 3.08 ms.
    too_short = target.offer(request(deadline_s=0.003), 0.0)
    assert too_short is not None
    assert (too_short.reason, too_short.retry_after_s) == ("too_short", None)
    assert too_short.detail.startswith(
        "an image takes 3.1 ms on an idle gateway, at the cheapest operating point allowed, "
    )
    assert policy.heard == 0  # nothing that a cheaper operating point could change
    assert target.offer(request(deadline_s=0.0031), 0.0) is None


def test_offer_when_decoding_took_the_time_then_it_says_how_much() -> None:
    target = scheduler(Propose(0))
    for now, spent in ((0.098, "98"), (0.12, "120")):
        refusal = target.offer(request(), now)
        assert refusal is not None
        assert (refusal.reason, refusal.retry_after_s) == ("decoding", None)
        assert f"decoding took {spent} ms of the 100 ms allowed" in refusal.detail
    assert target.offer(request(), 0.0965) is None  # 3.5 ms are left for 3.1


def test_check_when_a_form_fits_only_in_part_then_it_is_refused_as_a_whole() -> None:
    # 77 images fit into 100 ms, see above.
    target = scheduler(Propose(0))
    assert target.check([request() for _ in range(77)], 0.0) is None
    refusal = target.check([request() for _ in range(78)], 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s, len(target.queue)) == ("too_short", None, 0)
    assert refusal.detail.startswith("78 images take longer than the 100 ms allowed even on an idle gateway")
    assert "at most 77 in a form" in refusal.detail


def test_check_when_others_wait_then_a_form_that_an_idle_gateway_would_take_may_come_again() -> None:
    target = scheduler(Propose(0))
    admitted(target, *[request() for _ in range(20)])
    refusal = target.check([request() for _ in range(60)], 0.0)
    assert refusal is not None
    assert refusal.reason == "deadline"
    assert refusal.retry_after_s is not None
    assert refusal.detail.startswith("20 images wait and 0 are in batches: 100 ms are left")
    assert len(target.queue) == 20
    assert target.check([request() for _ in range(57)], 0.0) is None


def test_check_when_another_class_is_active_then_a_form_that_never_fits_hears_that_and_not_of_shares() -> None:
    target = scheduler(Propose(0))
    other, now = Budget("other", 0, FULL, 0.1), 0.0
    for _ in range(40):
        now += 0.025
        admitted(target, request(now, other), now=now)
        batch, _ = target.next_batch(now)
        assert batch is not None
        target.on_batch_done(batch, now + batch.median_s)
    # The other's 40 Hz * 1.25 ms reserve up to 5 % of the machine; 100 ms hold 80 images of 1.25 ms.
    refusals = [target.check([request(now) for _ in range(images)], now) for images in (81, 78)]
    assert [refusal and refusal.reason for refusal in refusals] == ["too_short", "share"]
    assert refusals[1] is not None
    assert refusals[1].detail == "budget 'auto' has no share for 78 images more"


def test_check_when_two_workers_are_idle_then_a_form_may_be_as_large_as_both_can_take() -> None:
    target = scheduler(Propose(0), workers=2)
    # nine full batches for each, and five images in one more
    assert target.check([request() for _ in range(2 * 9 * 8 + 5)], 0.0) is None
    refusal = target.check([request() for _ in range(2 * 9 * 8 + 6)], 0.0)
    assert refusal is not None
    assert "at most 149 in a form" in refusal.detail


def test_check_when_a_form_exceeds_the_queue_then_all_its_images_count() -> None:
    refusals = [
        scheduler(max_requests=2).check([request() for _ in range(3)], 0.0),
        scheduler(max_bytes=100).check([request(size_bytes=40) for _ in range(3)], 0.0),
    ]
    assert [refusal and refusal.reason for refusal in refusals] == ["queue_full", "queue_bytes"]


def test_batch_when_the_proposal_is_in_time_then_it_runs_as_proposed() -> None:
    target = scheduler(Propose(3, 1))
    first, second, third = (request(deadline_s=0.1 + i) for i in range(3))
    admitted(target, first, second, third)
    batch, late = target.next_batch(0.0)
    assert batch is not None
    assert (batch.requests, batch.rungs, batch.reasons, late) == ([first, second], [3, 1], ["ceiling", "load"], [])
    assert batch.median_s == pytest.approx(0.002 + 0.002 + 0.0012)
    assert target.next_batch(0.0) == (None, [])  # the worker is busy
    target.on_batch_done(batch, 0.005)
    batch, _ = target.next_batch(0.005)
    assert batch is not None
    assert batch.requests == [third]


def test_batch_when_the_proposal_leaves_a_range_then_it_is_moved_into_it() -> None:
    target = scheduler(Propose(0, 3))
    admitted(target, request(floor=2, ceiling=2), request(ceiling=1, deadline_s=0.11))
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    assert batch.rungs == [2, 1]


def test_batch_when_the_proposal_would_be_late_then_the_floor_plan_runs() -> None:
    target = scheduler(Propose(3, 3, 3, 3))
    # 4 at rung 3: 10 * 1.026 = 10.3 ms; at rung 0: 6.2 ms
    admitted(target, *[request(deadline_s=0.008) for _ in range(4)])
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    assert batch.rungs == [0, 0, 0, 0]
    assert set(batch.reasons) == {"slack"}


def test_batch_when_the_proposal_would_make_the_rest_late_then_the_floor_plan_runs() -> None:
    target = scheduler(Propose(*[3] * 8))
    # 8 at rung 3 end at 18.5 ms, then 8 at rung 0 at 28.7 ms; with rung 0 twice, the last is done at 20.5 ms
    admitted(target, *[request(deadline_s=0.022 if i < 8 else 0.023) for i in range(16)])
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    assert batch.rungs == [0] * 8
    assert set(batch.reasons) == {"load"}  # its own deadline would have allowed more


def test_batch_when_a_pinned_request_waits_then_nothing_changes_its_point() -> None:
    target = scheduler(Propose(0))
    pinned = request(floor=3, ceiling=3)
    pinned.pinned = True
    admitted(target, pinned)
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    assert (batch.rungs, batch.reasons) == ([3], ["pinned"])


def test_batch_when_a_deadline_has_become_impossible_then_the_request_leaves_unserved() -> None:
    target = scheduler(Propose(0))
    doomed, fine = request(deadline_s=0.01), request(deadline_s=0.02)
    admitted(target, doomed, fine)
    batch, late = target.next_batch(0.0075)  # 2.5 ms are left, 3 ms are needed
    assert late == [doomed]
    assert batch is not None
    assert batch.requests == [fine]


def test_batch_when_a_slow_batch_broke_the_promise_then_as_many_as_save_the_head_run() -> None:
    target = scheduler(Propose(*[3] * 8))
    admitted(target, *[request(deadline_s=0.012) for _ in range(8)])
    # 6.5 ms remain: (2 + 4) * 1.026 = 6.2 ms fits, five do not
    batch, late = target.next_batch(0.0055)
    assert batch is not None
    assert (len(batch.requests), batch.rungs, late) == (4, [0] * 4, [])


def test_batch_when_a_stricter_class_is_active_then_batches_stay_within_half_its_deadline() -> None:
    strict, lax = Budget("strict", 0, FULL, 0.012), Budget("lax", 0, FULL, 10.0)
    target = scheduler(Propose(*[3] * 8))
    admitted(target, request(budget=strict), *[request(budget=lax) for _ in range(20)])
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    # within 6 ms: (2 + 3 * 1) * 1.026 = 5.1 ms, four would take 6.2 ms
    assert (len(batch.requests), batch.high_s <= 0.006) == (3, True)


def test_workers_when_two_are_free_then_two_batches_start() -> None:
    target = scheduler(Propose(3), workers=2)
    admitted(target, request(), request(), request())
    batches = [target.next_batch(0.0)[0] for _ in range(3)]
    assert [batch is None for batch in batches] == [False, False, True]
    assert target.free_workers == 0


def test_workers_when_two_run_then_about_twice_as_much_is_admitted() -> None:
    one, two = scheduler(Propose(0)), scheduler(Propose(0), workers=2)
    count = [sum(target.offer(request(), 0.0) is None for _ in range(200)) for target in (one, two)]
    # nine full batches for each worker; the plan puts the next 5 into one batch, where a sixth would be late
    assert count == [9 * 8 + 5, 2 * 9 * 8 + 5]


def test_workers_when_another_one_is_idle_then_the_rest_of_the_queue_is_planned_for_it() -> None:
    target = scheduler(Propose(*[1] * 8), workers=2)
    # 8 at rung 1 take (2 + 8 * 1.2) * 1.026 = 11.9 ms; one worker could not serve the other 8 in 13 ms as well
    admitted(target, *[request(deadline_s=0.013) for _ in range(16)])
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    assert batch.rungs == [1] * 8


def test_share_when_a_class_floods_then_another_still_gets_in() -> None:
    flood, trickle = Budget("flood", 0, FULL, 0.1), Budget("trickle", 0, FULL, 0.1)
    target = scheduler(Propose(0))
    # both are known to the scheduler: 40 arrivals in the last second make 40 Hz * 1.25 ms = 5 % of the machine
    now = 0.0
    for _ in range(40):
        now += 0.025
        target.offer(request(now, trickle), now)
        while target.has_work:
            batch, _ = target.next_batch(now)
            assert batch is not None
            target.on_batch_done(batch, now + batch.median_s)
    reasons = [refusal.reason for _ in range(100) if (refusal := target.offer(request(now, flood), now)) is not None]
    assert reasons[0] == "share"
    assert target.offer(request(now, trickle), now) is None


def test_share_when_nobody_else_is_active_then_one_class_may_fill_the_queue() -> None:
    target = scheduler(Propose(0))
    admitted(target, request(0.0, Budget("other", 0, FULL, 0.1)))
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    target.on_batch_done(batch, 0.003)
    refusals = [target.offer(request(10.0), 10.0) for _ in range(100)]
    assert {refusal.reason for refusal in refusals if refusal is not None} == {"deadline"}


def test_cancel_when_waiting_then_it_never_runs_and_its_share_is_given_back() -> None:
    target = scheduler(Propose(0, 0, 0))
    gone, stays = request(), request()
    admitted(target, gone, stays)
    assert target.cancel(gone)
    batch, late = target.next_batch(0.0)
    assert batch is not None
    assert (batch.requests, batch.rungs, late) == ([stays], [0], [])
    assert not target.cancel(stays)


def test_cancel_when_everybody_has_gone_then_there_is_no_batch() -> None:
    target = scheduler(Propose(0))
    gone = request()
    admitted(target, gone)
    target.cancel(gone)
    assert (target.has_work, target.next_batch(0.0), len(target.queue)) == (False, (None, []), 0)


def test_done_when_the_batch_was_slow_then_later_predictions_are_longer() -> None:
    target = scheduler(Propose(3))
    admitted(target, request())
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    target.on_batch_done(batch, 3 * batch.median_s)
    assert target.latency.predict_s([3]) > batch.median_s


def test_done_when_the_batch_failed_then_the_worker_is_free_and_nothing_is_learned() -> None:
    target = scheduler(Propose(3))
    admitted(target, request())
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    target.on_batch_done(batch, 3 * batch.median_s, failed=True)
    assert target.free_workers == 1
    assert target.latency.predict_s([3]) == batch.median_s


def test_use_when_the_policy_changes_then_what_is_admitted_keeps_its_range() -> None:
    target = scheduler(Propose(0))
    admitted(target, request(floor=1))
    target.use(Propose(0))
    batch, _ = target.next_batch(0.0)
    assert batch is not None
    assert batch.rungs == [1]


class Broken(Stateless):
    """A policy with a mistake."""

    name = "broken"

    def decide(self, view: View) -> Proposal:
        raise ZeroDivisionError


def test_clear_when_a_policy_failed_then_those_that_were_late_are_handed_back_too() -> None:
    target = scheduler(Broken())
    late, waiting = request(deadline_s=0.01), request(deadline_s=0.1)
    admitted(target, late, waiting)
    with pytest.raises(ZeroDivisionError):
        target.next_batch(0.02)
    assert target.clear() == [late, waiting]


def test_use_when_the_horizon_changes_then_arrivals_are_measured_anew() -> None:
    target = scheduler(Propose(0))
    admitted(target, request())
    target.use(Propose(0), 0.1)  # the one it has
    assert target.arrival_rate_hz(0.0) > 0
    target.use(Propose(0), 0.05)
    assert target.arrival_rate_hz(0.0) == 0


def test_clear_when_stopping_then_everybody_is_handed_back() -> None:
    target = scheduler(Propose(0))
    entries = [request(), request()]
    admitted(target, *entries)
    assert target.clear() == entries
    assert not target.has_work


def test_scheduler_when_batches_exceed_the_latency_model_then_it_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 8"):
        Scheduler(ladder(), latency(), Fixed(), Limits(max_batch_size=MAX_BATCH + 1))


def test_age_when_requests_wait_then_it_is_that_of_the_oldest_alive() -> None:
    target = scheduler(Propose(0))
    gone = request(0.0, AUTO)
    admitted(target, gone)
    admitted(target, request(0.02), now=0.02)
    assert target.oldest_age_s(0.03) == pytest.approx(0.03)
    target.cancel(gone)
    assert target.oldest_age_s(0.03) == pytest.approx(0.01)


def test_workers_when_one_is_taken_away_then_the_batch_that_ends_first_frees_nobody() -> None:
    # One image takes 4 ms, 4.1 at the quantile: batches end at 4.1 and 7.1 ms; only the later end gives a worker.
    two = scheduler(workers=2)
    for start_s in (0.0, 0.003):
        assert two.offer(request(start_s), start_s) is None
        assert two.next_batch(start_s)[0] is not None
    two.workers = 1
    assert two.free_workers == 0
    assert two.offer(request(0.003, deadline_s=0.011), 0.003) is not None  # 4.1 + 4.1 would do, 7.1 + 4.1 does not
    assert two.offer(request(0.003, deadline_s=0.012), 0.003) is None
    two.on_batch_done(two.running[0], 0.004)
    assert two.next_batch(0.004) == (None, [])


def test_workers_when_none_is_left_then_everybody_is_refused_with_the_reason() -> None:
    none = scheduler()
    assert none.offer(request(), 0.0) is None
    none.workers = 0
    refusal = none.offer(request(), 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("backend", 1.0)
    assert none.next_batch(0.0) == (None, [])
    assert len(none.clear()) == 1


def test_floors_only_when_set_then_the_policy_is_not_asked_and_ranges_hold() -> None:
    fallback = scheduler(Foresight(ForesightConfig()))
    fallback.floors_only = True
    requests = [request(), request(floor=2), request(floor=FULL)]
    for each in requests:
        assert fallback.offer(each, 0.0) is None
    batch, _ = fallback.next_batch(0.0)
    assert batch is not None
    assert batch.rungs == [0, 2, FULL]
    assert batch.reasons == ["fallback", "fallback", "ceiling"]
