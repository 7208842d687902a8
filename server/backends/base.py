"""What the engine needs from a runtime: one batch in, its outputs back.

Shapes, as in `exporter.bundle`: B images of H x W x c, L MoE layers, E experts, S tokens per image, K choices. A dense
model has L = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that run together, each at its own operating point.

    Attributes:
        images: (B, H, W, c) uint8.
        slots: (B, L) int64.
        num_selected_experts: (B, 1) int64.
        explain: whether anyone needs `token_experts`.
    """

    images: npt.NDArray[np.uint8]
    slots: npt.NDArray[np.int64]
    num_selected_experts: npt.NDArray[np.int64]
    explain: bool


@dataclass(frozen=True, eq=False)
class Outputs:
    """Row i belongs to image i of the batch.

    Attributes:
        logits: (B, num_classes) float32.
        kept: (B, L) float32.
        expert_load: (B, L, E) int64.
        token_experts: (B, L, S, K) int64, None unless the batch asked for it.
    """

    logits: npt.NDArray[np.float32]
    kept: npt.NDArray[np.float32]
    expert_load: npt.NDArray[np.int64]
    token_experts: npt.NDArray[np.int64] | None


class Backend(Protocol):
    """A runtime that holds one model. Never blocks the event loop; any exception fails the batch and nothing else.

    Attributes:
        num_workers: batches that it runs at once.
    """

    @property
    def num_workers(self) -> int: ...

    async def infer(self, batch: Batch) -> Outputs: ...

    def close(self) -> None:
        """Frees threads and connections; no `infer` is under way."""
