"""Operating point and slot arithmetic: the one place where C and K become a number of slots. Torch-free.

An operating point is the pair (capacity factor C, selected experts K). It buys every expert

    slots = ceil(S * K * C / E)                                   (paper, section 2.2, eq. 2)

buffer slots per routing group of S tokens. The product is taken first and divided last, in double precision, as the
reference does: 400 tokens, K = 1, C = 1.1, E = 8 gives 56 although 400 * 1.1 / 8 is 55 on paper, and float32 arithmetic
gives other answers still (200 * 0.3 / 4: 16 instead of 15). This is why slots never get computed inside a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Rounding = Literal["ceil", "round"]


@dataclass(frozen=True)
class OperatingPoint:
    """How much expert compute an image gets.

    Attributes:
        capacity_factor: C, the ratio of buffer slots to assignments; finite and above 0.
        num_selected_experts: K, experts per token; at least 1.
    """

    capacity_factor: float
    num_selected_experts: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.capacity_factor) and self.capacity_factor > 0):
            raise ValueError(f"capacity_factor must be a finite number above 0, got {self.capacity_factor}")
        if self.num_selected_experts < 1:
            raise ValueError(f"num_selected_experts must be at least 1, got {self.num_selected_experts}")

    def __str__(self) -> str:
        return f"({self.capacity_factor:g}, {self.num_selected_experts})"


def parse_point(text: str) -> OperatingPoint:
    """An operating point from `C,K` as command lines take it.

    Raises:
        ValueError: names the text and the form expected.
    """
    try:
        capacity_factor, num_selected_experts = text.split(",")
        return OperatingPoint(float(capacity_factor), int(num_selected_experts))
    except ValueError as error:
        raise ValueError(f"{text!r} is not an operating point, expected C,K such as 0.25,1 ({error})") from error


def slots_per_expert(
    num_assignments: int,
    num_experts: int,
    capacity_factor: float,
    *,
    rounding: Rounding = "ceil",
    multiple: int = 1,
) -> int:
    """Buffer slots of each expert in one routing group.

    Arguments:
        num_assignments: S * K, tokens in the group times selected experts (S alone for expert-choice routing).
        num_experts: E.
        capacity_factor: C.
        rounding: `ceil`, or `round` (half to even, as Python does).
        multiple: the result is rounded up to a multiple of this. The reference uses 4; we default to 1, because with
            groups of one image a multiple of 4 merges neighbouring operating points.

    Raises:
        ValueError: the arithmetic leaves no slot. The reference refuses this too, it can only happen with `round`.
    """
    if num_assignments < 1 or num_experts < 1 or multiple < 1:
        raise ValueError(
            "num_assignments, num_experts and multiple must be at least 1, "
            f"got {num_assignments}, {num_experts} and {multiple}"
        )
    exact = num_assignments * capacity_factor / num_experts
    slots = math.ceil(exact) if rounding == "ceil" else round(exact)
    slots += -slots % multiple
    if slots < 1:
        raise ValueError(
            f"{num_assignments} assignments, capacity factor {capacity_factor} and {num_experts} experts leave {slots} "
            "slots per expert; at least 1 is needed: raise the capacity factor or use rounding='ceil'"
        )
    return slots
