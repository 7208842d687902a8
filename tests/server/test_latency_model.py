from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.bundle import Latency, Point
from server.latency import LatencyModel
from tests.server.ladders import BASE_S, IMAGE_S, MAX_BATCH, latency

rungs = st.lists(st.integers(0, 3), min_size=1, max_size=MAX_BATCH)


@st.composite
def models(draw: st.DrawFn) -> LatencyModel:
    """Any profile, however noisy: rows need not ascend, nor columns."""
    sizes = (1, 2, 4, 8)
    table = [[draw(st.floats(1e-4, 1.0)) for _ in sizes] for _ in range(4)]
    return LatencyModel(table, [draw(st.floats(0, 0.3)) for _ in sizes], sizes, MAX_BATCH)


def test_prediction_when_all_images_share_a_rung_then_it_is_the_profile_interpolated() -> None:
    # 2 + 1.5 * 3 ms, between the profiled sizes 2 and 4
    assert latency().predict_s([2, 2, 2]) == pytest.approx(0.0065)


def test_prediction_when_rungs_are_mixed_then_everybody_pays_for_its_own_work() -> None:
    # 2 ms for the batch, then 2.0 + 1.0 + 1.0 ms
    assert latency().predict_s([0, 3, 0]) == pytest.approx(BASE_S + IMAGE_S[3] + 2 * IMAGE_S[0])


def test_prediction_when_a_quantile_is_asked_then_it_exceeds_the_median_by_the_profiled_spread() -> None:
    model = latency(sigma=0.1, quantile=0.9)
    # 1.2816 is the 90 % quantile of the standard normal distribution
    assert model.predict_s([1], high=True) / model.predict_s([1]) == pytest.approx(math.exp(0.1 * 1.2816), rel=1e-4)


@given(models(), rungs, st.data())
def test_prediction_when_an_image_is_removed_then_it_is_never_longer(
    model: LatencyModel, batch: list[int], data: st.DataObject
) -> None:
    if len(batch) > 1:
        gone = data.draw(st.integers(0, len(batch) - 1))
        assert model.predict_s(batch[:gone] + batch[gone + 1 :]) <= model.predict_s(batch) + 1e-12


@given(models(), rungs, st.data())
def test_prediction_when_an_image_is_degraded_then_it_is_never_longer(
    model: LatencyModel, batch: list[int], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(batch) - 1))
    lower = data.draw(st.integers(0, batch[index]))
    degraded = [*batch[:index], lower, *batch[index + 1 :]]
    assert model.predict_s(degraded) <= model.predict_s(batch) + 1e-12


def run(model: LatencyModel, factor: float, batches: int, seed: int = 0) -> None:
    """Feeds batches of random rungs and sizes on a machine that is `factor` slower than profiled, 2 % noise."""
    generator, truth = random.Random(seed), latency()
    for _ in range(batches):
        batch = [generator.randrange(4) for _ in range(generator.randint(1, MAX_BATCH))]
        model.observe(batch, truth.predict_s(batch) * factor * math.exp(0.02 * generator.gauss(0, 1)))


def test_correction_when_the_machine_is_half_as_fast_then_it_is_noticed_within_20_batches() -> None:
    model = latency()
    run(model, 2.0, 20)
    assert model.predict_s([1, 1, 1]) / latency().predict_s([1, 1, 1]) == pytest.approx(2.0, rel=0.1)


def test_correction_when_the_machine_recovers_then_predictions_do_too() -> None:
    model = latency()
    run(model, 2.0, 100)
    run(model, 1.0, 40)
    assert model.predict_s([1, 1, 1]) / latency().predict_s([1, 1, 1]) == pytest.approx(1.0, rel=0.1)


def test_correction_when_one_batch_stalls_then_predictions_hardly_move() -> None:
    model = latency()
    model.observe([2] * 8, 50 * model.predict_s([2] * 8))
    # a clipped step of 0.25 * 0.2 on the scale, and less on the cell
    assert model.predict_s([2] * 8) / latency().predict_s([2] * 8) < 1.07


def test_correction_when_only_large_batches_are_slower_then_small_ones_keep_their_prediction() -> None:
    model, truth, generator = latency(), latency(), random.Random(1)
    for _ in range(2000):
        size = generator.choice((1, 8))
        model.observe([1] * size, truth.predict_s([1] * size) * (1.5 if size == 8 else 1.0))
    assert model.predict_s([1]) / truth.predict_s([1]) == pytest.approx(1.0, rel=0.05)
    assert model.predict_s([1] * 8) / truth.predict_s([1] * 8) == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_quantile_when_the_spread_is_wider_than_profiled_then_it_is_learned(quantile: float) -> None:
    model, truth, generator = latency(quantile=quantile), latency(), random.Random(2)
    below = []
    for step in range(6000):
        batch = [generator.randrange(4)] * generator.randint(1, MAX_BATCH)
        measured = truth.predict_s(batch) * math.exp(0.06 * generator.gauss(0, 1))  # three times the profiled 0.02
        if step >= 2000:
            below.append(measured <= model.predict_s(batch, high=True))
        model.observe(batch, measured)
    assert np.mean(below) == pytest.approx(quantile, abs=0.03)


def test_model_when_the_manifest_has_no_profile_then_there_is_none() -> None:
    point = Point(capacity_factor=1, num_selected_experts=1, slots=(1,), relative_compute=1)
    assert LatencyModel.of([point], 8) is None
    assert LatencyModel.of([], 8) is None


def test_model_when_made_from_a_manifest_then_it_predicts_its_medians() -> None:
    entries = tuple(Latency(batch_size=n, median_s=0.001 * n + 0.002, p99_s=0.0012 * n + 0.002) for n in (1, 2, 4))
    point = Point(capacity_factor=1, num_selected_experts=1, slots=(1,), relative_compute=1, latency=entries)
    model = LatencyModel.of([point], 8)
    assert model is not None
    assert [model.uniform_s(0, n) for n in (1, 3, 4)] == pytest.approx([0.003, 0.005, 0.006])
    assert model.uniform_s(0, 8) == pytest.approx(0.010)  # the last segment goes on: 1 ms an image


def test_model_when_guessed_then_rungs_scale_with_compute() -> None:
    model = LatencyModel.guess([0.5, 1.0], single_s=0.004, full_batch_s=0.018, max_batch_size=8)
    assert model.uniform_s(1, 8) == pytest.approx(0.018)
    assert model.uniform_s(0, 1) == pytest.approx(0.002)


@pytest.mark.parametrize("table", [[[0.0, 1.0]], [[float("nan"), 1.0]], [[1.0]]])
def test_model_when_the_profile_is_unusable_then_it_is_refused(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="latenc"):
        LatencyModel(table, [0.1, 0.1], (1, 2), 2)


def test_model_when_another_quantile_is_aimed_at_then_predictions_move_to_it() -> None:
    aimed, built = (LatencyModel([[0.1]], [0.1], [1], 1, quantile=quantile) for quantile in (0.9, 0.99))
    aimed.aim_at(0.99)
    assert aimed.quantile == 0.99
    assert aimed.predict_s([0], high=True) == pytest.approx(built.predict_s([0], high=True))


def test_model_when_another_quantile_is_aimed_at_then_what_was_learned_is_kept() -> None:
    model = LatencyModel([[0.1]], [0.1], [1], 1, quantile=0.9)
    for _ in range(20):
        model.observe([0], 0.2)
    scale = model.scale
    model.aim_at(0.95)
    assert model.scale == scale
