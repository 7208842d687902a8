"""Inference servers first, and while none is available the engine in this process, at the cheapest points allowed.

The points are the scheduler's business: `floors_only` tells it, so that answers and metrics name the point that ran.
What the latency model has learned of the servers is wrong for the engine, and the other way round; it follows within
about ten batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.backends.base import Backend, Batch, Outputs
from server.errors import BackendUnavailable
from server.metrics import BackendMetrics


class FallbackBackend:
    """Arguments:
    primary: has workers, or not.
    fallback: always has.
    """

    def __init__(self, primary: Backend, fallback: Backend, metrics: BackendMetrics) -> None:
        self._primary, self._fallback, self._metrics = primary, fallback, metrics

    @property
    def num_workers(self) -> int:
        return self._primary.num_workers or self._fallback.num_workers

    @property
    def floors_only(self) -> bool:
        return not self._primary.num_workers

    @property
    def cancellable(self) -> bool:
        return self._primary.cancellable and not self.floors_only

    async def start(self, changed: Callable[[], None]) -> None:
        await self._fallback.start(changed)
        await self._primary.start(changed)

    async def infer(self, batch: Batch) -> Outputs:
        if self._primary.num_workers:
            try:
                return await self._primary.infer(batch)
            except BackendUnavailable:
                if asyncio.get_running_loop().time() >= batch.deadline_s:
                    raise
        self._metrics.fell_back()
        return await self._fallback.infer(batch)

    async def close(self) -> None:
        await self._primary.close()
        await self._fallback.close()
