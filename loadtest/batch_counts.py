"""What the gateway's own counters say of the batches of a live run: their difference over the run.

They count every batch meanwhile: those of the warm-up, and those of other clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

_SERIES: Final = (
    "vmoe_batch_size_count",
    "vmoe_batch_size_sum",
    "vmoe_decision_seconds_count",
    "vmoe_decision_seconds_sum",
)


@dataclass(frozen=True)
class BatchCounts:
    """Batches that ran, images in them, batches that were chosen, and the time that choosing took."""

    batches: int
    images: int
    decisions: int
    decision_s: float

    @classmethod
    def read(cls, metrics: str) -> Self | None:
        """From a page of /metrics; None where a series is missing."""
        found: dict[str, float] = {}
        for line in metrics.splitlines():
            name, _, value = line.partition(" ")
            if name in _SERIES:
                found[name] = float(value)
        if len(found) < len(_SERIES):
            return None
        batches, images, decisions, decision_s = (found[name] for name in _SERIES)
        return cls(int(batches), int(images), int(decisions), decision_s)

    def since(self, before: BatchCounts) -> BatchCounts | None:
        """Of the time between; None where the counters began anew: the gateway was started again."""
        if self.batches < before.batches or self.decisions < before.decisions:
            return None
        return BatchCounts(
            self.batches - before.batches,
            self.images - before.images,
            self.decisions - before.decisions,
            self.decision_s - before.decision_s,
        )
