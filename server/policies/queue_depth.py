"""One rung down when the queue is long, one rung up when it is short: thresholds with hysteresis.

The rule that most serving systems offer. Between the thresholds nothing changes, and after a change nothing changes for
`dwell_s`, which keeps the level from oscillating.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from server.policies.base import Proposal, Stateless, View


class QueueDepthConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    high_batches: float = Field(default=0.5, gt=0, description="full batches waiting above which a rung is given up")
    low_batches: float = Field(default=0.125, ge=0, description="full batches waiting below which a rung is regained")
    dwell_s: float = Field(default=0.05, ge=0, description="least time between two changes")


class QueueDepth(Stateless):
    name = "queue-depth"

    def __init__(self, config: QueueDepthConfig) -> None:
        self._config = config
        self._below = 0  # rungs below the full one
        self._changed_s = float("-inf")

    def decide(self, view: View) -> Proposal:
        config, frontier = self._config, view.ladder.frontier
        if view.now - self._changed_s >= config.dwell_s:
            depth = len(view.deadlines) / view.max_batch_size
            step = (depth > config.high_batches) - (depth < config.low_batches)
            below = min(max(self._below + step, 0), len(frontier) - 1)
            if below != self._below:
                self._below, self._changed_s = below, view.now
        size = min(len(view.deadlines), view.max_batch_size)
        return Proposal([frontier[len(frontier) - 1 - self._below]] * size)
