"""SlackFit, the rule of SuperServe (Khare et al., NSDI 2025, section 4.2).

The latencies of all (rung, batch size) of the profile are sorted into evenly spaced buckets, once. When a worker frees
up, the slack of the most urgent request selects the bucket just under it, and the tuple with the largest batch in that
bucket runs; of several, the most accurate. Little slack means a low-latency bucket: small batches of cheap rungs. Much
slack means a bucket that only large batches or accurate rungs fill.

It trusts the mean profile: the buckets are those of the predicted medians, scaled by the online correction.
"""

from __future__ import annotations

from bisect import bisect_right

from pydantic import BaseModel, ConfigDict, Field

from server.policies.base import Proposal, Stateless, View


class SlackFitConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_buckets: int = Field(default=32, ge=1, description="evenly spaced latency buckets")


class SlackFit(Stateless):
    name = "slackfit"

    def __init__(self, config: SlackFitConfig) -> None:
        self._config = config
        self._scale = 0.0
        self._edges_s: list[float] = []
        self._tuples: list[tuple[int, int]] = []  # (batch size, rung) of each bucket

    def decide(self, view: View) -> Proposal:
        # The profile's shape is kept, its scale follows the machine: 5 % is well below a bucket's width.
        if not self._edges_s or abs(view.latency.scale / self._scale - 1) > 0.05:
            self._fill(view)
        slack_s = view.deadlines[0] - view.now
        bucket = max(bisect_right(self._edges_s, slack_s) - 1, 0)
        size, rung = self._tuples[bucket]
        return Proposal([rung] * min(size, len(view.deadlines)))

    def _fill(self, view: View) -> None:
        latency = view.latency
        self._scale = latency.scale
        entries = [
            (latency.uniform_s(rung, size), size, rung)
            for rung in view.ladder.frontier
            for size in range(1, view.max_batch_size + 1)
        ]
        shortest_s, longest_s = min(entries)[0], max(entries)[0]
        width_s = (longest_s - shortest_s) / self._config.num_buckets or 1.0
        best: dict[int, tuple[int, int]] = {}
        for latency_s, size, rung in entries:
            bucket = min(int((latency_s - shortest_s) / width_s), self._config.num_buckets - 1)
            best[bucket] = max(best.get(bucket, (0, 0)), (size, rung))
        # A bucket serves slacks from its upper edge on: every tuple in it is then in time. Empty ones repeat the last.
        self._edges_s = [shortest_s + (bucket + 1) * width_s for bucket in sorted(best)]
        self._tuples = [best[bucket] for bucket in sorted(best)]
