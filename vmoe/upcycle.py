"""Sparse upcycling (Komatsuzaki et al., 2023, arXiv 2212.05055): a V-MoE that starts from a trained dense ViT.

Every expert is a copy of the dense MLP that it replaces, and the router starts small and random. As long as the combine
weights of a token sum to 1 and no choice is dropped, the new model answers as the dense one does:

    weights                 sum to 1 at    otherwise
    softmax over E experts  K = E          K of E near-equal gates sum to about K / E: the MLP adds that share
    normalised over K       every K        only dropped tokens differ: the residual alone goes on

The paper normalises for vision models, and so does `upcycle` unless told otherwise (`MoeConfig.normalize_weights`).

Axes: E experts, D hidden, F MLP width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vmoe.checkpoint import Checkpoint
from vmoe.config import ConfigError, MoeConfig, every_layers, last_layers
from vmoe.errors import CheckpointError

ROUTER_STD = 0.02  # chosen, not tuned: small enough that all experts start with nearly equal gates


def upcycle(checkpoint: Checkpoint, moe: MoeConfig, *, router_std: float = ROUTER_STD, seed: int = 0) -> Checkpoint:
    """A sparse checkpoint from a dense one.

    Arguments:
        moe: which blocks get experts, and how many.
        router_std: standard deviation of the router's weights.

    Raises:
        CheckpointError: the checkpoint is sparse already.
        ConfigError: `moe` does not fit the model.
    """
    if checkpoint.config.moe is not None:
        raise CheckpointError(
            f"upcycling starts from a dense model, this one has experts in blocks {list(checkpoint.config.moe.layers)}"
        )
    config = replace(checkpoint.config, moe=moe)
    state = dict(checkpoint.state)
    generator = torch.Generator().manual_seed(seed)
    for layer in moe.layers:
        mlp = f"blocks.{layer}.mlp"
        for side in ("in", "out"):
            weight = state.pop(f"{mlp}.linear_{side}.weight").T  # torch keeps (out, in), the experts (in, out)
            bias = state.pop(f"{mlp}.linear_{side}.bias")
            state[f"{mlp}.experts.weight_{side}"] = weight.expand(moe.num_experts, -1, -1).contiguous()
            state[f"{mlp}.experts.bias_{side}"] = bias.expand(moe.num_experts, -1).contiguous()
        router = torch.randn(moe.num_experts, config.hidden_size, generator=generator)
        state[f"{mlp}.router.weight"] = router * router_std
    return replace(checkpoint, config=config, state=state)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Blocks that get experts, from `last-N`, `every-N` or numbers such as `1,3`.

    Raises:
        ConfigError: names the text and the forms expected.
    """
    try:
        kind, dash, count = text.partition("-")
        if dash and kind in ("last", "every"):
            return (last_layers if kind == "last" else every_layers)(num_layers, int(count))
        return tuple(int(number) for number in text.split(","))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{text!r} names no blocks, expected last-2, every-2 or numbers such as 1,3") from error
