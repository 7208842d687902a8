"""The architecture of the fixtures from shapes alone, and trees that are no model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.vmoe.upstream import CASES, Case
from vmoe.architecture import POSITION_TABLE, RELEASES, Hints, find_release, infer_config
from vmoe.config import ConfigError
from vmoe.flax import tree_shapes


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: stored.shape for key, stored in tree_shapes(Case(name).prefix).items()}


@pytest.mark.parametrize("name", CASES)
def test_architecture_of_every_case_equals_its_configuration(name: str) -> None:
    expected = Case(name).config
    hints = Hints(image_size=expected.image_size if name == "map_head" else None)  # sincos2d leaves no table
    if expected.moe is not None:
        moe = expected.moe
        hints = replace(
            hints,
            num_selected_experts=moe.num_selected_experts,
            capacity_factor=moe.capacity_factor,
            router=moe.router,
            routing=moe.routing,
        )
        # What no parameter shows, and training alone needs.
        expected = replace(
            expected,
            moe=replace(
                moe,
                group_images=1,
                capacity_multiple=1,
                importance_loss_weight=0.005,
                load_loss_weight=0.005,
            ),
        )
    assert infer_config(shapes_of(name), hints) == expected


def test_defaults_are_two_experts_by_priority() -> None:
    moe = infer_config(shapes_of("token_k2")).moe
    assert moe is not None
    assert (moe.num_selected_experts, moe.capacity_factor, moe.routing, moe.group_images) == (2, 1.05, "bpr", 1)


def test_image_size_that_fits_the_table_is_taken_as_it_is() -> None:
    # 16 patches of 8 x 8 may be 4 x 4 or 2 x 8.
    assert infer_config(shapes_of("token_k2"), Hints(image_size=(16, 64))).image_size == (16, 64)


def test_image_size_that_does_not_fit_a_square_table_is_left_to_interpolation() -> None:
    assert infer_config(shapes_of("token_k2"), Hints(image_size=(64, 64))).image_size == (32, 32)


def test_table_that_is_no_square_asks_for_the_image_size() -> None:
    shapes = shapes_of("token_k2") | {POSITION_TABLE: (1, 25, 40)}  # 24 patches and the class token
    with pytest.raises(ConfigError, match=r"pos_embedding holds 25 positions, which is no square grid.*image size"):
        infer_config(shapes)
    assert infer_config(shapes, Hints(image_size=(32, 48))).grid == (4, 6)


def test_tree_without_positions_asks_for_the_image_size() -> None:
    with pytest.raises(ConfigError, match="give the image size"):
        infer_config(shapes_of("map_head"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding/kernel": None}, "parameter embedding/kernel of shape .* is missing"),
        ({"embedding/kernel": (8, 40)}, r"embedding/kernel has shape \(8, 40\), expected \(height, width,"),
        ({"head/kernel": None}, "parameter head/kernel"),
        ({"Encoder/encoderblock_7/LayerNorm_0/bias": (40,)}, "encoderblock_4 are missing, there is a block 7"),
        ({"Encoder/encoderblock_0/SelfAttention/query/kernel": (40, 7, 10)}, "not a multiple of num_heads 7"),
    ],
)
def test_tree_that_is_no_model_is_named(changes: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {k: v for k, v in (shapes_of("token_k2") | changes).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        infer_config(shapes)


def test_released_files_are_known_by_the_start_of_their_name() -> None:
    fine_tuned = find_release("vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012_seed0")
    assert fine_tuned is RELEASES["vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012"]
    assert (fine_tuned.hints.num_selected_experts, fine_tuned.hints.capacity_factor) == (2, 1.5)
    assert fine_tuned.preprocessing((384, 384), 3).fit == "stretch"
    from_scratch = find_release("vmoe_s32_last2_ilsvrc2012_randaug_light1")
    assert from_scratch.preprocessing((224, 224), 3).crop_fraction == 0.875
    assert find_release("ckpt").hints == Hints()


def test_released_ensemble_is_refused() -> None:
    with pytest.raises(ConfigError, match="eee_s32_last2_ilsvrc2012 is an ensemble"):
        find_release("eee_s32_last2_ilsvrc2012")
