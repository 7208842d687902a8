"""Additive increase, multiplicative decrease of the level, as TCP and Clipper's batching do (Chiu and Jain 1989).

    every batch without a miss:    level <- min(1, level + increase * elapsed)
    a miss or a shed request:      level <- level * decrease, at most once per `dwell_s`

The level in [0, 1] picks the rung at that share of the ladder's frontier.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from server.policies.base import Proposal, View


class AimdConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    increase_per_s: float = Field(default=0.2, gt=0, description="level regained per second")
    decrease: float = Field(default=0.5, ge=0, lt=1, description="factor on the level after a miss or a shed request")
    dwell_s: float = Field(default=0.1, ge=0, description="least time between two decreases")


class Aimd:
    name = "aimd"
    degrades = True

    def __init__(self, config: AimdConfig) -> None:
        self._config = config
        self._level = 1.0
        self._decreased_s = float("-inf")
        self._finished_s: float | None = None

    def decide(self, view: View) -> Proposal:
        frontier = view.ladder.frontier
        rung = frontier[round(self._level * (len(frontier) - 1))]
        return Proposal([rung] * min(len(view.deadlines), view.max_batch_size))

    def arrived(self, now: float) -> None:
        pass

    def finished(self, now: float, *, met: int, missed: int) -> None:
        if missed:
            self._decrease(now)
        elif self._finished_s is not None:
            self._level = min(1.0, self._level + self._config.increase_per_s * (now - self._finished_s))
        self._finished_s = now

    def shed(self, now: float) -> None:
        self._decrease(now)

    def _decrease(self, now: float) -> None:
        if now - self._decreased_s >= self._config.dwell_s:
            self._level *= self._config.decrease
            self._decreased_s = now
