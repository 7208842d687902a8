"""Slots of whole models, and configurations that no model can have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmoe.config import ConfigError, ModelConfig, MoeConfig
from vmoe.operating_point import OperatingPoint

# 16 patches and the class token: 17 tokens.
CHOOSING = ModelConfig(
    (32, 32), (8, 8), 9, 32, 4, 64, 4, moe=MoeConfig(4, (2, 3), num_selected_experts=1, router="items_per_expert")
)


def test_slots_of_choosing_experts_do_not_count_choices() -> None:
    # ceil(17 * 1.5 / 4) = ceil(6.375), for each of the two layers.
    assert CHOOSING.slots(OperatingPoint(1.5, 1)) == (7, 7)


def test_choosing_experts_refuse_a_number_of_choices() -> None:
    with pytest.raises(ValueError, match="num_selected_experts must be at most 1 for items_per_expert"):
        CHOOSING.slots(OperatingPoint(1.5, 2))
    with pytest.raises(ConfigError, match="items_per_expert has no K"):
        MoeConfig(4, (2, 3), num_selected_experts=2, router="items_per_expert")


def test_choosing_experts_refuse_more_slots_than_tokens() -> None:
    assert CHOOSING.slots(OperatingPoint(4.0, 1)) == (17, 17)
    with pytest.raises(ValueError, match=r"choose 18 of 17 tokens.*at most 4"):
        CHOOSING.slots(OperatingPoint(4.2, 1))


def test_experts_that_are_chosen_may_have_more_slots_than_tokens() -> None:
    assert CHOOSING.moe is not None
    chosen = replace(CHOOSING, moe=replace(CHOOSING.moe, router="experts_per_item"))
    assert chosen.slots(OperatingPoint(4.2, 1)) == (18, 18)


def test_configuration_survives_json() -> None:
    assert ModelConfig.from_json(CHOOSING.to_json()) == CHOOSING
