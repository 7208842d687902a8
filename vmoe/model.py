"""Vision Transformer with sparse MoE MLPs, equal to the reference's `VisionTransformerMoe` at inference.

Axes: B images, H and W pixels, C input channels, S tokens per image, D hidden, L MoE layers, E experts, K choices.
Pre-norm blocks, LayerNorm epsilon 1e-6, tanh-approximated GELU. Images are NHWC, as in the reference and in the
exported graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmoe.config import ModelConfig
from vmoe.moe import MoeMlp, MoeOutput
from vmoe.operating_point import OperatingPoint
from vmoe.parallel import WHOLE, Shard

LAYER_NORM_EPSILON = 1e-6  # the reference's; torch's default 1e-5 is visible in the logits (3e-5)


@dataclass(frozen=True)
class RoutingStatistics:
    """What the MoE layers did with each image.

    Attributes:
        kept: (B, L) float32, share of the image's K * S assignments that were processed. Where experts choose their
            tokens K counts as 1, and this is the mean number of experts per token.
        expert_load: (B, L, E) int64, tokens processed by each expert.
        processed: (B, L, S) int64, number of experts that processed each token.
        layers: raw output of each MoE layer, by routing group.
    """

    kept: Tensor
    expert_load: Tensor
    processed: Tensor
    layers: tuple[MoeOutput, ...]


@dataclass(frozen=True)
class ModelOutput:
    """Attributes:
    logits: (B, num_classes).
    auxiliary_loss: scalar, sum over MoE layers; 0 outside training.
    statistics: on request.
    features: (B, D) or (B, representation_size), what the head sees.
    """

    logits: Tensor
    auxiliary_loss: Tensor
    statistics: RoutingStatistics | None
    features: Tensor


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection; optional scale-only LayerNorm on queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = _linear(size, 3 * size)
        self.out = _linear(size, size)
        self.query_norm, self.key_norm = _head_norm(config), _head_norm(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        batch, length, size = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, heads, S, head_dim)
        mixed = attend(self.query_norm(query), self.key_norm(key), value)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, size))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Dense two-layer MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gelu_approximation = config.gelu_approximation
        hidden_size, mlp_dim = config.hidden_size, config.mlp_dim
        self.linear_in = _linear(hidden_size, mlp_dim)
        self.linear_out = _linear(mlp_dim, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = functional.gelu(self.linear_in(tokens), approximate=self.gelu_approximation)
        return self.linear_out(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block; its MLP is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPSILON)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, LAYER_NORM_EPSILON)
        sparse = config.moe is not None and index in config.moe.layers
        self.mlp: Mlp | MoeMlp
        if config.moe is not None and sparse:
            self.mlp = MoeMlp(config.moe, config.hidden_size, config.mlp_dim, config.gelu_approximation)
        else:
            self.mlp = Mlp(config)


class MapHead(nn.Module):
    """Multi-head attention pooling: a learned probe attends to the tokens, then a residual MLP (ViT-G, 2106.04560)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.probe = nn.Parameter(torch.empty(1, 1, size))
        nn.init.xavier_uniform_(self.probe)
        self.query, self.key_value, self.out = _linear(size, size), _linear(size, 2 * size), _linear(size, size)
        self.query_norm, self.key_norm = _head_norm(config), _head_norm(config)
        self.norm = nn.LayerNorm(size, LAYER_NORM_EPSILON)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)."""
        batch, length, size = tokens.shape
        query = self.query_norm(self.query(self.probe).view(1, 1, self.num_heads, -1).transpose(1, 2))
        key, value = self.key_value(tokens).view(batch, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        pooled = attend(query.expand(batch, -1, -1, -1), self.key_norm(key), value)
        pooled = self.out(pooled.transpose(1, 2).reshape(batch, size))
        return pooled + self.mlp(self.norm(pooled))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """V-MoE, or a dense ViT when `config.moe` is None."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embedding = _linear(config.patch_size[0] * config.patch_size[1] * config.channels, size)
        if config.classifier == "token":
            self.class_token = nn.Parameter(torch.zeros(1, 1, size))
        if config.position_embedding == "learned":
            self.position_embedding = nn.Parameter(torch.empty(1, config.tokens_per_image, size))
            nn.init.normal_(self.position_embedding, std=0.02)
        elif config.position_embedding == "sincos2d":
            self.sincos2d: Tensor
            self.register_buffer("sincos2d", sincos2d(config.grid, size, config.position_temperature), persistent=False)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = nn.LayerNorm(size, LAYER_NORM_EPSILON)
        if config.classifier == "map":
            self.map_head = MapHead(config)
        width = size
        if config.representation_size is not None:
            width = config.representation_size
            self.pre_logits = _linear(size, width)
        self.head = nn.Linear(width, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        images: Tensor,
        slots: Tensor | None = None,
        num_selected_experts: Tensor | None = None,
        *,
        max_selected_experts: int | None = None,
        with_statistics: bool = False,
        generator: torch.Generator | None = None,
        shard: Shard = WHOLE,
    ) -> ModelOutput:
        """Classifies a batch; every image may carry its own operating point.

        Arguments:
            images: (B, H, W, C) float, normalised.
            slots: (B, L) int64, slots per expert of each MoE layer; None takes the configured operating point. Images
                that share a routing group share the value of the group's first image.
            num_selected_experts: (B,) int64 in the same way.
            max_selected_experts: an upper bound of the latter; None looks it up (a device synchronisation on a GPU).
            with_statistics: fill `ModelOutput.statistics`.
            generator: source of the router noise in training mode.
            shard: in training, which part of the batch these images are.

        Raises:
            ValueError: a shape that does not fit the configuration.
        """
        config = self.config
        if images.shape[1:] != (*config.image_size, config.channels):
            expected = ("B", *config.image_size, config.channels)
            raise ValueError(f"images must have shape {expected}, got {tuple(images.shape)}")
        if config.moe is not None:
            slots, num_selected_experts, max_selected_experts = self._operating_points(
                images, slots, num_selected_experts, max_selected_experts
            )
        tokens = self.tokens(images)
        layers: list[MoeOutput] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            tokens = tokens + block.attention(block.attention_norm(tokens))
            normed = block.mlp_norm(tokens)
            if isinstance(block.mlp, MoeMlp):
                assert slots is not None
                assert num_selected_experts is not None
                assert max_selected_experts is not None
                layer = block.mlp(
                    normed,
                    slots[:, len(layers)],
                    num_selected_experts,
                    max_selected_experts,
                    generator=generator,
                    shard=shard,
                )
                layers.append(layer)
                tokens = tokens + layer.hidden
            else:
                tokens = tokens + block.mlp(normed)
        features = self.features(self.norm(tokens))
        logits = self.head(features)
        auxiliary_loss = sum((layer.auxiliary_loss for layer in layers), start=logits.new_zeros(()))
        statistics = None
        if with_statistics and num_selected_experts is not None:
            statistics = _statistics(layers, num_selected_experts, images.shape[0])
        return ModelOutput(logits, auxiliary_loss, statistics, features)

    def tokens(self, images: Tensor) -> Tensor:
        """Patch and position embedding: (B, H, W, C) -> (B, S, D)."""
        config = self.config
        rows, columns = config.grid
        patches = images.reshape(-1, rows, config.patch_size[0], columns, config.patch_size[1], config.channels)
        tokens = self.embedding(patches.permute(0, 1, 3, 2, 4, 5).reshape(images.shape[0], rows * columns, -1))
        if config.position_embedding == "sincos2d":
            tokens = tokens + self.sincos2d  # patches only: the class token gets no position
        if config.classifier == "token":
            tokens = torch.cat([self.class_token.to(tokens.dtype).expand(images.shape[0], -1, -1), tokens], dim=1)
        if config.position_embedding == "learned":
            tokens = tokens + self.position_embedding
        return tokens  # type: ignore[no-any-return]

    def features(self, tokens: Tensor) -> Tensor:
        """Pooling and optional `pre_logits`: (B, S, D) after the last norm -> (B, D) or (B, representation_size)."""
        if self.config.classifier == "token":
            pooled = tokens[:, 0]
        elif self.config.classifier == "gap":
            pooled = tokens.mean(dim=1)
        else:
            pooled = self.map_head(tokens)
        return pooled if self.config.representation_size is None else torch.tanh(self.pre_logits(pooled))

    def operating_point_tensors(self, point: OperatingPoint, batch: int) -> tuple[Tensor, Tensor]:
        """`slots` (B, L) and `num_selected_experts` (B,) that give every image of a batch the same point."""
        device = self.head.weight.device
        slots = torch.tensor([self.config.slots(point)], device=device, dtype=torch.int64).expand(batch, -1)
        return slots, torch.full((batch,), point.num_selected_experts, device=device)

    def _operating_points(
        self, images: Tensor, slots: Tensor | None, num_selected: Tensor | None, max_selected: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """Checks and fills in what the caller left out; one row per routing group."""
        config, batch = self.config, images.shape[0]
        assert config.moe is not None
        assert config.operating_point is not None
        if batch % config.moe.group_images:
            raise ValueError(f"the batch of {batch} is not a multiple of group_images = {config.moe.group_images}")
        if (slots is None) != (num_selected is None):
            raise ValueError("slots and num_selected_experts must be given together or left out together")
        if slots is None or num_selected is None:
            slots, num_selected = self.operating_point_tensors(config.operating_point, batch)
            max_selected = config.operating_point.num_selected_experts
        if slots.shape != (batch, len(config.moe.layers)) or num_selected.shape != (batch,):
            raise ValueError(
                f"slots must have shape {(batch, len(config.moe.layers))} and num_selected_experts {(batch,)}, "
                f"got {tuple(slots.shape)} and {tuple(num_selected.shape)}"
            )
        most, least = config.moe.most_selected_experts, 1
        if max_selected is None:
            max_selected, least = int(num_selected.max()), int(num_selected.min())
        if not 1 <= least <= max_selected <= most:
            seen = max_selected if least >= 1 else least
            raise ValueError(f"num_selected_experts must be 1 to {most}, got {seen}")
        stride = config.moe.group_images
        return slots[::stride], num_selected[::stride], max_selected


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value; all (B, heads, S, head_dim)."""
    if query.is_cpu and query.dtype == torch.bfloat16:
        # torch 2.13's fused kernel takes 7 times as long (64 against 9 ms forward and backward at (128, 6, 50, 24)).
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)
    return functional.scaled_dot_product_attention(query, key, value)


def sincos2d(grid: tuple[int, int], size: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed positions of the patches, [sin x, cos x, sin y, cos y] with x the column: (1, rows * columns, size).

    Frequencies are temperature ** -(i / (size/4 - 1)), as in the reference. Made in float64 on the CPU: tables of
    different devices must agree, and a model built on the meta device to take a checkpoint's weights needs this one.
    """
    rows, columns, quarter = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (*grid, size // 4))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    frequency = temperature ** -(quarter / max(size // 4 - 1, 1))
    angle_x, angle_y = x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency
    return torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], dim=1)[None].float()


