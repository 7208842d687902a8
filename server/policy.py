"""The decision: at which operating point an image is processed. The only place where it is taken; pure.

A budget names a fixed point among those of the manifest that are not dominated: `low` is the cheapest, `max` the last,
`medium` and `high` lie closest to one and two thirds of the way between them in relative compute (chosen, not tuned:
even steps in cost). `auto` is `max` until a policy looks at the load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from exporter.bundle import Manifest, Point, frontier
from server.errors import InvalidParameter
from vmoe.operating_point import OperatingPoint

Budget = Literal["low", "medium", "high", "max", "auto"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)


@dataclass(frozen=True)
class Decision:
    """The operating point of one request.

    Attributes:
        point: C and K.
        slots: slots per expert of each MoE layer, (L,).
        measured: the manifest's point with the same K and slots, None where nothing was measured.
    """

    point: OperatingPoint
    slots: tuple[int, ...]
    measured: Point | None


class FixedPolicy:
    """One point per budget, and any point that a request spells out. A dense model has no points: always None."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.budgets: dict[Budget, Decision | None] = dict.fromkeys(BUDGETS)
        if points := frontier(manifest.points):
            cheapest, full = points[0].relative_compute, points[-1].relative_compute
            shares: dict[Budget, float] = {"low": 0, "medium": 1 / 3, "high": 2 / 3, "max": 1, "auto": 1}
            for budget, share in shares.items():
                target = cheapest + share * (full - cheapest)
                # Ties go to the more accurate point, which stands later.
                nearest = min(reversed(points), key=lambda point: abs(point.relative_compute - target))
                self.budgets[budget] = Decision(nearest.operating_point, nearest.slots, nearest)

    def for_budget(self, budget: Budget) -> Decision | None:
        """The fixed point of a budget."""
        return self.budgets[budget]

    def for_point(self, capacity_factor: float, num_selected_experts: int) -> Decision:
        """A point that the client chose.

        Raises:
            InvalidParameter: out of the range that this model accepts; the message gives the range.
        """
        moe, max_experts = self._manifest.architecture.moe, self._manifest.max_selected_experts
        if moe is None:
            raise InvalidParameter(
                f"model {self._manifest.name!r} is dense and has no operating points; "
                "leave out capacity_factor and num_selected_experts"
            )
        if not 1 <= num_selected_experts <= max_experts:
            raise InvalidParameter(
                f"num_selected_experts must be between 1 and {max_experts}, got {num_selected_experts}"
            )
        # At C = E / K every expert has a slot for every token. More would buy nothing, and the graph has no such slots.
        max_factor = moe.num_experts / num_selected_experts
        if not 0 < capacity_factor <= max_factor:
            raise InvalidParameter(
                f"capacity_factor must be above 0 and at most {max_factor:g} with num_selected_experts = "
                f"{num_selected_experts}, got {capacity_factor:g}"
            )
        point = OperatingPoint(capacity_factor, num_selected_experts)
        try:
            slots = self._manifest.architecture.slots(point)
        except ValueError as error:
            raise InvalidParameter(f"capacity_factor {capacity_factor:g} is too small: {error}") from error
        return Decision(point, slots, self._measured(num_selected_experts, slots))

    def _measured(self, num_selected_experts: int, slots: tuple[int, ...]) -> Point | None:
        same = (p for p in self._manifest.points if (p.num_selected_experts, p.slots) == (num_selected_experts, slots))
        return next(same, None)
