"""The operating points of a model as the scheduler sees them: rungs in ascending order of cost.

Scheduler and policies compare and choose rungs by index; what a rung means to a graph is known here alone. A dense
model has one rung without an operating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from exporter.bundle import Manifest, Point
from vmoe.operating_point import OperatingPoint

# Value of a rung without a measured accuracy, per unit of relative compute below the full point. Chosen, not tuned: as
# small as the differences that BPR models show, so that an answer at any rung is worth far more than no answer.
UNMEASURED_SLOPE = 0.02


@dataclass(frozen=True)
class Rung:
    """An operating point of the manifest.

    Attributes:
        point: C and K; None for a dense model.
        slots: slots per expert of each MoE layer, (L,).
        accuracy: measured top-1, None where the bundle was exported without images.
        value: what an answer at this rung is worth to a policy: the accuracy, or a stand-in where it is unknown.
        measured: the manifest's entry; None for a dense model.
        model: name of the bundle that runs it, "" for the one that is served by name.
    """

    point: OperatingPoint | None
    slots: tuple[int, ...]
    accuracy: float | None
    value: float
    measured: Point | None
    model: str = ""

    @property
    def num_selected_experts(self) -> int:
        return 0 if self.point is None else self.point.num_selected_experts

    @cached_property
    def name(self) -> str:
        """Of a measured point: C, K, and the bundle where that is not the served one."""
        return f"{self.point} {self.model}".rstrip()

    @property
    def num_slots(self) -> int:
        """All slots of one image: what an off-ladder point is compared by."""
        return sum(self.slots)


class Ladder:
    """Rungs from the cheapest to the full point.

    Attributes:
        rungs: every point of the manifest, dominated ones included: a budget may name them.
        frontier: ascending indices of the rungs that are not dominated; policies choose among them.
    """

    def __init__(self, rungs: Sequence[Rung], frontier: Sequence[int]) -> None:
        self.rungs, self.frontier = tuple(rungs), tuple(frontier)
        # What is asked for by C and K is the served bundle's.
        self._index = {
            (rung.num_selected_experts, rung.slots): index for index, rung in enumerate(self.rungs) if not rung.model
        }
        self.values = tuple(rung.value for rung in self.rungs)

    def __len__(self) -> int:
        return len(self.rungs)

    @property
    def full(self) -> int:
        return len(self.rungs) - 1

    @classmethod
    def of(cls, manifest: Manifest, models: Sequence[str] = ()) -> Ladder:
        """The ladder of a bundle, or of several, see `server.combine`; `models` then names the bundle of each point."""
        if not manifest.points:
            return cls([Rung(None, (), None, 1.0, None)], [0])
        rungs = []
        for point, model in zip(manifest.points, models or [""] * len(manifest.points), strict=True):
            value = point.accuracy
            if value is None:
                value = 1.0 - UNMEASURED_SLOPE * (1.0 - point.relative_compute)
            rungs.append(Rung(point.operating_point, point.slots, point.accuracy, value, point, model))
        frontier = [index for index, point in enumerate(manifest.points) if not point.dominated]
        return cls(rungs, frontier)

    def find(self, num_selected_experts: int, slots: tuple[int, ...]) -> int | None:
        """The served bundle's rung with exactly this K and these slots."""
        return self._index.get((num_selected_experts, slots))

    def charge(self, slots: tuple[int, ...]) -> int:
        """The rung whose cost stands for a point that is off the ladder: the cheapest with as many slots.

        A point above the full one is charged as the full one; the online latency model learns the difference.
        """
        wanted = sum(slots)
        enough = (index for index, rung in enumerate(self.rungs) if rung.num_slots >= wanted and not rung.model)
        return next(enough, self.full)
