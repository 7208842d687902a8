"""Latencies as HdrHistogram keeps them: whole microseconds, 3 significant digits, up to an hour.

Text is the compressed V2 encoding in base64, which the HdrHistogram tools of every language read. Histograms add
without loss, so those of the bins of a timeline can be resampled and summed, which percentiles cannot.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
from hdrh.codec import HdrCookieException, HdrHistogramSettingsException, HdrLengthException
from hdrh.histogram import HdrHistogram
from pydantic import AfterValidator

_LARGEST_US: Final = 3_600_000_000
_DIGITS: Final = 3
_SUB_BUCKET_BITS: Final = 11  # HdrHistogram: the power of 2 above 2 * 10^digits; values below 2^11 are exact

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def encode(latency_s: Floats) -> str:
    """Of those that are not NaN."""
    value_us = np.rint(1e6 * latency_s[~np.isnan(latency_s)]).clip(1, _LARGEST_US).astype(np.int64)
    # One call per value that HdrHistogram tells apart, instead of one per request.
    shift = (np.frexp(value_us.astype(np.float64))[1] - _SUB_BUCKET_BITS).clip(0)
    values, counts = np.unique(value_us >> shift << shift, return_counts=True)
    histogram = HdrHistogram(1, _LARGEST_US, _DIGITS)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)
    return str(histogram.encode().decode("ascii"))


def decode(text: str) -> tuple[Floats, Ints]:
    """(V,) ascending values in seconds, the middle of what HdrHistogram cannot tell apart, and (V,) counts above 0.

    Raises:
        ValueError: the text is no histogram of these digits and this range.
    """
    try:
        histogram = HdrHistogram.decode(text.encode("ascii"))
    except (HdrCookieException, HdrLengthException, HdrHistogramSettingsException, ValueError, zlib.error) as error:
        raise ValueError(f"not an HdrHistogram in base64: {text[:20]!r}") from error
    found = histogram.significant_figures, histogram.highest_trackable_value
    if found != (_DIGITS, _LARGEST_US):
        raise ValueError(
            f"an HdrHistogram must have {_DIGITS} digits up to {_LARGEST_US} us, got {found[0]} to {found[1]}"
        )
    counts = np.ctypeslib.as_array(histogram.counts)
    places = np.nonzero(counts)[0]
    lowest_us = [histogram.get_value_from_index(place) for place in places.tolist()]
    value_us = [(low + histogram.get_highest_equivalent_value(low)) / 2 for low in lowest_us]
    return np.array(value_us, np.float64) / 1e6, counts[places].astype(np.int64)


def _checked(text: str) -> str:
    decode(text)
    return text


Encoded = Annotated[str, AfterValidator(_checked)]
"""What `encode` returns, as a field of a report."""
