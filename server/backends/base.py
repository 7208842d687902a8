"""What the engine needs from a runtime: one batch in, its outputs back.

Shapes, as in `exporter.bundle`: B images of H x W x c, L MoE layers, E experts, S tokens per image, K choices. A dense
model has L = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

# An answer that is late by less is delivered, and counts as late; who waits longer hears 504. Chosen, not tuned.
GRACE_S: Final = 0.05


class BackendError(Exception):
    """A runtime that cannot serve this bundle, or not at all; the message says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that run together, each at its own operating point.

    Attributes:
        images: (B, H, W, c) uint8.
        slots: (B, L) int64.
        num_selected_experts: (B, 1) int64.
        explain: whether anyone needs `token_experts`.
        profiled_s: what it takes by the manifest's profile; only ratios to it matter.
        deadline_s: on the event loop's clock, after which nobody wants the answer.
        models: (B,) names as in `server.ladder`, of the bundle that runs each image; read where there are several.
    """

    images: npt.NDArray[np.uint8]
    slots: npt.NDArray[np.int64]
    num_selected_experts: npt.NDArray[np.int64]
    explain: bool
    profiled_s: float = 1.0
    deadline_s: float = math.inf
    models: tuple[str, ...] = ()


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
        num_workers: batches that it runs at once, as of now; 0 while it can run none.
        floors_only: images should run at the cheapest points that they allow, as of now.
        cancellable: whether cancelling `infer` frees the worker. Where not, the batch runs on.
    """

    @property
    def num_workers(self) -> int: ...

    @property
    def floors_only(self) -> bool: ...

    @property
    def cancellable(self) -> bool: ...

    async def start(self, changed: Callable[[], None]) -> None:
        """Connects; returns when `num_workers` is the truth, which may be 0. The first call.

        Arguments:
            changed: to be called, in the event loop, whenever `num_workers` or `floors_only` has changed between
                batches.
        """

    async def infer(self, batch: Batch) -> Outputs:
        """Runs a batch.

        Raises:
            GatewayError: what the images of the batch are to be answered with; any other is not for clients.
        """

    async def close(self) -> None:
        """Frees threads and connections; no `infer` is under way."""
