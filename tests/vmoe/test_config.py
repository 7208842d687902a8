"""Model configurations: JSON, refusals, placement of the MoE layers, slots and the named variants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vmoe.tiny import CONFIG, DENSE, MOE
from vmoe.config import VARIANTS, ConfigError, ModelConfig, every_layers, last_layers, load_config
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint


@pytest.mark.parametrize("name", VARIANTS)
def test_config_of_every_variant_when_written_as_json_and_read_again_is_equal(name: str) -> None:
    assert ModelConfig.from_json(VARIANTS[name].to_json()) == VARIANTS[name]


def test_load_config_of_a_file_reads_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    assert load_config(tmp_path / "config.json") == CONFIG


def test_load_config_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the model configuration .*absent\.json"):
        load_config(tmp_path / "absent.json")


def test_load_config_of_a_binary_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read the model configuration .*binary\.json"):
        load_config(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"moe": 5}', "MoeConfig must be a JSON object, got int"),
        ("{}", "ModelConfig: .*missing"),
    ],
)
def test_from_json_of_something_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(text)


@pytest.mark.parametrize("place", ["model", "moe"])
def test_from_json_with_an_unknown_key_names_it_and_the_known_ones(place: str) -> None:
    values = json.loads(CONFIG.to_json())
    (values if place == "model" else values["moe"])["capacity_ratio"] = 1.0
    known = "hidden_size" if place == "model" else "capacity_factor"
    with pytest.raises(ConfigError, match=rf"unknown keys \['capacity_ratio'\].*{known}"):
        ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (8, 9)}, r"image_size \(8, 9\) is not a multiple of patch_size \(4, 4\)"),
        ({"image_size": (8, 8, 1)}, r"image_size must be \(height, width\)"),
        ({"patch_size": (0, 4)}, r"patch_size must be .* got \(0, 4\)"),
        ({"num_heads": 3}, "hidden_size 8 is not a multiple of num_heads 3"),
        ({"hidden_size": 6, "num_heads": 1}, "sincos2d needs a hidden_size that is a multiple of 4, got 6"),
        ({"hidden_size": 0}, "hidden_size must be above 0"),
        ({"num_heads": 0}, "num_heads must be above 0"),
        ({"num_classes": -1}, "num_classes must be above 0 and finite, got -1"),
        ({"num_layers": 1}, r"moe.layers \[0, 1\] must lie within the 1 blocks"),
        ({"classifier": "cls"}, "classifier must be 'token', 'gap' or 'map', got 'cls'"),
        ({"position_embedding": "sincos"}, "position_embedding must be .* got 'sincos'"),
        ({"representation_size": 0}, "representation_size must be above 0"),
    ],
)
def test_model_config_with_a_bad_value_says_which_and_what_would_be_right(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_selected_experts": 5}, "num_selected_experts must be between 1 and num_experts = 4, got 5"),
        ({"num_selected_experts": 0}, "between 1 and num_experts = 4, got 0"),
        ({"num_experts": 0}, "num_experts must be above 0"),
        ({"routing": "priority"}, "routing must be 'bpr' or 'vanilla', got 'priority'"),
        ({"layers": ()}, "layers must be a non-empty ascending list"),
        ({"layers": (1, 0)}, r"ascending list of block indices, got \[1, 0\]"),
        ({"layers": (1, 1)}, r"ascending list of block indices, got \[1, 1\]"),
        ({"group_images": 0}, "group_images must be above 0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0 and finite, got 0.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be above 0 and finite, got nan"),
        ({"capacity_multiple": 0}, "capacity_multiple must be above 0"),
        ({"capacity_rounding": "floor"}, "capacity_rounding must be 'ceil' or 'round', got 'floor'"),
        ({"noise_std": -1.0}, "noise_std must be at least 0"),
    ],
)
def test_moe_config_with_a_bad_value_says_which_and_what_would_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(MOE, **changes)


def test_from_json_with_a_negative_layer_is_refused() -> None:
    values = json.loads(CONFIG.to_json())
    values["moe"]["layers"] = [-1, 1]
    with pytest.raises(ConfigError, match=r"moe.layers \[-1, 1\] must lie within the 2 blocks"):
        ModelConfig.from_json(json.dumps(values))


def test_from_json_with_a_value_of_the_wrong_type_is_a_config_error() -> None:
    values = json.loads(CONFIG.to_json()) | {"hidden_size": "eight"}
    with pytest.raises(ConfigError, match="ModelConfig"):
        ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"), [(8, 2, (5, 7)), (12, 2, (9, 11)), (9, 3, (3, 5, 7)), (2, 1, (1,))]
)
def test_last_layers_counts_odd_blocks_from_the_end(num_layers: int, count: int, expected: tuple[int, ...]) -> None:
    assert last_layers(num_layers, count) == expected


@pytest.mark.parametrize(
    ("num_layers", "stride", "expected"), [(8, 2, (1, 3, 5, 7)), (8, 3, (2, 5)), (3, 1, (0, 1, 2)), (8, 8, (7,))]
)
def test_every_layers_takes_the_last_block_of_each_stride(
    num_layers: int, stride: int, expected: tuple[int, ...]
) -> None:
    assert every_layers(num_layers, stride) == expected


@pytest.mark.parametrize("count", [0, 5])
def test_last_layers_of_more_than_the_odd_blocks_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"'last {count}' of 8 blocks: there are 4 odd blocks"):
        last_layers(8, count)


@pytest.mark.parametrize("stride", [0, 9])
def test_every_layers_with_a_stride_beyond_the_blocks_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match="the stride must be between 1 and 8"):
        every_layers(8, stride)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds_with_its_experts_in_place_on_the_meta_device(name: str) -> None:
    config = VARIANTS[name]
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in VisionTransformer(config).state_dict().items()}
    layers = () if config.moe is None else config.moe.layers
    for index in range(config.num_layers):
        if index in layers:
            assert config.moe is not None
            expected = (config.moe.num_experts, config.hidden_size, config.mlp_dim)
            assert shapes[f"blocks.{index}.mlp.experts.weight_in"] == expected
        else:
            assert shapes[f"blocks.{index}.mlp.linear_in.weight"] == (config.mlp_dim, config.hidden_size)
    assert shapes["head.weight"][0] == config.num_classes


def test_tokens_per_image_counts_the_class_token() -> None:
    # 8 x 12 pixels in patches of 4 x 2: a grid of 2 x 6.
    config = replace(CONFIG, image_size=(8, 12), patch_size=(4, 2))
    assert config.grid == (2, 6)
    assert config.tokens_per_image == 12
    assert replace(config, classifier="token").tokens_per_image == 13


@pytest.mark.parametrize(
    ("changes", "moe_changes", "point", "expected"),
    [
        ({}, {}, (1.0, 2), 2),  # 4 tokens * 2 / 4
        ({"classifier": "token"}, {}, (1.0, 2), 3),  # 5 tokens: 2.5, rounded up
        ({"classifier": "token"}, {"capacity_rounding": "round"}, (1.0, 2), 2),  # 2.5, half to even
        ({}, {"capacity_multiple": 4}, (1.0, 2), 4),  # 2, up to a multiple of 4
        ({}, {"group_images": 3}, (1.0, 2), 6),  # 12 tokens share the buffers
        ({}, {}, (0.01, 1), 1),  # 0.01, at least 1
    ],
)
def test_slots_by_hand(
    changes: dict[str, Any], moe_changes: dict[str, Any], point: tuple[float, int], expected: int
) -> None:
    config = replace(CONFIG, **changes, moe=replace(MOE, **moe_changes))
    assert config.slots(OperatingPoint(*point)) == (expected, expected)


def test_slots_with_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(
        ValueError, match="num_selected_experts must be at most 4 for experts_per_item routing with 4 experts, got 5"
    ):
        CONFIG.slots(OperatingPoint(1.0, 5))


def test_slots_of_a_dense_model_are_none() -> None:
    assert DENSE.slots(OperatingPoint(1.0, 2)) == ()
    assert DENSE.operating_point is None


def test_the_fashion_mnist_variant_is_what_we_promised_to_ship() -> None:
    config = VARIANTS["vmoe_fashion_mnist"]
    assert (config.image_size, config.channels, config.num_classes) == ((28, 28), 1, 10)
    assert config.num_layers == 8
    assert 128 <= config.hidden_size <= 192
    assert config.patch_size == (4, 4)
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.num_selected_experts) == (8, 2)
    assert config.moe.layers == (1, 3, 5, 7)  # every other block
    assert config.moe.group_images == 1
    # 49 patches (+ a class token, if any): 49 * 2 / 8 = 12.25 and 49 / 4 / 8 = 1.53, rounded up.
    assert config.slots(OperatingPoint(1.0, 2)) == (13,) * 4
    assert config.slots(OperatingPoint(0.25, 1)) == (2,) * 4
