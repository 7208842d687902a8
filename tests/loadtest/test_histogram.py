from __future__ import annotations

import base64

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from loadtest import histogram


def test_histogram_when_decoded_then_every_latency_is_there_to_three_digits() -> None:
    latency_s = np.sort(np.random.default_rng(0).lognormal(-4, 2, 5000))
    values_s, counts = histogram.decode(histogram.encode(latency_s))
    assert counts.sum() == 5000
    # Half of a microsecond by rounding, half of a bucket of 1/1024 of its value at most by the histogram.
    assert np.repeat(values_s, counts) == pytest.approx(latency_s, rel=1 / 2048, abs=0.51e-6)


def test_histogram_when_grouped_before_recording_then_it_is_the_one_of_single_records() -> None:
    latency_s = np.random.default_rng(1).lognormal(-4, 2, 2000)
    one_by_one = HdrHistogram(1, 3_600_000_000, 3)
    for value_us in np.rint(1e6 * latency_s).tolist():
        one_by_one.record_value(max(int(value_us), 1))
    found = HdrHistogram.decode(histogram.encode(latency_s).encode())
    assert list(found.counts) == list(one_by_one.counts)


def test_histogram_when_latencies_are_unknown_or_out_of_range_then_they_are_left_out_or_held_at_the_border() -> None:
    values_s, counts = histogram.decode(histogram.encode(np.array([np.nan, 0.0, 1e6])))
    assert counts.tolist() == [1, 1]
    assert values_s == pytest.approx([1e-6, 3600], rel=1e-3)
    assert histogram.decode(histogram.encode(np.zeros(0)))[1].sum() == 0


GOOD = histogram.encode(np.array([0.1, 0.2]))
OTHER = HdrHistogram(1, 1000, 2).encode().decode()


@pytest.mark.parametrize("text", ["", "abc", "HIST" * 10, GOOD[:20], base64.b64encode(b"1" * 40).decode(), "hé"])
def test_histogram_when_the_text_is_none_then_the_error_shows_it(text: str) -> None:
    with pytest.raises(ValueError, match="not an HdrHistogram in base64"):
        histogram.decode(text)


def test_histogram_when_it_has_another_range_then_the_error_says_which() -> None:
    with pytest.raises(ValueError, match=r"must have 3 digits up to 3600000000 us, got 2 to 1000"):
        histogram.decode(OTHER)
