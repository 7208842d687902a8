"""One image on its way through the engine: `Work` goes in beside the scheduler's request, `Inference` comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.decision import ServeReason
from server.ladder import Rung


@dataclass(frozen=True, eq=False)
class Work:
    """One image to infer. H, W and c of the model's input.

    Attributes:
        image: (H, W, c) uint8.
        explain: also say which expert processed which token.
        pinned: the point that the client chose, on the ladder or off it; None leaves the choice to the scheduler.
    """

    image: npt.NDArray[np.uint8]
    explain: bool
    pinned: Rung | None = None


@dataclass(frozen=True, eq=False)
class Inference:
    """What the model says about one image. C classes, L MoE layers, S tokens, K choices.

    Attributes:
        classes: (C,) int64, the most probable first.
        probabilities: (C,) float64, in that order.
        kept: (L,), share of the K * S assignments that were processed.
        token_experts: (L, S, K) int64, expert that processed the token as its k-th choice, or -1; None if not asked.
        rung: where it was processed.
        reason: why there and not better.
        degraded: below the best point that the request allowed.
        deadline_met: the batch was done in time.
        queue_s, inference_s: time in the queue, and of the batch in the backend.
    """

    classes: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    kept: Sequence[float]
    token_experts: npt.NDArray[np.int64] | None
    rung: Rung
    reason: ServeReason
    degraded: bool
    deadline_met: bool
    queue_s: float
    inference_s: float
