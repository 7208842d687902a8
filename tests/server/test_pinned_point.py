from __future__ import annotations

import pytest

from exporter.bundle import Manifest
from server.errors import InvalidParameter
from server.ladder import Ladder
from server.pinned_point import pin


def test_point_when_slots_and_k_are_those_of_the_manifest_then_accuracy_is_the_measured_one(manifest: Manifest) -> None:
    # ceil(5 * 1 * 0.9 / 4) = 2 slots, the same as C = 1.0 with K = 1, the third rung
    rung, charged = pin(manifest, Ladder.of(manifest), 0.9, 1)
    assert (rung.slots, rung.accuracy, charged) == ((2,), 0.85, 2)
    assert rung.point is not None
    assert rung.point.capacity_factor == 0.9  # as the client wrote it


def test_point_when_nothing_was_measured_there_then_it_is_charged_as_the_full_one(manifest: Manifest) -> None:
    # ceil(5 * 1 * 3.2 / 4) = 4 slots; the full point has 3
    rung, charged = pin(manifest, Ladder.of(manifest), 3.2, 1)
    assert (rung.slots, rung.accuracy, rung.measured, charged) == ((4,), None, None, 3)


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
        pin(manifest, Ladder.of(manifest), factor, experts)


def test_point_when_every_token_has_a_slot_everywhere_then_slots_reach_tokens_and_no_more(manifest: Manifest) -> None:
    rung, _ = pin(manifest, Ladder.of(manifest), 4.0, 1)
    assert rung.slots == (manifest.architecture.tokens_per_image,)


def test_point_when_model_is_dense_then_it_is_refused(dense_manifest: Manifest) -> None:
    with pytest.raises(InvalidParameter, match="dense"):
        pin(dense_manifest, Ladder.of(dense_manifest), 1.0, 1)
