"""The comparison of codecs, on a small photograph."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tests.benchmarks.codecs import MODEL, SHORT_SIDE, installed, photograph, rows, with_draft, with_pillow


def test_photograph_when_made_then_it_has_the_spectrum_of_natural_images() -> None:
    with Image.open(io.BytesIO(photograph(512, 512, 0))) as image:
        assert image.size == (512, 512)
        luminance = np.asarray(image.convert("L"), np.float64)
    power = np.abs(np.fft.rfft2(luminance - luminance.mean())) ** 2
    radius = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None]) * 512
    low, high = (power[(radius >= start) & (radius < 2 * start)].mean() for start in (8, 32))
    assert 8 < low / high < 32  # amplitude 1/f: four times the frequency, a sixteenth of the power


def test_draft_when_a_photograph_is_four_times_too_large_then_pixels_are_near_but_not_the_same() -> None:
    data = photograph(4 * SHORT_SIDE, 4 * SHORT_SIDE, 0)
    difference = np.abs(with_draft(data).astype(int) - with_pillow(data))
    assert 0 < difference.mean() < 10


def test_draft_when_a_photograph_is_less_than_twice_too_large_then_nothing_changes() -> None:
    data = photograph(2 * SHORT_SIDE - 2, 2 * SHORT_SIDE - 2, 0)
    assert (with_draft(data) == with_pillow(data)).all()


def test_rows_when_measured_then_there_is_one_per_codec_that_is_installed() -> None:
    codecs, versions = installed()
    assert {"pillow", "pillow, draft"} <= codecs.keys()
    assert versions[0].startswith("pillow")
    table = rows(300, 280, codecs, runs=1)
    assert [row.split(" | ")[1] for row in table] == list(codecs)
    assert all(codec(photograph(300, 280, 0)).shape == (*MODEL.image_size, 3) for codec in codecs.values())
