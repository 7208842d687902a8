"""Each policy's rule on views worked out by hand, and what all of them owe the scheduler. Rungs as in `ladders`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from server.policies.aimd import Aimd, AimdConfig
from server.policies.base import Forecast, Kind, Policy, View
from server.policies.fixed import Fixed
from server.policies.foresight import Foresight, ForesightConfig
from server.policies.proteus import Proteus, ProteusConfig
from server.policies.queue_depth import QueueDepth, QueueDepthConfig
from server.policies.slackfit import SlackFit, SlackFitConfig
from tests.server.ladders import FULL, MAX_BATCH, ladder, latency

AUTO = Kind(0, FULL, 1.0)


def view(
    waiting: int,
    *,
    slack_s: float = 0.1,
    rate_hz: float = 0.0,
    now: float = 0.0,
    kinds: Sequence[Kind] | None = None,
    fits: Callable[[Sequence[int], float], bool] = lambda rungs, now: True,
    batch_limit_s: float = 0.05,
) -> View:
    kinds = list(kinds or [AUTO] * waiting)
    return View(
        now=now,
        deadlines=[now + slack_s] * waiting,
        kinds=kinds,
        waiting=Counter(kinds),
        arrival_rates_hz={AUTO: rate_hz} if rate_hz else {},
        forecasts=[Forecast(0.1, 0.1 * rate_hz, 0.1 * rate_hz), Forecast(1.0, rate_hz, rate_hz)],
        busy_until_s=(),
        workers=1,
        batch_limit_s=batch_limit_s,
        max_batch_size=MAX_BATCH,
        ladder=ladder(),
        latency=latency(),
        keeps_promise=fits,
    )


def foresight() -> Foresight:
    return Foresight(ForesightConfig())


@pytest.mark.parametrize(
    "policy",
    [
        Fixed(),
        QueueDepth(QueueDepthConfig()),
        Aimd(AimdConfig()),
        SlackFit(SlackFitConfig()),
        Proteus(ProteusConfig()),
        foresight(),
    ],
    ids=lambda policy: policy.name,
)
@pytest.mark.parametrize("waiting", [1, 3, 8, 30])
def test_policy_when_asked_then_it_proposes_a_prefix_on_the_ladder(policy: Policy, waiting: int) -> None:
    rungs = policy.decide(view(waiting)).rungs
    assert 1 <= len(rungs) <= min(waiting, MAX_BATCH)
    assert all(0 <= rung <= FULL for rung in rungs)


def test_fixed_when_asked_then_everybody_gets_the_ceiling() -> None:
    kinds = [Kind(0, 2, 1.0), AUTO, Kind(1, 1, 1.0)]
    assert list(Fixed().decide(view(3, kinds=kinds)).rungs) == [2, 3, 1]
    assert not Fixed.degrades


def test_queue_depth_when_the_queue_is_long_then_a_rung_is_given_up_per_dwell_and_regained_when_short() -> None:
    policy = QueueDepth(QueueDepthConfig(high_batches=1.0, low_batches=0.25, dwell_s=0.1))
    steps = [(0.0, 9), (0.05, 9), (0.1, 9), (0.2, 5), (0.3, 1), (0.4, 1), (0.5, 1)]
    # more than 8 wait: down, not within the dwell, down; between 2 and 8: stays; less than 2: up, up, at the top
    assert [policy.decide(view(waiting, now=now)).rungs[0] for now, waiting in steps] == [2, 2, 1, 1, 2, 3, 3]


def test_aimd_when_deadlines_are_missed_then_the_level_halves_and_comes_back_slowly() -> None:
    policy = Aimd(AimdConfig(increase_per_s=0.5, decrease=0.5, dwell_s=0.1))
    assert policy.decide(view(1)).rungs[0] == 3
    policy.finished(0.0, met=1, missed=1)  # 0.5: round(1.5) = 2
    assert policy.decide(view(1)).rungs[0] == 2
    policy.shed(0.05)  # within the dwell
    policy.shed(0.2)  # 0.25: round(0.75) = 1
    assert policy.decide(view(1)).rungs[0] == 1
    policy.finished(1.0, met=1, missed=0)  # 0.25 + 0.5 * 1 s = 0.75: round(2.25) = 2
    assert policy.decide(view(1)).rungs[0] == 2
    policy.finished(10.0, met=1, missed=0)
    assert policy.decide(view(1)).rungs[0] == 3


def test_slackfit_when_slack_grows_then_so_do_batches_and_accuracy() -> None:
    # Latencies from 3 ms (rung 0, one image) to 18 ms (rung 3, eight): 4 buckets of 3.75 ms, served from their end on.
    policy = SlackFit(SlackFitConfig(num_buckets=4))
    # In [3, 6.75) ms the largest batch is 4 at rung 0: 6 ms.
    assert list(policy.decide(view(8, slack_s=0.007)).rungs) == [0] * 4
    # In [10.5, 14.25) ms: 8 at rung 1 take 11.6 ms, at rung 2 14 ms, which is more accurate.
    assert list(policy.decide(view(8, slack_s=0.0145)).rungs) == [2] * 8
    # In [14.25, 18] ms: 8 at rung 3.
    assert list(policy.decide(view(8, slack_s=0.05)).rungs) == [3] * 8


def test_slackfit_when_the_machine_is_slower_than_profiled_then_its_buckets_follow() -> None:
    policy, slow = SlackFit(SlackFitConfig(num_buckets=5)), view(8, slack_s=0.0125)
    assert len(policy.decide(slow).rungs) == 8
    for _ in range(60):
        slow.latency.observe([3] * 8, 2 * latency().predict_s([3] * 8))
    assert len(policy.decide(slow).rungs) < 8


def test_proteus_when_the_period_ends_then_the_rate_is_split_over_two_rungs() -> None:
    policy = Proteus(ProteusConfig(period_s=1.0, headroom=1.0))
    assert list(policy.decide(view(8)).rungs) == [3] * 8  # before the first plan
    for i in range(500):
        policy.arrived(i / 500)
    # A batch of 8 costs 1.25, 1.45, 1.75, 2.25 ms an image: 500 Hz need 0.875 of the worker at rung 2 and 1.125 at
    # rung 3. Half of the traffic at each comes to 1.
    rungs = [policy.decide(view(8, now=1.0)).rungs for _ in range(10)]
    assert sum(rung == 3 for batch in rungs for rung in batch) == 40
    assert {rung for batch in rungs for rung in batch} == {2, 3}


def test_proteus_when_nothing_can_hold_the_rate_then_everybody_gets_the_cheapest() -> None:
    policy = Proteus(ProteusConfig(period_s=1.0))
    policy.decide(view(1))
    for i in range(5000):
        policy.arrived(i / 5000)
    assert set(policy.decide(view(8, now=1.0)).rungs) == {0}


def test_foresight_when_the_server_is_idle_then_everybody_gets_the_ceiling() -> None:
    assert list(foresight().decide(view(2, rate_hz=10)).rungs) == [3, 3]


def test_foresight_when_more_come_than_the_cheapest_rung_can_serve_then_it_is_used() -> None:
    # rung 0 in batches of 8 serves 800 Hz
    assert list(foresight().decide(view(8, rate_hz=2000)).rungs) == [0] * 8


def test_foresight_when_the_load_lies_between_then_so_does_the_level() -> None:
    # 800 Hz is what rung 0 holds, 444 Hz what rung 3 does
    levels = [foresight().decide(view(2, rate_hz=rate)).rungs[0] for rate in (100, 450, 550, 700, 1000)]
    assert levels == sorted(levels, reverse=True)
    assert {0, 3} < set(levels)


def test_foresight_when_a_queue_has_built_up_then_it_degrades_before_the_rate_tells() -> None:
    assert foresight().decide(view(4)).rungs[0] == 3
    assert foresight().decide(view(120)).rungs[0] == 0


def test_foresight_when_a_batch_would_break_a_promise_then_it_proposes_a_cheaper_or_smaller_one() -> None:
    # only batches of at most 11 ms are allowed: 8 at rung 0, 7 at rung 1, 6 at rung 2, 4 at rung 3
    def short(rungs: Sequence[int], now: float) -> bool:
        return latency().predict_s(rungs) <= 0.0111

    rungs = foresight().decide(view(8, fits=short)).rungs
    assert short(rungs, 0.0)
    assert len(rungs) >= 2


def test_foresight_when_nothing_keeps_the_promise_then_it_leaves_the_choice_to_the_scheduler() -> None:
    assert list(foresight().decide(view(8, fits=lambda rungs, now: False)).rungs) == []


def test_foresight_when_ranges_differ_then_each_request_stays_within_its_own() -> None:
    kinds = [Kind(3, 3, 1.0), Kind(0, 1, 1.0), Kind(2, 3, 1.0), AUTO]
    busy = foresight().decide(view(4, kinds=kinds, rate_hz=2000)).rungs
    idle = foresight().decide(view(4, kinds=kinds)).rungs
    assert list(busy) == [3, 0, 2, 0]
    assert list(idle) == [3, 1, 3, 3]


def test_foresight_when_a_class_weighs_more_then_it_is_degraded_later() -> None:
    def level(weight: float) -> int:
        kind = Kind(0, FULL, weight)
        crowd = view(4, kinds=[kind] * 4, rate_hz=560)
        return foresight().decide(crowd).rungs[0]

    assert level(20.0) >= level(1.0)
    assert level(20.0) == FULL
