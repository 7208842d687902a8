"""Operations and parameters against sums by hand. CONFIG: 4 tokens, D = 8, MLP 16, 2 blocks, 4 experts, 3 classes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.vmoe.tiny import CONFIG, DENSE, MOE, model_of
from vmoe.config import VARIANTS, ModelConfig
from vmoe.flops import count_parameters, flops_per_image
from vmoe.operating_point import OperatingPoint

# Multiply-accumulates: 4 tokens * 16 pixels * 8, and the head 8 * 3.
ENDS = 4 * 16 * 8 + 8 * 3
# A block: four projections 8 x 8 of 4 tokens; scores and mixture, 4 x 4 pairs of width 8 each.
ATTENTION = 4 * 4 * 8 * 8 + 2 * 4 * 4 * 8
ROW = 2 * 8 * 16  # one token through one MLP
ROUTER = 4 * 8 * 4


def test_flops_of_a_dense_model_are_twice_its_multiply_accumulates() -> None:
    assert flops_per_image(DENSE) == 2 * (ENDS + 2 * (ATTENTION + 4 * ROW))


@pytest.mark.parametrize(
    ("point", "rows"),
    [
        (OperatingPoint(0.25, 1), 4),  # 1 slot in each of 4 experts
        (OperatingPoint(0.5, 2), 4),  # 4 * 2 * 0.5 / 4 = 1 slot
        (None, 8),  # (1, 2): 2 slots in each
        (OperatingPoint(2.0, 2), 8),  # 16 slots, but there are no more than 4 * 2 assignments
        (OperatingPoint(0.5, 4), 8),  # 4 * 4 * 0.5 / 4 = 2 slots
    ],
)
def test_flops_of_a_sparse_model_follow_its_slots_up_to_the_assignments(
    point: OperatingPoint | None, rows: int
) -> None:
    assert flops_per_image(CONFIG, point) == 2 * (ENDS + 2 * (ATTENTION + ROUTER + rows * ROW))


def test_flops_of_a_model_with_groups_of_several_images_are_per_image() -> None:
    grouped = replace(CONFIG, moe=replace(MOE, group_images=3))
    assert flops_per_image(grouped) == flops_per_image(CONFIG)


def test_flops_of_expert_choice_follow_its_slots() -> None:
    # 4 * 2 / 4 = 2 slots in each of 4 experts: as many rows as K = 2 at C = 1.
    config = replace(CONFIG, moe=replace(MOE, router="items_per_expert", num_selected_experts=1))
    assert flops_per_image(config, OperatingPoint(2.0, 1)) == flops_per_image(CONFIG)


def test_flops_at_a_point_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="num_selected_experts must be at most 4"):
        flops_per_image(CONFIG, OperatingPoint(1.0, 5))


@pytest.mark.parametrize("config", [CONFIG, DENSE])
def test_parameters_are_those_of_the_real_model(config: ModelConfig) -> None:
    assert count_parameters(config) == sum(parameter.numel() for parameter in model_of(config).parameters())


def test_parameters_of_fifteen_billion_need_no_memory() -> None:
    # 60 GB of weights if they were allocated. 24 layers of 32 experts alone: 24 * 32 * (2 * 1408 * 6400 + 6400 + 1408).
    assert count_parameters(VARIANTS["vmoe_15b"]) > 24 * 32 * (2 * 1408 * 6400 + 6400 + 1408)
