"""What a request may ask. The small model's ladder: accuracies 0.80, 0.79 (dominated), 0.85, 0.90."""

from __future__ import annotations

import pytest

from exporter.bundle import Manifest
from server.errors import InvalidParameter
from server.ladder import Ladder
from server.policy_file import parse_policy
from server.query import Ask, ClassifyQuery, interpret

POLICY = """
[budgets.edge]
floor = "0.5,2"
ceiling = "1,1"
deadline_ms = 20
weight = 3
"""


def ask(manifest: Manifest, policy: str = POLICY, **query: object) -> Ask:
    ladder = Ladder.of(manifest)
    active = parse_policy(policy, manifest, ladder, "policy.toml")
    return interpret(ClassifyQuery.model_validate(query), active, manifest, ladder, timeout_s=10)


def test_query_when_empty_then_budget_is_auto_and_top_fits_the_model(manifest: Manifest) -> None:
    found = ask(manifest)
    assert (found.budget.name, found.floor, found.ceiling, found.top, found.explain) == ("auto", 0, 3, 4, False)
    assert found.deadline_s == 1.0  # the small model has no profile


def test_query_when_the_policy_adds_a_budget_then_it_can_be_named(manifest: Manifest) -> None:
    found = ask(manifest, budget="edge")
    assert (found.floor, found.ceiling, found.deadline_s, found.budget.weight) == (1, 2, 0.02, 3)


def test_query_when_a_deadline_is_given_then_it_replaces_the_budgets(manifest: Manifest) -> None:
    found = ask(manifest, budget="edge", deadline_ms=250)
    assert (found.deadline_s, found.budget.deadline_s) == (0.25, 0.02)


@pytest.mark.parametrize(
    ("min_accuracy", "floor"),
    [(0.0, 0), (0.80, 0), (0.801, 2), (0.85, 2), (0.9, 3)],
)
def test_query_when_accuracy_is_demanded_then_the_floor_is_the_cheapest_point_that_has_it(
    manifest: Manifest, min_accuracy: float, floor: int
) -> None:
    found = ask(manifest, min_accuracy=min_accuracy)
    assert (found.floor, found.ceiling) == (floor, 3)


def test_query_when_a_budget_starts_at_a_dominated_point_then_accuracy_lifts_its_floor(manifest: Manifest) -> None:
    # `edge` spans rungs 1 (0.79, dominated) and 2 (0.85).
    assert ask(manifest, budget="edge", min_accuracy=0.795).floor == 2
    assert ask(manifest, budget="edge", min_accuracy=0.79).floor == 1


def test_query_when_the_full_point_is_not_accurate_enough_then_it_is_left_out(manifest: Manifest) -> None:
    points = [*manifest.points[:3], manifest.points[3].model_copy(update={"accuracy": 0.82})]
    worse_at_full = manifest.model_copy(update={"points": tuple(points)})
    found = ask(worse_at_full, min_accuracy=0.84)
    assert (found.floor, found.ceiling) == (2, 2)


def test_query_when_a_point_is_pinned_then_it_counts_as_custom_with_the_default_deadline(manifest: Manifest) -> None:
    found = ask(manifest, "[budgets.auto]\ndeadline_ms = 300", capacity_factor=1.0, num_selected_experts=1)
    assert (found.budget.name, found.budget.weight, found.deadline_s) == ("custom", 1.0, 0.3)
    assert (found.floor, found.ceiling) == (2, 2)
    assert found.pinned is not None
    assert found.pinned.slots == (2,)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"budget": "huge"}, "one of low, medium, high, max, auto, edge, got 'huge'"),
        ({"budget": "Auto"}, "one of low, medium"),
        ({"capacity_factor": 1.0}, "num_selected_experts is missing"),
        ({"num_selected_experts": 1}, "capacity_factor is missing"),
        ({"budget": "low", "capacity_factor": 1.0, "num_selected_experts": 1}, "budget=low and .* exclude each other"),
        ({"min_accuracy": 0.8, "capacity_factor": 1.0, "num_selected_experts": 1}, "min_accuracy=0.8 and .* exclude"),
        ({"deadline_ms": 10_001}, "between 1 and 10000, the request timeout, got 10001"),
        ({"min_accuracy": 0.95}, "at most 0.9, the best of budget 'auto'"),
        ({"min_accuracy": 0.9, "budget": "low"}, r"at most 0.8, the best of budget 'low' \(of all points: 0.9\)"),
        ({"top": 5}, "between 1 and 4"),
    ],
)
def test_query_when_parameters_contradict_then_message_says_what_is_allowed(
    manifest: Manifest, query: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message):
        ask(manifest, **query)


def test_query_when_accuracy_was_never_measured_then_none_can_be_demanded(
    manifest: Manifest, dense_manifest: Manifest
) -> None:
    points = tuple(point.model_copy(update={"accuracy": None}) for point in manifest.points)
    for unmeasured in (manifest.model_copy(update={"points": points}), dense_manifest):
        with pytest.raises(InvalidParameter, match="no accuracy was measured"):
            ask(unmeasured, policy="", min_accuracy=0.5)


def test_query_when_the_model_is_dense_then_budgets_have_no_point(dense_manifest: Manifest) -> None:
    found = ask(dense_manifest, policy="", budget="low")
    assert (found.floor, found.ceiling, found.pinned) == (0, 0, None)
