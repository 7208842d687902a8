from __future__ import annotations

from pathlib import Path

import pytest

from exporter.bundle import Latency, Manifest
from server.budgets import default_budgets, default_deadline_s
from server.ladder import Ladder
from server.policy_file import POLICY_NAMES, ActivePolicy, PolicyError, default_policy, load_policy, parse_policy

# The manifest's rungs: (0.5, 1), (0.5, 2) dominated, (1.0, 1), (1.0, 2)


def parse(text: str, manifest: Manifest) -> ActivePolicy:
    return parse_policy(text, manifest, Ladder.of(manifest), "policy.toml")


def test_policy_when_the_file_is_empty_then_everything_has_its_default(manifest: Manifest) -> None:
    active = parse("", manifest)
    assert active.build().name == "foresight"
    assert active.budgets == default_budgets(manifest, Ladder.of(manifest))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_policy_when_named_then_that_one_is_built(name: str, manifest: Manifest) -> None:
    assert parse(f'policy = "{name}"', manifest).build().name == name


def test_policy_when_parameters_are_given_then_they_reach_the_policy(manifest: Manifest) -> None:
    active = parse('policy = "queue-depth"\n[queue-depth]\nhigh_batches = 3.0\n', manifest)
    assert active.config.queue_depth.high_batches == 3


def test_policy_when_built_twice_then_the_objects_share_no_state(manifest: Manifest) -> None:
    active = default_policy(manifest, Ladder.of(manifest), "aimd")
    assert active.build() is not active.build()


def test_budgets_when_changed_or_added_then_the_others_keep_their_defaults(manifest: Manifest) -> None:
    text = """
        [budgets.auto]
        deadline_ms = 250

        [budgets.thumbnails]
        ceiling = "1.0,1"
        floor = "cheapest"
        weight = 0.5
    """
    budgets = parse(text, manifest).budgets
    assert (budgets["auto"].deadline_s, budgets["auto"].ceiling) == (0.25, 3)
    thumbnails = budgets["thumbnails"]
    assert (thumbnails.floor, thumbnails.ceiling, thumbnails.weight) == (0, 2, 0.5)
    assert budgets["low"] == default_budgets(manifest, Ladder.of(manifest))["low"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("policy = 'foresight'\nquantile = = 1", "line 2", "not TOML"),
        ("\npolicy = 'best'", "line 2", "'best'"),
        ("quantile = 1.5", "line 1", "less than or equal to 0.999"),
        ("policy = 'aimd'\n\ncolour = 1", "line 3", "colour"),
        ("[foresight]\nslack = 0.5\nhorizon = 3", "line 3", "foresight.horizon: unknown; known are slack"),
        ("[budgets.auto]\n\ndeadline_ms = -5", "line 3", "deadline_ms"),
        ("[budgets.auto]\nweight = 'much'", "line 2", "'much'"),
        ("[budgets.fast]\nceiling = '0.3,1'", "line 1", '"0.5,1", "0.5,2", "1,1", "1,2"'),
        ("[budgets.fast]\nceiling = 'best'", "line 1", '"cheapest" or "full"'),
        (
            "[budgets.fast]\nceiling = 'cheapest'\nfloor = 'full'",
            "line 1",
            "got the floor (1, 2) above the ceiling (0.5, 1)",
        ),
        ("[budgets.auto]\ndeadline_ms = 0.0001", "line 2", "deadline_ms: Input should be greater than or equal to 1"),
        ("[budgets.auto]\ndeadline = 3", "line 2", "unknown; known are ceiling, floor, deadline_ms, weight"),
        ("[fixed]\nslack = 0.5", "line 1", "fixed: unknown; known are policy, quantile, queue-depth, aimd, slackfit"),
        ("[budgets.'no spaces']\nweight = 1.0", "line 1", "pattern"),
    ],
)
def test_policy_when_wrong_then_the_message_names_the_line(
    text: str, line: str, message: str, manifest: Manifest
) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text, manifest)
    assert line in str(caught.value)
    assert message in str(caught.value)


def test_policy_when_there_are_too_many_budgets_then_it_is_refused(manifest: Manifest) -> None:
    text = "\n".join(f"[budgets.b{i}]\nweight = 1.0" for i in range(17))
    with pytest.raises(PolicyError, match="at most 16"):
        parse(text, manifest)


def test_policy_when_the_file_is_missing_then_the_error_names_it(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"nothing\.toml"):
        load_policy(tmp_path / "nothing.toml", manifest, Ladder.of(manifest))


def test_budgets_when_points_are_uneven_then_each_takes_the_nearest_in_compute(manifest: Manifest) -> None:
    budgets = default_budgets(manifest, Ladder.of(manifest))
    # Not dominated: compute 0.4, 0.6, 1. Thirds of the way: 0.4 + 0.6/3 = 0.6; 0.4 + 0.6*2/3 = 0.8, a tie of 0.6 and 1,
    # which goes to the more accurate.
    assert {name: (budget.floor, budget.ceiling) for name, budget in budgets.items()} == {
        "low": (0, 0),
        "medium": (0, 2),
        "high": (2, 3),
        "max": (3, 3),
        "auto": (0, 3),
    }


def test_budgets_when_the_model_is_dense_then_all_exist(dense_manifest: Manifest) -> None:
    budgets = default_budgets(dense_manifest, Ladder.of(dense_manifest))
    assert {(budget.floor, budget.ceiling) for budget in budgets.values()} == {(0, 0)}


@pytest.mark.parametrize(("batch_of_8_s", "deadline_s"), [(0.017, 0.1), (0.03, 0.2), (0.5, 2.0), (0.6, 5.0)])
def test_deadline_when_the_model_is_profiled_then_it_holds_four_batches(
    batch_of_8_s: float, deadline_s: float, manifest: Manifest
) -> None:
    latency = tuple(Latency(batch_size=n, median_s=batch_of_8_s * n / 8, p99_s=1) for n in (1, 8))
    points = tuple(point.model_copy(update={"latency": latency}) for point in manifest.points)
    assert default_deadline_s(manifest.model_copy(update={"points": points})) == deadline_s


def test_deadline_when_there_is_no_profile_then_it_is_one_second(manifest: Manifest) -> None:
    assert default_deadline_s(manifest) == 1.0


def test_ladder_when_a_point_is_off_it_then_it_is_charged_as_the_next_costlier(manifest: Manifest) -> None:
    ladder = Ladder.of(manifest)  # 1, 2, 2, 3 slots
    assert [ladder.charge((slots,)) for slots in (1, 2, 3, 4)] == [0, 1, 3, 3]


def test_ladder_when_accuracies_are_unknown_then_values_still_ascend(manifest: Manifest) -> None:
    points = tuple(point.model_copy(update={"accuracy": None}) for point in manifest.points)
    ladder = Ladder.of(manifest.model_copy(update={"points": points}))
    # 1 - 0.02 * (1 - compute)
    assert [ladder.values[rung] for rung in ladder.frontier] == pytest.approx([0.988, 0.992, 1.0])
    assert ladder.rungs[0].accuracy is None
