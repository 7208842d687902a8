"""The sparse MLP: router, dispatch to experts, combine. Computes the kept (token, expert) pairs and nothing else.

Axes: B images, S tokens per image, D hidden, F expert hidden, E experts, K choices, G routing groups of
`group_images` images each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmoe.config import GeluApproximation, MoeConfig
from vmoe.parallel import WHOLE, Shard
from vmoe.routing import (
    Assignment,
    assign_experts_per_item,
    assign_items_per_expert,
    importance_loss,
    load_loss,
)

# Rows of every expert are padded to a multiple of this. oneDNN compiles a kernel per shape: with ragged row counts the
# compilation took longer than the bfloat16 product itself (1.0 against 0.3 ms, EPYC with AVX-512, torch 2.13).
ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class MoeOutput:
    """Attributes:
    hidden: (B, S, D), the sum of gate * expert output over the kept choices; 0 for a token that nobody served.
    assignment: what the router did, by routing group.
    gates: (G, S, E) softmax without noise.
    auxiliary_loss: scalar, weighted importance and load losses; 0 outside training.
    """

    hidden: Tensor
    assignment: Assignment
    gates: Tensor
    auxiliary_loss: Tensor


class Router(nn.Module):
    """Linear gate without bias over the tokens of a group. Always in float32: ranks decide who is dropped."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., E) logits."""
        with torch.autocast(tokens.device.type, enabled=False):
            return functional.linear(tokens.float(), self.weight.float())


class Experts(nn.Module):
    """E independent two-layer MLPs, stacked on the first axis as in the reference."""

    def __init__(
        self, num_experts: int, hidden_size: int, mlp_dim: int, gelu_approximation: GeluApproximation = "tanh"
    ) -> None:
        super().__init__()
        self.gelu_approximation = gelu_approximation
        self.weight_in = nn.Parameter(torch.empty(num_experts, hidden_size, mlp_dim))
        self.bias_in = nn.Parameter(torch.zeros(num_experts, mlp_dim))
        self.weight_out = nn.Parameter(torch.empty(num_experts, mlp_dim, hidden_size))
        self.bias_out = nn.Parameter(torch.zeros(num_experts, hidden_size))
        nn.init.trunc_normal_(self.weight_in, std=1 / math.sqrt(hidden_size))
        nn.init.trunc_normal_(self.weight_out, std=1 / math.sqrt(mlp_dim))

    def forward(self, tokens: Tensor, sizes: list[int]) -> Tensor:
        """(N, D), sorted by expert with `sizes[e]` rows for expert e -> (N, D)."""
        outputs = [
            torch.addmm(
                bias_out,
                functional.gelu(torch.addmm(bias_in, rows, w_in), approximate=self.gelu_approximation),
                w_out,
            )
            for rows, w_in, bias_in, w_out, bias_out in zip(
                torch.functional.split(tokens, sizes),
                self.weight_in,
                self.bias_in,
                self.weight_out,
                self.bias_out,
                strict=True,
            )
        ]
        return torch.cat(outputs)


class MoeMlp(nn.Module):
    """Replaces the MLP of a block. What does not fit into the buffers is skipped: the residual alone goes on.

    Attributes:
        rows_multiple: to which the rows of an expert are padded; changes no result.
    """

    def __init__(
        self, config: MoeConfig, hidden_size: int, mlp_dim: int, gelu_approximation: GeluApproximation = "tanh"
    ) -> None:
        super().__init__()
        self.config = config
        self.rows_multiple = ROWS_MULTIPLE
        self.router = Router(hidden_size, config.num_experts)
        self.experts = Experts(config.num_experts, hidden_size, mlp_dim, gelu_approximation)

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        num_selected_experts: Tensor,
        max_selected_experts: int,
        generator: torch.Generator | None = None,
        shard: Shard = WHOLE,
    ) -> MoeOutput:
        """Arguments:
        tokens: (B, S, D) after LayerNorm.
        slots: (G,) int64, slots per expert in each group.
        num_selected_experts: (G,) int64.
        max_selected_experts: an upper bound of `num_selected_experts`, known without looking at the device.
        generator: source of the router noise in training mode; None takes torch's global one.
        shard: in training, which part of the batch these tokens are; the noise of the whole is drawn.
        """
        batch, tokens_per_image, hidden_size = tokens.shape
        grouped = tokens.reshape(batch // self.config.group_images, -1, hidden_size)
        logits = self.router(grouped)
        gates = logits.softmax(dim=-1)
        routed_gates, auxiliary_loss = gates, logits.new_zeros(())
        if self.training:
            std = self.config.noise_std / self.config.num_experts
            total = len(logits) * shard.count
            noise = torch.randn((total, *logits.shape[1:]), generator=generator, device=logits.device) * std
            noise = noise[shard.rows(total).to(noise.device)]
            routed_gates = (logits + noise).softmax(dim=-1)
            auxiliary_loss = self._auxiliary_loss(logits, logits + noise, std, shard)
        if self.config.router == "items_per_expert":
            assignment = assign_items_per_expert(routed_gates, slots)
        else:
            assignment = assign_experts_per_item(
                routed_gates,
                num_selected_experts,
                slots,
                max_selected_experts=max_selected_experts,
                routing=self.config.routing,
                normalize_weights=self.config.normalize_weights,
            )
        hidden = self._serve(grouped.reshape(-1, hidden_size), assignment)
        return MoeOutput(hidden.view(batch, tokens_per_image, hidden_size), assignment, gates, auxiliary_loss)

    def _auxiliary_loss(self, logits: Tensor, noisy_logits: Tensor, std: float, shard: Shard) -> Tensor:
        """Weighted importance and load losses; none where experts choose, whose load is even by construction."""
        config = self.config
        if config.router == "items_per_expert":
            return logits.new_zeros(())
        loss = config.importance_loss_weight * importance_loss(logits.softmax(dim=-1), shard)
        if std > 0:
            load = load_loss(logits, noisy_logits, std, config.num_selected_experts, shard)
            loss = loss + config.load_loss_weight * load
        return loss

    def _serve(self, tokens: Tensor, assignment: Assignment) -> Tensor:
        """(N, D) -> (N, D). One gather, E small MLPs, one write per pair and a sum over K in a fixed order."""
        num_choices = assignment.kept.shape[-1]
        pair = assignment.kept.reshape(-1).nonzero()[:, 0]  # (P,) index of (token, choice)
        expert = assignment.expert_index.reshape(-1)[pair]
        by_expert = expert.argsort(stable=True)
        pair, expert = pair[by_expert], expert[by_expert]
        sizes = torch.bincount(expert, minlength=self.config.num_experts)
        padded = (sizes + self.rows_multiple - 1) // self.rows_multiple * self.rows_multiple
        # Row of each pair among the padded rows: its place in the sorted list plus the padding of the experts before.
        row = (
            torch.arange(len(pair), device=pair.device) + (padded.cumsum(0) - padded - sizes.cumsum(0) + sizes)[expert]
        )
        padded_sizes = padded.tolist()
        source = row.new_zeros(sum(padded_sizes)).index_copy(0, row, pair // num_choices)  # padding reads token 0
        served = self.experts(tokens[source], padded_sizes)[row]
        weighted = served * assignment.weights.reshape(-1)[pair, None].to(served.dtype)
        # Pairs are unique, so the write cannot race, and the sum over K is the same on every run and device.
        per_choice = weighted.new_zeros(tokens.shape[0] * num_choices, tokens.shape[1]).index_copy(0, pair, weighted)
        total: Tensor = per_choice.view(tokens.shape[0], num_choices, -1).sum(1)
        return total
