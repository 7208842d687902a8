"""State dicts of timm's dense Vision Transformers under our names.

timm computes GELU exactly where the reference approximates it with tanh, so the configuration says
`gelu_approximation="none"`. A variant with more parameters (registers, distillation token, layer scale, `fc_norm`) is
refused by name. The pixel range is not in the state either: it is taken as -1..1, that of timm's augreg models; the
exporter's `--mean` and `--std` say otherwise.

Axes: D hidden, F MLP width.
"""

from __future__ import annotations

import re

from torch import Tensor

from vmoe.architecture import Hints
from vmoe.config import ConfigError, ModelConfig
from vmoe.errors import CheckpointError

MARK = "patch_embed.proj.weight"  # the parameter by which such a state dict is known

_RENAMES = (
    (re.compile(r"^patch_embed\.proj\."), "embedding."),
    (re.compile(r"^cls_token$"), "class_token"),
    (re.compile(r"^pos_embed$"), "position_embedding"),
    (re.compile(r"^(blocks\.\d+)\.norm1\."), r"\1.attention_norm."),
    (re.compile(r"^(blocks\.\d+)\.norm2\."), r"\1.mlp_norm."),
    (re.compile(r"^(blocks\.\d+)\.attn\.qkv\."), r"\1.attention.qkv."),
    (re.compile(r"^(blocks\.\d+)\.attn\.proj\."), r"\1.attention.out."),
    (re.compile(r"^(blocks\.\d+)\.mlp\.fc1\."), r"\1.mlp.linear_in."),
    (re.compile(r"^(blocks\.\d+)\.mlp\.fc2\."), r"\1.mlp.linear_out."),
    (re.compile(r"^pre_logits\.fc\."), "pre_logits."),
)


def from_timm(state: dict[str, Tensor], hints: Hints) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state under the names of `vmoe.model.VisionTransformer`.

    The number of heads leaves no trace in the parameters: heads are 64 wide, as in all of timm's plain models up to
    ViT-L, and 80 wide in ViT-H (D = 1280).

    Raises:
        CheckpointError, ConfigError: a parameter that decides is missing or has the wrong number of axes.
    """
    hidden_size, channels, height, width = _shape(state, MARK, 4)
    num_tokens = _shape(state, "pos_embed", 3)[1]
    has_class_token = "cls_token" in state
    side = round((num_tokens - has_class_token) ** 0.5)
    image_size = hints.image_size
    patches = -1 if image_size is None else (image_size[0] // height) * (image_size[1] // width)
    if image_size is None or patches + has_class_token != num_tokens:
        image_size = (side * height, side * width)
    blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    head_width = 80 if hidden_size == 1280 else 64
    if hidden_size % head_width:
        raise ConfigError(f"hidden size {hidden_size} of {MARK} is no multiple of the head width {head_width}")
    representation = _shape(state, "pre_logits.fc.weight", 2)[0] if "pre_logits.fc.weight" in state else None
    config = ModelConfig(
        image_size=image_size,
        patch_size=(height, width),
        num_classes=_shape(state, "head.weight", 2)[0],
        hidden_size=hidden_size,
        num_layers=max(blocks, default=-1) + 1,
        mlp_dim=_shape(state, "blocks.0.mlp.fc1.weight", 2)[0],
        num_heads=hidden_size // head_width,
        channels=channels,
        classifier="token" if has_class_token else "gap",
        representation_size=representation,
        gelu_approximation="none",
    )
    renamed = {_rename(name): value for name, value in state.items()}
    renamed["embedding.weight"] = state[MARK].permute(0, 2, 3, 1).reshape(hidden_size, -1)
    return config, renamed


def _shape(state: dict[str, Tensor], name: str, num_axes: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"parameter {name} is missing: is this the state of a timm VisionTransformer?")
    if state[name].ndim != num_axes:
        raise CheckpointError(f"parameter {name} has shape {tuple(state[name].shape)}, expected {num_axes} axes")
    return tuple(state[name].shape)


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name
