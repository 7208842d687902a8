from __future__ import annotations

import pytest

from exporter.bundle import Manifest
from server.errors import InvalidParameter
from server.policy import FixedPolicy
from server.query import ClassifyQuery, interpret


def test_budgets_when_points_are_uneven_then_each_takes_the_nearest_in_compute(manifest: Manifest) -> None:
    policy = FixedPolicy(manifest)
    # Not dominated: compute 0.4, 0.6, 1. Thirds of the way: 0.4 + 0.6/3 = 0.6; 0.4 + 0.6*2/3 = 0.8, a tie of 0.6 and 1,
    # which goes to the more accurate.
    computes = {
        budget: decision.measured.relative_compute
        for budget, decision in policy.budgets.items()
        if decision is not None and decision.measured is not None
    }
    assert computes == {"low": 0.4, "medium": 0.6, "high": 1.0, "max": 1.0, "auto": 1.0}


def test_budgets_when_a_point_is_dominated_then_no_budget_uses_it(manifest: Manifest) -> None:
    points = [decision.point for decision in FixedPolicy(manifest).budgets.values() if decision is not None]
    assert not {point.operating_point for point in manifest.points if point.dominated} & set(points)


def test_budgets_when_model_is_dense_then_all_are_accepted_without_a_point(dense_manifest: Manifest) -> None:
    assert set(FixedPolicy(dense_manifest).budgets.values()) == {None}


def test_point_when_slots_and_k_are_those_of_the_manifest_then_accuracy_is_the_measured_one(manifest: Manifest) -> None:
    # ceil(5 * 1 * 0.9 / 4) = 2 slots, the same as C = 1.0 with K = 1
    decision = FixedPolicy(manifest).for_point(0.9, 1)
    assert decision.slots == (2,)
    assert decision.measured is not None
    assert decision.measured.accuracy == 0.85


def test_point_when_nothing_was_measured_there_then_accuracy_is_unknown(manifest: Manifest) -> None:
    # ceil(5 * 1 * 3.2 / 4) = 4 slots
    decision = FixedPolicy(manifest).for_point(3.2, 1)
    assert (decision.slots, decision.measured) == ((4,), None)


@pytest.mark.parametrize(
    ("factor", "experts", "allowed"),
    [
        (1.0, 0, "between 1 and 2"),
        (1.0, 3, "between 1 and 2"),
        (0.0, 1, "above 0 and at most 4"),
        (4.01, 1, "above 0 and at most 4"),  # E / K = 4 / 1
        (2.01, 2, "above 0 and at most 2"),  # E / K = 4 / 2
        (float("nan"), 1, "above 0"),
        (float("inf"), 1, "above 0"),
    ],
)
def test_point_when_out_of_range_then_message_gives_the_range(
    manifest: Manifest, factor: float, experts: int, allowed: str
) -> None:
    with pytest.raises(InvalidParameter, match=allowed):
        FixedPolicy(manifest).for_point(factor, experts)


def test_point_when_every_token_has_a_slot_everywhere_then_slots_reach_tokens_and_no_more(manifest: Manifest) -> None:
    assert FixedPolicy(manifest).for_point(4.0, 1).slots == (manifest.architecture.tokens_per_image,)


def test_point_when_model_is_dense_then_it_is_refused(dense_manifest: Manifest) -> None:
    with pytest.raises(InvalidParameter, match="dense"):
        FixedPolicy(dense_manifest).for_point(1.0, 1)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"capacity_factor": 1.0}, "num_selected_experts is missing"),
        ({"num_selected_experts": 1}, "capacity_factor is missing"),
        ({"budget": "low", "capacity_factor": 1.0, "num_selected_experts": 1}, "exclude each other"),
        ({"top": 5}, "between 1 and 4"),
    ],
)
def test_query_when_parameters_contradict_then_message_says_how(
    manifest: Manifest, query: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message):
        interpret(ClassifyQuery.model_validate(query), FixedPolicy(manifest), num_classes=4)


def test_query_when_empty_then_budget_is_auto_and_top_fits_the_model(manifest: Manifest) -> None:
    ask = interpret(ClassifyQuery(), FixedPolicy(manifest), num_classes=4)
    assert (ask.budget, ask.top, ask.explain) == ("auto", 4, False)
