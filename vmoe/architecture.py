"""The architecture of a model of google-research/vmoe, inferred from the shapes of its parameters. Torch-free.

A parameter tree tells the sizes, blocks, heads, experts, the place of the MoE layers, the head, `pre_logits` and
qk-norm, and through the table of learned positions the image size. It does not tell what stands in `Hints`. Their
defaults:

    num_selected_experts   2, as in all configurations of the paper (the reference's constructor says 1, nobody uses it)
    capacity_factor        1.05, the paper's in training; 1.5 in the released files that were fine-tuned
    router                 experts_per_item
    routing                bpr: it changes nothing but who is dropped, and is what makes C and K a lever
    position_embedding     sincos2d where the tree has no table
    image_size             from the table, whose grid is taken to be square

Capacities are rounded up to a multiple of 1 and a routing group is one image, as everywhere in this project: with
the reference's multiple of 4 neighbouring operating points of so small a group would merge. Its own values (multiple of
4, groups of several images) come from a configuration file, see `vmoe.reference.config_from_reference`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vmoe.config import (
    Classifier,
    ConfigError,
    ModelConfig,
    MoeConfig,
    PositionEmbedding,
    RouterKind,
    Routing,
)
from vmoe.preprocess import Preprocessing

POSITION_TABLE = "Encoder/posembed_input/pos_embedding"

_BLOCK = re.compile(r"Encoder/encoderblock_(\d+)/")


@dataclass(frozen=True)
class Hints:
    """What a parameter tree cannot tell; None takes the default of the module docstring."""

    image_size: tuple[int, int] | None = None
    num_selected_experts: int | None = None
    capacity_factor: float | None = None
    router: RouterKind | None = None
    routing: Routing | None = None
    position_embedding: PositionEmbedding | None = None

    def or_else(self, other: Hints) -> Hints:
        """These hints, with those of `other` where there are none."""
        mine = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **mine)

    def moe_overrides(self) -> dict[str, object]:
        """The fields of `MoeConfig` that are given."""
        names = ("num_selected_experts", "capacity_factor", "router", "routing")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


NO_HINTS = Hints()


@dataclass(frozen=True)
class Release:
    """A checkpoint that the authors published.

    Attributes:
        hints: of its configuration in the reference's vmoe/configs/vmoe_paper.
        crop_fraction: None for images stretched to the model's size, else what remains of the scaled shorter side
            (`resize_small(256)|central_crop(224)`).
    """

    hints: Hints
    crop_fraction: float | None = None

    def preprocessing(self, image_size: tuple[int, int], channels: int) -> Preprocessing:
        """Values from -1 to 1, `value_range(-1,1)` of the reference."""
        half = (0.5,) * channels
        if self.crop_fraction is None:
            return Preprocessing(image_size, channels, half, half)
        return Preprocessing(image_size, channels, half, half, "center_crop", self.crop_fraction)


UNKNOWN_RELEASE = Release(NO_HINTS)

_FINE_TUNED = Release(Hints(num_selected_experts=2, capacity_factor=1.5))
_FROM_SCRATCH = Release(Hints(num_selected_experts=2, capacity_factor=1.05), crop_fraction=224 / 256)

# gs://vmoe_checkpoints; see the README and vmoe/configs/vmoe_paper of google-research/vmoe.
RELEASES: dict[str, Release] = {
    "vmoe_s32_last2_ilsvrc2012_randaug_light1": _FROM_SCRATCH,
    "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012": _FINE_TUNED,
    "vmoe_s32_last2_ilsvrc2012_randaug_medium": _FROM_SCRATCH,
    "vmoe_b16_imagenet21k_randaug_strong": _FROM_SCRATCH,
    "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012": _FINE_TUNED,
}


def find_release(file_name: str) -> Release:
    """The published checkpoint whose name the file name starts with, `UNKNOWN_RELEASE` for any other.

    Raises:
        ConfigError: the name is that of a published ensemble (E3), a model that is not supported.
    """
    if file_name.startswith("eee_"):
        raise ConfigError(f"{file_name} is an ensemble of experts (E3), known are V-MoE and dense models")
    names = [name for name in RELEASES if file_name.startswith(name)]
    return RELEASES[max(names, key=len)] if names else UNKNOWN_RELEASE


def infer_config(shapes: Mapping[str, tuple[int, ...]], hints: Hints = NO_HINTS) -> ModelConfig:
    """The configuration of a model from its parameter tree.

    Arguments:
        shapes: by path, for example `Encoder/encoderblock_0/Mlp/Dense_0/kernel`.

    Raises:
        ConfigError: a parameter that decides is missing or has a shape that makes no sense (the message names it), or
            a hint contradicts the tree.
    """
    height, width, channels, hidden_size = _axes(shapes, "embedding/kernel", "(height, width, channels, hidden)")
    attention = "Encoder/encoderblock_0/SelfAttention"
    _, num_heads, _ = _axes(shapes, f"{attention}/query/kernel", "(hidden, heads, head width)")
    _, num_classes = _axes(shapes, "head/kernel", "(width, classes)")
    representation_size = None
    if "pre_logits/kernel" in shapes:
        _, representation_size = _axes(shapes, "pre_logits/kernel", "(hidden, width)")
    classifier: Classifier = "token" if "cls" in shapes else "map" if "MapHead/probe" in shapes else "gap"
    position_embedding = hints.position_embedding or ("learned" if POSITION_TABLE in shapes else "sincos2d")
    return ModelConfig(
        image_size=_image_size(shapes, (height, width), classifier, hints.image_size),
        patch_size=(height, width),
        num_classes=num_classes,
        hidden_size=hidden_size,
        num_layers=_num_blocks(shapes),
        mlp_dim=_mlp_dim(shapes),
        num_heads=num_heads,
        channels=channels,
        classifier=classifier,
        position_embedding=position_embedding,
        representation_size=representation_size,
        qk_norm=f"{attention}/query_ln/scale" in shapes,
        moe=_infer_moe(shapes, hints),
    )


def _infer_moe(shapes: Mapping[str, tuple[int, ...]], hints: Hints) -> MoeConfig | None:
    routers = {}
    for name in shapes:
        if (block := _BLOCK.match(name)) and name.endswith("/Moe/Router/dense/kernel"):
            _, routers[int(block[1])] = _axes(shapes, name, "(hidden, experts)")
    if not routers:
        return None
    layers = tuple(sorted(routers))
    num_experts = routers[layers[0]]
    router = hints.router or "experts_per_item"
    selected = hints.num_selected_experts or (1 if router == "items_per_expert" else min(2, num_experts))
    moe = MoeConfig(num_experts, layers, selected, router=router, routing=hints.routing or "bpr")
    return moe if hints.capacity_factor is None else replace(moe, capacity_factor=hints.capacity_factor)


def native_image_size(
    shapes: Mapping[str, tuple[int, ...]], patch_size: tuple[int, int], classifier: Classifier
) -> tuple[int, int] | None:
    """(height, width) for which the table of learned positions was made, if there is one and its grid is square."""
    if POSITION_TABLE not in shapes:
        return None
    _, tokens, _ = _axes(shapes, POSITION_TABLE, "(1, tokens, hidden)")
    side = math.isqrt(tokens - (classifier == "token"))
    if side < 1 or side**2 != tokens - (classifier == "token"):
        return None
    return side * patch_size[0], side * patch_size[1]


def _image_size(
    shapes: Mapping[str, tuple[int, ...]],
    patch_size: tuple[int, int],
    classifier: Classifier,
    image_size: tuple[int, int] | None,
) -> tuple[int, int]:
    """The size that the parameters fit: the hint where it does, else that of a square grid."""
    native = native_image_size(shapes, patch_size, classifier)
    if POSITION_TABLE in shapes:
        tokens = shapes[POSITION_TABLE][1]
        if image_size is not None:
            patches = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
            if patches + (classifier == "token") == tokens:
                return image_size
        if native is None:
            raise ConfigError(
                f"parameter {POSITION_TABLE} holds {tokens} positions, which is no square grid: give the image size "
                f"that the model was trained with, found {image_size}"
            )
        return native
    if image_size is None:
        raise ConfigError("the parameters hold no table of positions to tell the image size: give the image size")
    return image_size


def _num_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
    if blocks != set(range(len(blocks))):
        missing = min(set(range(max(blocks) + 1)) - blocks)
        raise ConfigError(f"parameters of Encoder/encoderblock_{missing} are missing, there is a block {max(blocks)}")
    return len(blocks)


def _mlp_dim(shapes: Mapping[str, tuple[int, ...]]) -> int:
    moe = "Encoder/encoderblock_0/Moe/Mlp/Dense_0/kernel"
    if moe in shapes:
        return _axes(shapes, moe, "(experts, hidden, MLP width)")[2]
    return _axes(shapes, "Encoder/encoderblock_0/Mlp/Dense_0/kernel", "(hidden, MLP width)")[1]


def _axes(shapes: Mapping[str, tuple[int, ...]], name: str, expected: str) -> tuple[int, ...]:
    """The shape of a parameter, checked for the number of axes that `expected` describes."""
    if name not in shapes:
        raise ConfigError(f"parameter {name} of shape {expected} is missing: is this a model of google-research/vmoe?")
    if len(shapes[name]) != expected.count(",") + 1 or min(shapes[name]) < 1:
        raise ConfigError(f"parameter {name} has shape {shapes[name]}, expected {expected}")
    return shapes[name]


def parse_image_size(text: str) -> tuple[int, int]:
    """(height, width) from `H` or `HxW`.

    Raises:
        ConfigError: names the text and the form expected.
    """
    try:
        height, _, width = text.lower().partition("x")
        size = int(height), int(width or height)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not an image size, expected H or HxW such as 384 or 224x320") from error
    if min(size) < 1:
        raise ConfigError(f"the image size must be at least 1x1, got {text!r}")
    return size
