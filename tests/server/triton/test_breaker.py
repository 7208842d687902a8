"""Transitions of the breaker; time is an argument."""

from __future__ import annotations

from server.backends.triton.breaker import Breaker


def closed() -> Breaker:
    breaker = Breaker(cap_s=1.0)
    breaker.probe_passed()
    breaker.answered()
    return breaker


def test_breaker_when_nobody_has_asked_then_it_is_open_and_due_for_a_probe() -> None:
    breaker = Breaker(cap_s=1.0)
    assert (breaker.state, breaker.probe_at_s) == ("open", 0.0)


def test_breaker_when_a_probe_passed_then_one_batch_decides() -> None:
    breaker = Breaker(cap_s=1.0)
    breaker.probe_passed()
    assert breaker.state == "half_open"
    breaker.answered()
    assert breaker.state == "closed"
    breaker.failed(5.0, for_certain=True)
    breaker.probe_passed()
    breaker.failed(6.0, for_certain=False)
    assert breaker.state == "open"


def test_breaker_when_three_failures_come_in_a_row_then_it_opens() -> None:
    breaker = closed()
    for _ in range(2):
        breaker.failed(1.0, for_certain=False)
    breaker.answered()
    for _ in range(2):
        breaker.failed(1.0, for_certain=False)
    assert breaker.state == "closed"
    breaker.failed(1.0, for_certain=False)
    assert breaker.state == "open"


def test_breaker_when_a_failure_leaves_no_doubt_then_it_opens_at_once() -> None:
    breaker = closed()
    breaker.failed(1.0, for_certain=True)
    assert (breaker.state, breaker.probe_at_s) == ("open", 1.1)


def test_breaker_when_probes_fail_then_the_backoff_doubles_up_to_its_cap_and_an_answer_resets_it() -> None:
    breaker = closed()
    waits = []
    now = 0.0
    for _ in range(6):
        breaker.failed(now, for_certain=True)
        waits.append(round(breaker.probe_at_s - now, 6))
        now = breaker.probe_at_s
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    breaker.probe_passed()
    breaker.answered()
    breaker.failed(now, for_certain=True)
    assert round(breaker.probe_at_s - now, 6) == 0.1


def test_breaker_when_it_is_open_then_batches_that_were_under_way_change_nothing() -> None:
    breaker = closed()
    breaker.failed(1.0, for_certain=True)
    breaker.failed(1.05, for_certain=True)
    breaker.answered()
    assert (breaker.state, breaker.probe_at_s) == ("open", 1.1)
