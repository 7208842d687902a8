"""Sweeps over C, K, queue orders and group sizes, held against `evaluate` and against counts by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.vmoe.tiny import CONFIG, DENSE, MOE, PREPROCESSING, data_of, model_of
from vmoe.checkpoint import Checkpoint
from vmoe.config import ModelConfig
from vmoe.evaluate import evaluate
from vmoe.operating_point import OperatingPoint
from vmoe.sweep import Bootstrap, SweepPoint, SweepSettings, num_passes, sweep

DATA = data_of(24)
SETTINGS = SweepSettings((0.25, 0.5, 1.0, 4.0), (1, 2), group_images=(1, 4), resamples=50)


def checkpoint_of(config: ModelConfig = CONFIG) -> Checkpoint:
    return Checkpoint(config, model_of(config).state_dict(), PREPROCESSING, DATA.labels)


@pytest.fixture(scope="module")
def points() -> list[SweepPoint]:
    return sweep(checkpoint_of(), DATA, SETTINGS)


def only(points: list[SweepPoint], c: float, k: int, routing: str, group: int) -> SweepPoint:
    (found,) = [
        p for p in points if (p.point, p.routing, p.group_images) == (OperatingPoint(c, k), routing, group)
    ]  # fmt: skip
    return found


def test_sweep_has_every_combination_once(points: list[SweepPoint]) -> None:
    assert len(points) == 4 * 2 * 2 * 2
    assert len({(p.point, p.routing, p.group_images) for p in points}) == len(points)
    assert {p.num_images for p in points} == {24}


@pytest.mark.parametrize("routing", ["bpr", "vanilla"])
def test_sweep_with_single_images_finds_what_evaluate_finds(points: list[SweepPoint], routing: str) -> None:
    loaded = checkpoint_of(replace(CONFIG, moe=replace(MOE, routing=routing)))
    wanted = [OperatingPoint(c, k) for k in SETTINGS.selected_experts for c in SETTINGS.capacity_factors]
    for expected in evaluate(loaded.model(), DATA, PREPROCESSING, wanted):
        assert expected.point is not None
        found = only(points, expected.point.capacity_factor, expected.point.num_selected_experts, routing, 1)
        assert found.accuracy.mean == pytest.approx(expected.accuracy)
        assert found.kept == pytest.approx(expected.kept)
        assert found.slots == expected.slots[0]


def test_sweep_at_the_configured_point_differs_from_full_by_nothing(points: list[SweepPoint]) -> None:
    found = only(points, 1.0, 2, "bpr", 1)
    assert (found.minus_full.mean, found.minus_full.low, found.minus_full.high) == (0, 0, 0)


def test_sweep_where_nothing_is_dropped_depends_on_neither_queue_nor_group(points: list[SweepPoint]) -> None:
    # C = 4 = E: an expert can serve every token.
    for k in (1, 2):
        found = [only(points, 4.0, k, routing, group) for routing in ("bpr", "vanilla") for group in (1, 4)]
        assert {p.accuracy.mean for p in found} == {found[0].accuracy.mean}
        assert all(p.kept == (1.0, 1.0) for p in found)


def test_sweep_of_groups_has_slots_for_all_their_tokens(points: list[SweepPoint]) -> None:
    # 4 images of 4 tokens, 4 experts: 16 * 1 * 0.25 / 4 = 1 and 16 * 2 * 0.5 / 4 = 4.
    assert only(points, 0.25, 1, "bpr", 4).slots == 1
    assert only(points, 0.5, 2, "vanilla", 4).slots == 4


def test_sweep_twice_gives_the_same(points: list[SweepPoint]) -> None:
    assert sweep(checkpoint_of(), DATA, SETTINGS) == points


def test_sweep_runs_points_with_the_same_slots_once() -> None:
    # Groups of one: 4 tokens * K * C / 4 experts is 0.25, 0.5, 1, 4 for K = 1 (slots 1, 1, 1, 4) and 0.5, 1, 2, 8 for
    # K = 2 (1, 1, 2, 8): 2 + 3 passes per queue order. Groups of four: 1, 2, 4, 16 and 2, 4, 8, 32: 8 passes for each
    # of 2 seeds. And one pass for the configured point.
    done: list[int] = []
    sweep(checkpoint_of(), DATA, SETTINGS, advance=done.append)
    assert sum(done) == 24 * num_passes(CONFIG, SETTINGS) == 24 * (2 * 5 + 2 * 2 * 8 + 1)


def test_sweep_with_a_limit_takes_whole_groups_of_every_size() -> None:
    settings = replace(SETTINGS, group_images=(1, 2, 3), limit=23, capacity_factors=(1.0,), selected_experts=(1,))
    assert {p.num_images for p in sweep(checkpoint_of(), DATA, settings)} == {18}


def test_sweep_of_a_dense_model_is_one_point() -> None:
    loaded = checkpoint_of(DENSE)
    done: list[int] = []
    (point,) = sweep(loaded, DATA, SETTINGS, advance=done.append)
    (expected,) = evaluate(loaded.model(), DATA, PREPROCESSING, [None])
    assert (point.point, point.routing) == (None, None)
    assert point.accuracy.mean == pytest.approx(expected.accuracy)
    assert sum(done) == 24 * num_passes(DENSE, SETTINGS)


def test_sweep_leaves_out_more_choices_than_there_are_experts() -> None:
    settings = SweepSettings((1.0,), (4, 5), group_images=(1,))
    assert {p.point for p in sweep(checkpoint_of(), DATA, settings)} == {OperatingPoint(1.0, 4)}
    with pytest.raises(ValueError, match=r"K must be at most 4, got \[5\]"):
        sweep(checkpoint_of(), DATA, replace(settings, selected_experts=(5,)))


def test_sweep_of_experts_that_choose_tokens_is_refused() -> None:
    config = replace(CONFIG, moe=replace(MOE, router="items_per_expert", num_selected_experts=1))
    with pytest.raises(ValueError, match="which a model with router items_per_expert lacks"):
        sweep(checkpoint_of(config), DATA, SETTINGS)


def test_sweep_of_fewer_images_than_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups of \[1, 4\] need at least 4 images, got 3"):
        sweep(checkpoint_of(), DATA, replace(SETTINGS, limit=3))


@pytest.mark.parametrize(("name", "value"), [("seeds", 0), ("resamples", 0), ("group_images", (0,))])
def test_settings_below_one_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(SETTINGS, **{name: value})


def test_bootstrap_of_equal_values_is_that_value() -> None:
    found = Bootstrap(10, 100).interval(np.full(10, 0.5, dtype=np.float32))
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_of_a_share_has_the_width_of_the_binomial() -> None:
    # 400 images, 80 % right: standard error sqrt(0.8 * 0.2 / 400) = 0.02, so 1.96 of them on each side. With 4,000
    # resamples the ends are known to about 5 % of that.
    values = (np.arange(400) % 5 > 0).astype(np.float32)
    found = Bootstrap(400, 4000).interval(values)
    error = math.sqrt(0.8 * 0.2 / 400)
    assert found.mean == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8 - 1.96 * error, abs=0.1 * error * 1.96)
    assert found.high == pytest.approx(0.8 + 1.96 * error, abs=0.1 * error * 1.96)
