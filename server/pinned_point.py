"""A point that a client spelled out, checked against the model. It need not be one of the manifest's."""

from __future__ import annotations

from dataclasses import replace

from exporter.bundle import Manifest
from server.errors import InvalidParameter
from server.ladder import Ladder, Rung
from vmoe.operating_point import OperatingPoint


def pin(manifest: Manifest, ladder: Ladder, capacity_factor: float, num_selected_experts: int) -> tuple[Rung, int]:
    """The point as a rung, and the index of the rung of the ladder that it is charged as.

    Raises:
        InvalidParameter: out of the range that this model accepts; the message gives the range.
    """
    moe, max_experts = manifest.architecture.moe, manifest.max_selected_experts
    if moe is None:
        raise InvalidParameter(
            f"model {manifest.name!r} is dense and has no operating points; "
            "leave out capacity_factor and num_selected_experts"
        )
    if not 1 <= num_selected_experts <= max_experts:
        raise InvalidParameter(f"num_selected_experts must be between 1 and {max_experts}, got {num_selected_experts}")
    # At C = E / K every expert has a slot for every token. More would buy nothing, and the graph has no such slots.
    max_factor = moe.num_experts / num_selected_experts
    if not 0 < capacity_factor <= max_factor:
        raise InvalidParameter(
            f"capacity_factor must be above 0 and at most {max_factor:g} with num_selected_experts = "
            f"{num_selected_experts}, got {capacity_factor:g}"
        )
    point = OperatingPoint(capacity_factor, num_selected_experts)
    try:
        slots = manifest.architecture.slots(point)
    except ValueError as error:
        raise InvalidParameter(f"capacity_factor {capacity_factor:g} is too small: {error}") from error
    index = ladder.find(num_selected_experts, slots)
    if index is not None:  # C may differ from the manifest's: equal slots are the same point
        return replace(ladder.rungs[index], point=point), index
    charged = ladder.charge(slots)
    return Rung(point, slots, None, ladder.values[charged], None), charged
