"""Choice among endpoints."""

from __future__ import annotations

from server.backends.triton.endpoint import Endpoint, choose
from server.backends.triton.failure import Failure


def serving(name: str, instances: int = 2) -> Endpoint:
    endpoint = Endpoint(name, cap_s=1.0)
    endpoint.serves(instances)
    endpoint.breaker.probe_passed()
    endpoint.breaker.answered()
    return endpoint


def test_choice_when_loads_differ_then_the_one_with_more_room_for_its_window_is_taken() -> None:
    small, large = serving("small", 1), serving("large", 4)
    taken = []
    for _ in range(5):
        endpoint = choose([small, large])
        assert endpoint is not None
        endpoint.start()
        taken.append(endpoint.name)
    # (in flight + 1) / window: 1/1 against 1/4, 2/4, 3/4, then 4/4 = 1/1 where small got fewer.
    assert taken == ["large", "large", "large", "small", "large"]


def test_choice_when_equal_then_they_take_turns() -> None:
    endpoints = [serving("a"), serving("b")]
    taken = []
    for _ in range(4):
        endpoint = choose(endpoints)
        assert endpoint is not None
        endpoint.start()
        endpoint.finish()
        taken.append(endpoint.name)
    assert taken == ["a", "b", "a", "b"]


def test_choice_when_one_is_out_then_the_other_even_beyond_its_window() -> None:
    out, full = serving("out"), serving("full", 1)
    out.failed(Failure("refused", ""), now=0.0)
    full.start()
    assert choose([out, full]) is full
    assert choose([out, full], avoid=full) is None


def test_choice_when_half_open_then_one_batch_and_no_second() -> None:
    trial = Endpoint("trial", cap_s=1.0)
    assert choose([trial]) is None
    trial.breaker.probe_passed()
    assert choose([trial]) is trial
    trial.start()
    assert (trial.capacity, choose([trial])) == (1, None)


def test_endpoint_when_its_queue_is_full_then_the_window_halves_and_the_breaker_stays_closed() -> None:
    endpoint = serving("a", 4)
    for _ in range(9):
        endpoint.failed(Failure("queue_full", ""), now=0.0)
    assert (endpoint.breaker.state, endpoint.capacity) == ("closed", 1)


def test_endpoint_when_batches_take_twice_the_profile_then_that_is_expected() -> None:
    endpoint = serving("a")
    assert endpoint.expected_s(0.01) == 0.01
    endpoint.answered(0.04, profiled_s=0.02, batch_size=4, in_flight=1)
    assert endpoint.expected_s(0.01) == 0.02
