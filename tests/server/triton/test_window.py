"""The window on batches of one size; ratios are times over the profile's."""

from __future__ import annotations

import pytest

from server.backends.triton.window import Window


def test_window_when_nothing_was_measured_then_it_is_the_number_of_instances() -> None:
    assert Window(3).size == 3


def test_window_when_a_full_one_sees_no_waiting_then_it_grows_to_twice_the_instances_and_no_further() -> None:
    window = Window(1)
    for _ in range(49):
        window.answered(1.0, 8, in_flight=1)
    assert window.size == 1
    window.answered(1.0, 8, in_flight=1)  # 50 * 0.02
    assert window.limit == pytest.approx(2)
    for _ in range(500):
        window.answered(1.0, 8, in_flight=2)
    assert window.limit == 2


def test_window_when_it_is_not_used_then_it_does_not_grow() -> None:
    window = Window(2)
    for _ in range(200):
        window.answered(1.0, 8, in_flight=1)
    assert window.limit == 2


def test_window_when_the_second_batch_only_waits_then_it_is_taken_back_at_once() -> None:
    window = Window(1)
    for _ in range(55):
        window.answered(1.0, 8, in_flight=1)
    assert window.size == 2
    window.answered(2.0, 8, in_flight=2)  # waiting = 2 * (1 - 1 / 2) = 1
    assert window.size == 1


def test_window_when_the_network_takes_half_as_long_as_the_model_then_two_batches_stay() -> None:
    # Model 1, network 0.5: one batch takes 1.5; of two in flight each takes 2, as the model is never idle.
    window = Window(1)
    for _ in range(55):
        window.answered(1.5, 8, in_flight=1)
    for _ in range(100):
        window.answered(2.0, 8, in_flight=2)  # waiting = 2 * (1 - 1.5 / 2) = 0.5
    assert window.size == 2


def test_window_when_others_keep_the_instances_busy_then_it_shrinks_to_one() -> None:
    window = Window(4)
    window.answered(1.0, 8, in_flight=4)
    for _ in range(12):
        window.answered(2.0, 8, in_flight=window.size)  # waiting = n / 2
    assert window.size == 1


def test_window_when_latencies_of_a_large_one_only_vary_then_it_stays() -> None:
    window = Window(8)
    window.answered(1.0, 8, in_flight=8)
    for _ in range(100):
        window.answered(1.3, 8, in_flight=8)  # waiting = 8 * (1 - 1 / 1.3) = 1.8, below 0.3 * 8
    assert window.size == 8


def test_window_when_sizes_differ_then_each_is_compared_with_its_own() -> None:
    window = Window(1)
    for _ in range(60):
        window.answered(1.0, 16, in_flight=1)
        window.answered(3.0, 1, in_flight=1)  # overhead weighs more on small batches
    assert window.size == 2


def test_window_when_overloaded_then_it_is_halved_but_never_closed() -> None:
    window = Window(4)
    sizes = []
    for _ in range(3):
        window.overloaded()
        sizes.append(window.size)
    assert sizes == [2, 1, 1]


def test_window_when_the_server_became_slower_for_good_then_that_is_the_new_measure() -> None:
    window = Window(1)
    window.answered(1.0, 8, in_flight=1)
    for _ in range(3000):
        window.answered(2.0, 8, in_flight=1)
    # least = 2 - 0.998 ** 3000: waiting is nought again.
    assert window.size == 2
