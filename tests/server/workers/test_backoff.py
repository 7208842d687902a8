"""How long a worker's place stays empty."""

from __future__ import annotations

from server.workers.backoff import Backoff


def test_delay_when_workers_die_young_in_a_row_then_it_doubles_up_to_half_a_minute() -> None:
    backoff = Backoff()
    assert [backoff.died(2.0) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_delay_when_a_worker_has_lived_for_a_minute_then_its_death_is_a_first_one() -> None:
    backoff = Backoff()
    for _ in range(4):
        backoff.died(2.0)
    assert [backoff.died(60.0), backoff.died(2.0)] == [0, 1]