def _head_norm(config: ModelConfig) -> nn.Module:
    """Scale-only LayerNorm over a head's axis with qk-norm, nothing without."""
    if not config.qk_norm:
        return nn.Identity()
    return nn.LayerNorm(config.hidden_size // config.num_heads, LAYER_NORM_EPSILON, bias=False)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Dense layer with fan-in truncated-normal weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(inputs))
    nn.init.zeros_(layer.bias)
    return layer


def _statistics(layers: list[MoeOutput], num_selected: Tensor, batch: int) -> RoutingStatistics:
    kept, load, processed = [], [], []
    for layer in layers:
        assignment = layer.assignment
        num_experts = layer.gates.shape[-1]
        keep = assignment.kept.reshape(batch, -1, assignment.kept.shape[-1])  # (B, S, K)
        expert = functional.one_hot(assignment.expert_index, num_experts).reshape(*keep.shape, num_experts)
        per_image_selected = num_selected.repeat_interleave(batch // num_selected.shape[0])
        kept.append(keep.sum((1, 2)) / (per_image_selected * keep.shape[1]))
        load.append((expert * keep[..., None]).sum((1, 2)))
        processed.append(keep.sum(2))
    return RoutingStatistics(torch.stack(kept, 1), torch.stack(load, 1), torch.stack(processed, 1), tuple(layers))
