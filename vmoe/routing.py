"""Routing: from gates to (expert, slot) assignments, and the losses that balance the load. No parameters.

Axes: G routing groups, S tokens per group, E experts, K choices per token.

Source: paper, section 2 (router, capacity) and section 4 (Batch Priority Routing, algorithm 2); appendix A for the
losses. The order of the queue of every expert is: all first choices before all second choices, and within a choice the
token's position (vanilla) or its top-1 gate, descending, ties by position (BPR). A pair that does not fit still
consumes its queue position. Gates are a softmax over all E experts and, as in the paper, not renormalised after
the top K unless a configuration asks for it.

Expert choice (Zhou et al., 2022, arXiv 2202.09368) turns the choice around: every expert takes its best tokens. The
same `Assignment` describes it, with K = E and choice e of every token standing for expert e.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.config import Routing
from vmoe.parallel import WHOLE, Shard


@dataclass(frozen=True)
class Assignment:
    """Which expert and which slot every (token, choice) pair gets.

    Attributes:
        expert_index: (G, S, K) int64, experts of a token, best first.
        buffer_index: (G, S, K) int64, position in the queue of that expert.
        weights: (G, S, K), combine weight of each choice.
        kept: (G, S, K) bool, the pair has a slot and its choice is among the group's own K.
    """

    expert_index: Tensor
    buffer_index: Tensor
    weights: Tensor
    kept: Tensor


def assign_experts_per_item(
    gates: Tensor,
    num_selected_experts: Tensor,
    slots: Tensor,
    *,
    max_selected_experts: int,
    routing: Routing,
    normalize_weights: bool = False,
) -> Assignment:
    """Every token chooses its K best experts; every expert serves its queue until the slots are used up.

    Arguments:
        gates: (G, S, E) softmax over experts.
        num_selected_experts: (G,) int64, the K of each group, at most `max_selected_experts`.
        slots: (G,) int64, slots per expert in each group; 0 skips the layer.
        max_selected_experts: size K of the result's last axis.
        routing: queue order.
        normalize_weights: the weights of a token's own K choices sum to 1.
    """
    num_experts = gates.shape[-1]
    # Stable sort and not topk: torch.topk promises no order among ties, the reference takes the lower index.
    weights, expert_index = gates.sort(dim=-1, descending=True, stable=True)
    weights, expert_index = weights[..., :max_selected_experts], expert_index[..., :max_selected_experts]
    chosen = torch.arange(max_selected_experts, device=gates.device) < num_selected_experts[:, None]  # (G, K)

    if routing == "bpr":
        order = weights[..., 0].argsort(dim=-1, descending=True, stable=True)  # (G, S): token at each rank
        ranked = expert_index.gather(1, order[..., None].expand_as(expert_index))
    else:
        ranked = expert_index
    # Queue: choice-major, then rank. A choice beyond the group's own K enters no queue.
    queue = torch.nn.functional.one_hot(ranked.transpose(1, 2), num_experts) * chosen[:, :, None, None]  # (G, K, S, E)
    position = queue.flatten(1, 2).cumsum(dim=1).view_as(queue) - 1
    buffer_index = position.gather(-1, ranked.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)  # (G, S, K) by rank
    if routing == "bpr":
        buffer_index = torch.empty_like(buffer_index).scatter(1, order[..., None].expand_as(buffer_index), buffer_index)
    kept = (buffer_index < slots[:, None, None]) & chosen[:, None, :]
    if normalize_weights:
        weights = weights / (weights * chosen[:, None, :]).sum(-1, keepdim=True)
    return Assignment(expert_index, buffer_index, weights, kept)


def assign_items_per_expert(gates: Tensor, slots: Tensor) -> Assignment:
    """Every expert takes its best tokens until its slots are used up; ties go to the earlier token.

    Arguments:
        gates: (G, S, E) softmax over experts.
        slots: (G,) int64, slots per expert in each group; 0 skips the layer.

    Returns:
        An assignment with E choices per token: choice e is expert e, `buffer_index` the token's rank in its order.
    """
    order = gates.argsort(dim=1, descending=True, stable=True)  # (G, S, E): token at each rank of an expert
    rank = torch.arange(gates.shape[1], device=gates.device)[None, :, None].expand_as(order)
    buffer_index = torch.empty_like(order).scatter(1, order, rank)
    expert_index = torch.arange(gates.shape[2], device=gates.device).expand_as(order)
    return Assignment(expert_index, buffer_index, gates, buffer_index < slots[:, None, None])


def importance_loss(gates: Tensor, shard: Shard = WHOLE) -> Tensor:
    """Squared coefficient of variation of the experts' total gate (paper, appendix A.1).

    Arguments:
        gates: (..., E) softmax without noise. All leading axes are summed: the loss balances the batch, not each group,
            since groups of one image need not be balanced.
        shard: the process's part of the batch.
    """
    importance = shard.sum(gates.flatten(0, -2).sum(0))
    return _squared_variation(importance)


def load_loss(
    logits: Tensor, noisy_logits: Tensor, noise_std: float, num_selected_experts: int, shard: Shard = WHOLE
) -> Tensor:
    """Squared coefficient of variation of the experts' chance to be chosen under fresh noise (paper, appendix A.2).

    Arguments:
        logits, noisy_logits: (..., E) before and after noise.
        noise_std: standard deviation of the noise that was added.
        num_selected_experts: K; the threshold to beat is the K-th largest noisy logit.
        shard: the process's part of the batch.
    """
    threshold = noisy_logits.topk(num_selected_experts, dim=-1).values[..., -1:]
    probability = 1 - torch.special.ndtr((threshold - logits) / noise_std)
    return _squared_variation(shard.sum(probability.flatten(0, -2).mean(0)))  # the same for a mean and its multiples


def _squared_variation(per_expert: Tensor) -> Tensor:
    return per_expert.var(unbiased=False) / per_expert.mean().square()
