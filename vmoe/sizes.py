"""The paper's named sizes: parameters and operations per image of every backbone, dense and sparse.

`REPORTED_MILLIONS` are the parameter counts that the paper's appendix is said to give; we have them from a secondary
source and did not see the table itself. What explains them is a head of 18,291 classes, the labels of JFT-300M, behind
a `pre_logits` layer as wide as the model, and for the 15B model one of 29,593 classes without that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmoe.config import VARIANTS, ModelConfig, MoeConfig, every_layers, last_layers
from vmoe.flops import count_parameters, flops_per_image
from vmoe.operating_point import OperatingPoint

JFT_300M_CLASSES = 18_291
# Found by solving for the number of classes, which comes out as 29,593 +- 35; JFT-3B has 'around 30k labels'
# (2106.04560).
LARGEST_CLASSES = 29_593
BACKBONES = {
    "S/32": "s32",
    "S/16": "s16",
    "B/32": "b32",
    "B/16": "b16",
    "L/32": "l32",
    "L/16": "l16",
    "H/14": "h14",
}
LARGEST = "15B"
ALL_NAMES = (*BACKBONES, LARGEST)
FULL, CHEAP = OperatingPoint(1.05, 2), OperatingPoint(0.25, 1)  # the ends of what serving uses
# Millions of parameters by name and placement, for 32 experts.
REPORTED_MILLIONS = {
    ("S/32", "dense"): 36.5,
    ("B/32", "dense"): 102.1,
    ("B/16", "dense"): 100.5,
    ("L/32", "dense"): 325.3,
    ("L/16", "dense"): 323.1,
    ("H/14", "dense"): 655.8,
    ("S/32", "every 2"): 296.9,
    ("B/32", "every 2"): 980.6,
    ("B/16", "every 2"): 979.0,
    ("L/16", "every 2"): 3446.0,
    # Came to us as L/16; it is what L/32 has to the last digit, and no head explains it for L/16 (843.6).
    ("L/32", "last 2"): 845.8,
    ("H/14", "every 2"): 7160.8,
    ("H/14", "last 5"): 2688.6,
    (LARGEST, "every 2"): 14705.1,
}
REPORTED_EXPERTS = 32


@dataclass(frozen=True)
class Size:
    """One row of the table.

    Attributes:
        placement: `dense`, `last n` or `every n`.
        moe_layers: number of sparse blocks.
        flops_full, flops_cheap: per image at (1.05, 2) and (0.25, 1), two per multiply-accumulate; equal when dense.
        reported_millions: of parameters, where we know a reported value.
    """

    name: str
    placement: str
    moe_layers: int
    parameters: int
    flops_full: int
    flops_cheap: int
    reported_millions: float | None


def named_sizes(names: Sequence[str], last: Sequence[int], every: Sequence[int], num_experts: int) -> list[Size]:
    """Each backbone dense and with every placement that it has blocks for; the 15B model as it is.

    Raises:
        ValueError: an unknown name, or a placement that no model can have.
    """
    if unknown := [name for name in names if name not in ALL_NAMES]:
        raise ValueError(f"unknown model {unknown[0]!r}; known are {', '.join(ALL_NAMES)}")
    sizes = []
    for name in names:
        if name == LARGEST:
            largest = replace(VARIANTS["vmoe_15b"], num_classes=LARGEST_CLASSES)
            sizes.append(_size(name, "every 2", largest, REPORTED_EXPERTS))
            continue
        dense = with_jft_head(VARIANTS[BACKBONES[name]])
        sizes.append(_size(name, "dense", dense, num_experts))
        placements = [(f"last {n}", last_layers(dense.num_layers, n)) for n in last if n <= dense.num_layers // 2]
        placements += [(f"every {n}", every_layers(dense.num_layers, n)) for n in every]
        for placement, layers in placements:
            sizes.append(_size(name, placement, replace(dense, moe=MoeConfig(num_experts, layers)), num_experts))
    return sizes


def with_jft_head(config: ModelConfig) -> ModelConfig:
    """The model as it was pre-trained on JFT-300M."""
    return replace(config, num_classes=JFT_300M_CLASSES, representation_size=config.hidden_size)


def markdown(sizes: Sequence[Size]) -> str:
    """A table for docs: parameters in millions, operations in units of 10^9."""
    lines = [
        "| model | MoE layers | placement | parameters (M) | reported (M) | GFLOPs, (1.05, 2) | GFLOPs, (0.25, 1) |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        reported = "" if size.reported_millions is None else f"{size.reported_millions:.1f}"
        lines.append(
            f"| {size.name} | {size.moe_layers or ''} | {size.placement} | {size.parameters / 1e6:.1f} | {reported} "
            f"| {size.flops_full / 1e9:.1f} | {size.flops_cheap / 1e9:.1f} |"
        )
    return "\n".join(lines)


def _size(name: str, placement: str, config: ModelConfig, num_experts: int) -> Size:
    full = flops_per_image(config, FULL)
    moe_layers = 0 if config.moe is None else len(config.moe.layers)
    comparable = not moe_layers or num_experts == REPORTED_EXPERTS
    return Size(
        name,
        placement,
        moe_layers,
        count_parameters(config),
        full,
        flops_per_image(config, CHEAP) if moe_layers else full,
        REPORTED_MILLIONS.get((name, placement)) if comparable else None,
    )
