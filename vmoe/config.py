"""Model configuration and the named variants. Everything that fixes the shape of a parameter stands here.

C and K are not part of the architecture: `MoeConfig` holds the values that a model was trained with, which are the
default of a forward pass and the top of the ladder of operating points.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from vmoe.operating_point import OperatingPoint, Rounding, slots_per_expert

Classifier = Literal["token", "gap", "map"]
PositionEmbedding = Literal["learned", "sincos2d", "none"]
Routing = Literal["bpr", "vanilla"]
GeluApproximation = Literal["tanh", "none"]
RouterKind = Literal["experts_per_item", "items_per_expert"]


_Config = TypeVar("_Config")


class ConfigError(ValueError):
    """A configuration that no model can have; the message names the field, the value and what would be right."""


@dataclass(frozen=True)
class MoeConfig:
    """The sparse layers of a V-MoE.

    Attributes:
        num_experts: E.
        layers: indices of the blocks whose MLP is a mixture of experts, ascending.
        num_selected_experts: K of the training run.
        capacity_factor: C of the training run.
        router: `experts_per_item` (every token chooses its K best experts; the paper's) or `items_per_expert` (every
            expert chooses its best tokens, 'expert choice', 2202.09368). The latter has neither K, which must be 1, nor
            a queue order; C is then the mean number of experts per token.
        routing: `bpr` (Batch Priority Routing) or `vanilla` (position order).
        noise_std: standard deviation of the router noise in training, in units of 1/E (paper: 1).
        importance_loss_weight, load_loss_weight: weights of the auxiliary losses (paper, appendix A: 0.005 each).
        capacity_rounding, capacity_multiple: see `operating_point.slots_per_expert`.
        group_images: images that share a routing group. With 1 an answer never depends on batch mates.
        normalize_weights: divide the combine weights of a token's K choices by their sum, before any is dropped. Not in
            the paper; made for upcycled models (2212.05055), see `vmoe.upcycle`.
    """

    num_experts: int
    layers: tuple[int, ...]
    num_selected_experts: int = 2
    capacity_factor: float = 1.05
    router: RouterKind = "experts_per_item"
    routing: Routing = "bpr"
    noise_std: float = 1.0
    importance_loss_weight: float = 0.005
    load_loss_weight: float = 0.005
    capacity_rounding: Rounding = "ceil"
    capacity_multiple: int = 1
    group_images: int = 1
    normalize_weights: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        _check_positive(self, "num_experts", "capacity_factor", "capacity_multiple", "group_images")
        if not 1 <= self.num_selected_experts <= self.num_experts:
            raise ConfigError(
                f"num_selected_experts must be between 1 and num_experts = {self.num_experts}, "
                f"got {self.num_selected_experts}"
            )
        if self.router not in ("experts_per_item", "items_per_expert"):
            raise ConfigError(f"router must be 'experts_per_item' or 'items_per_expert', got {self.router!r}")
        if self.router == "items_per_expert" and self.num_selected_experts != 1:
            raise ConfigError(f"items_per_expert has no K: num_selected_experts is 1, got {self.num_selected_experts}")
        if self.router == "items_per_expert" and self.normalize_weights:
            raise ConfigError("items_per_expert has no K choices: normalize_weights must be false, got true")
        if self.routing not in ("bpr", "vanilla"):
            raise ConfigError(f"routing must be 'bpr' or 'vanilla', got {self.routing!r}")
        if list(self.layers) != sorted(set(self.layers)) or not self.layers:
            raise ConfigError(f"layers must be a non-empty ascending list of block indices, got {list(self.layers)}")
        if self.capacity_rounding not in ("ceil", "round"):
            raise ConfigError(f"capacity_rounding must be 'ceil' or 'round', got {self.capacity_rounding!r}")
        if not 0 <= self.noise_std < math.inf:
            raise ConfigError(f"noise_std must be at least 0 and finite, got {self.noise_std}")

    @property
    def most_selected_experts(self) -> int:
        """Largest K that a forward pass may ask for."""
        return 1 if self.router == "items_per_expert" else self.num_experts

    def choices_per_token(self, max_selected_experts: int) -> int:
        """Number of experts that a token may get, when K is at most `max_selected_experts`."""
        return self.num_experts if self.router == "items_per_expert" else max_selected_experts


@dataclass(frozen=True)
class ModelConfig:
    """A Vision Transformer, dense (`moe` is None) or sparse.

    Attributes:
        image_size, patch_size: (height, width) in pixels.
        channels: input channels.
        mlp_dim: hidden width of the MLPs and of every expert.
        classifier: `token` (class token), `gap` (global average) or `map` (attention pooling).
        representation_size: width of the tanh `pre_logits` layer, None for none.
        qk_norm: LayerNorm with scale only on queries and keys.
        position_temperature: of `sincos2d`.
        gelu_approximation: `tanh` as in the reference, or `none` (timm's models); named as torch and ONNX name it.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_classes: int
    hidden_size: int
    num_layers: int
    mlp_dim: int
    num_heads: int
    channels: int = 3
    classifier: Classifier = "token"
    position_embedding: PositionEmbedding = "learned"
    representation_size: int | None = None
    qk_norm: bool = False
    position_temperature: float = 10_000.0
    gelu_approximation: GeluApproximation = "tanh"
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        _check_positive(self, "num_classes", "hidden_size", "num_layers", "mlp_dim", "num_heads", "channels")
        for name in ("image_size", "patch_size"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be (height, width), each at least 1, got {getattr(self, name)}")
        if self.classifier not in ("token", "gap", "map"):
            raise ConfigError(f"classifier must be 'token', 'gap' or 'map', got {self.classifier!r}")
        if self.position_embedding not in ("learned", "sincos2d", "none"):
            raise ConfigError(
                f"position_embedding must be 'learned', 'sincos2d' or 'none', got {self.position_embedding!r}"
            )
        if self.representation_size is not None:
            _check_positive(self, "representation_size")
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.position_embedding == "sincos2d" and self.hidden_size % 4:
            raise ConfigError(f"sincos2d needs a hidden_size that is a multiple of 4, got {self.hidden_size}")
        if self.moe is not None and not 0 <= self.moe.layers[0] <= self.moe.layers[-1] < self.num_layers:
            raise ConfigError(f"moe.layers {list(self.moe.layers)} must lie within the {self.num_layers} blocks")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def tokens_per_image(self) -> int:
        """Tokens that are routed per image; the class token is one of them."""
        return self.grid[0] * self.grid[1] + (self.classifier == "token")

    @property
    def operating_point(self) -> OperatingPoint | None:
        """The point that the model was trained with; None for a dense model."""
        if self.moe is None:
            return None
        return OperatingPoint(self.moe.capacity_factor, self.moe.num_selected_experts)

    def slots(self, point: OperatingPoint) -> tuple[int, ...]:
        """Slots per expert of each MoE layer at an operating point: (L,).

        Raises:
            ValueError: K above E, no slot is left (see `slots_per_expert`), or an expert that chooses its tokens would
                have more slots than there are tokens in a group.
        """
        if self.moe is None:
            return ()
        if point.num_selected_experts > self.moe.most_selected_experts:
            raise ValueError(
                f"num_selected_experts must be at most {self.moe.most_selected_experts} for {self.moe.router} routing "
                f"with {self.moe.num_experts} experts, got {point.num_selected_experts}"
            )
        tokens = self.tokens_per_image * self.moe.group_images
        assignments = tokens * point.num_selected_experts
        slots = slots_per_expert(
            assignments,
            self.moe.num_experts,
            point.capacity_factor,
            rounding=self.moe.capacity_rounding,
            multiple=self.moe.capacity_multiple,
        )
        if self.moe.router == "items_per_expert" and slots > tokens:
            raise ValueError(
                f"capacity factor {point.capacity_factor} asks every expert to choose {slots} of {tokens} tokens; "
                f"with {self.moe.num_experts} experts it must be at most {self.moe.num_experts}"
            )
        return (slots,) * len(self.moe.layers)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Inverse of `to_json`.

        Raises:
            ConfigError: not JSON, an unknown or a missing key, or a value out of range.
        """
        try:
            values: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the model configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"the model configuration must be a JSON object, got {type(values).__name__}")
        moe = values.pop("moe", None)
        return _build(cls, values | {"moe": None if moe is None else _build(MoeConfig, moe)})


def _check_positive(config: MoeConfig | ModelConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0 and finite, got {value}")


def _build(cls: type[_Config], values: Any) -> _Config:
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} must be a JSON object, got {type(values).__name__}")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := set(values) - known:
        raise ConfigError(f"unknown keys {sorted(unknown)} for {cls.__name__}; known are {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


def last_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """The last `count` odd blocks, 'last n' of the paper: 8 blocks, 2 -> (5, 7)."""
    odd = range(1, num_layers, 2)
    if not 1 <= count <= len(odd):
        raise ConfigError(f"'last {count}' of {num_layers} blocks: there are {len(odd)} odd blocks")
    return tuple(odd[-count:])


def every_layers(num_layers: int, stride: int) -> tuple[int, ...]:
    """Every `stride`-th block, 'every n' of the paper: 8 blocks, 2 -> (1, 3, 5, 7)."""
    if not 1 <= stride <= num_layers:
        raise ConfigError(f"'every {stride}' of {num_layers} blocks: the stride must be between 1 and {num_layers}")
    return tuple(range(stride - 1, num_layers, stride))


def load_config(path: Path) -> ModelConfig:
    """Reads a model configuration from a JSON file."""
    try:
        return ModelConfig.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the model configuration {path}: {error}") from error


# Sizes of the paper's table 8 and of the released files; `fashion_mnist` is the small model that we train and ship.
_BACKBONES: dict[str, ModelConfig] = {
    "s32": ModelConfig((224, 224), (32, 32), 1000, 512, 8, 2048, 8),
    "s16": ModelConfig((224, 224), (16, 16), 1000, 512, 8, 2048, 8),
    "b32": ModelConfig((224, 224), (32, 32), 1000, 768, 12, 3072, 12),
    "b16": ModelConfig((224, 224), (16, 16), 1000, 768, 12, 3072, 12),
    "l32": ModelConfig((224, 224), (32, 32), 1000, 1024, 24, 4096, 16),
    "l16": ModelConfig((224, 224), (16, 16), 1000, 1024, 24, 4096, 16),
    "h14": ModelConfig((224, 224), (14, 14), 1000, 1280, 32, 5120, 16),
}


def _variants() -> dict[str, ModelConfig]:
    table = dict(_BACKBONES)
    for name, placement, num_experts in (
        ("s32", "last2", 8),
        ("s32", "last2", 32),
        ("b32", "last2", 8),
        ("b16", "last2", 8),
        ("b16", "every2", 8),
        ("l16", "last2", 32),
        ("l16", "every2", 32),
        ("h14", "last2", 32),
    ):
        dense = _BACKBONES[name]
        place = last_layers if placement == "last2" else every_layers
        moe = MoeConfig(num_experts, place(dense.num_layers, 2))
        table[f"vmoe_{name}_{placement}_e{num_experts}"] = replace(dense, moe=moe)
    # The largest of the paper, trained on 224 x 224 pixels (section 4.4).
    table["vmoe_15b"] = ModelConfig(
        (224, 224), (14, 14), 1000, 1408, 48, 6400, 16, moe=MoeConfig(32, every_layers(48, 2))
    )
    # Fixed positions and average pooling are said to learn faster than a class token with learned positions ("Better
    # plain ViT baselines", 2205.01580). Chosen after one aborted run, not compared under one recipe.
    table["vmoe_fashion_mnist"] = ModelConfig(
        (28, 28),
        (4, 4),
        num_classes=10,
        hidden_size=128,
        num_layers=8,
        mlp_dim=256,
        num_heads=4,
        channels=1,
        classifier="gap",
        position_embedding="sincos2d",
        moe=MoeConfig(8, every_layers(8, 2), capacity_factor=1.0),
    )
    table["fashion_mnist"] = replace(table["vmoe_fashion_mnist"], moe=None)
    return table


VARIANTS: dict[str, ModelConfig] = _variants()
