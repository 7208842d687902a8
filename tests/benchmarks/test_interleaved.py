"""Interleaved timing: who runs when, and who leaves."""

from __future__ import annotations

from tests.benchmarks.interleaved import times_s


def test_calls_take_turns_after_a_round_that_is_not_timed() -> None:
    ran: list[str] = []
    samples = times_s([lambda: ran.append("a"), lambda: ran.append("b")], 2, shortest_s=0, settle_s=0)
    assert ran == ["a", "b"] * 3
    assert [len(each) for each in samples] == [2, 2]
    assert all(seconds > 0 for each in samples for seconds in each)


def test_call_that_had_its_time_leaves_the_rounds() -> None:
    ran: list[str] = []
    turns = times_s([lambda: ran.append("a")], 3, call_s=0, shortest_s=0, settle_s=0)
    assert len(ran) == 2
    assert [len(each) for each in turns] == [1]


def test_short_call_runs_untimed_before_its_sample_and_is_repeated_within_it() -> None:
    ran: list[int] = []
    (samples,) = times_s([lambda: ran.append(0)], 1, shortest_s=1e-3, settle_s=1e-3)
    assert len(samples) == 1
    assert len(ran) > 10
