"""Parameters and floating-point operations of a configuration, without allocating a weight.

The model is built on torch's meta device and run under torch's own `FlopCounterMode`, which counts matrix products (two
operations per multiply-accumulate) and nothing else. How many rows an expert gets depends on the image; here every
expert fills its slots, unless all slots together are more than the assignments: an upper bound of what an image costs.

Axes: E experts, S tokens of an image, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from vmoe.config import ModelConfig
from vmoe.model import VisionTransformer
from vmoe.moe import MoeMlp
from vmoe.operating_point import OperatingPoint


class _FilledMoe(nn.Module):
    """A `MoeMlp` with the number of rows made explicit: its own depends on values, and meta has none.

    All rows go through the first expert: operations are linear in rows, and thousands of small products took minutes.
    """

    def __init__(self, moe: MoeMlp, rows: int) -> None:
        super().__init__()
        self.router, self.experts, self.rows = moe.router, moe.experts, rows

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D), of which only the shapes mean something."""
        functional.linear(tokens, self.router.weight)  # without the router's autocast, which knows no meta device
        rows = tokens.new_empty(self.rows, tokens.shape[-1])
        rows @ self.experts.weight_in[0] @ self.experts.weight_out[0]
        return torch.empty_like(tokens)


def count_parameters(config: ModelConfig) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in _on_meta(config).parameters())


def flops_per_image(config: ModelConfig, point: OperatingPoint | None = None) -> int:
    """Operations of one forward pass over one image.

    Arguments:
        point: of a sparse model; None takes the one it is configured with.

    Raises:
        ValueError: the model has no such operating point.
    """
    model = _on_meta(config)
    images = 1
    if config.moe is not None:
        point = point or config.operating_point
        assert point is not None
        images = config.moe.group_images
        choices = config.moe.choices_per_token(point.num_selected_experts)
        assignments = config.tokens_per_image * images * choices
        for layer, slots in zip(config.moe.layers, config.slots(point), strict=True):
            block = model.blocks[layer]
            assert isinstance(block.mlp, MoeMlp)
            block.mlp = _FilledMoe(block.mlp, min(slots * config.moe.num_experts, assignments))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(images, *config.image_size, config.channels, device="meta"))
    return int(counter.get_total_flops()) // images


def _on_meta(config: ModelConfig) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(config).to("meta").eval()  # `sincos2d` is made on the CPU wherever it is asked for
