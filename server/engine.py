"""The asyncio shell around queue and backend: one task takes batches out of the queue and has them inferred in turn.

While a batch runs, the next one gathers. A failing backend fails that batch's images and nothing else.
"""

from __future__ import annotations

import asyncio
import logging

import numpy as np

from server.backends.base import Backend, Batch, Outputs
from server.errors import GatewayError, InferenceFailed, ShuttingDown
from server.metrics import Metrics
from server.queue import BatchQueue, Entry, Inference, Work

logger = logging.getLogger(__name__)


class Engine:
    """Infers images in batches. Belongs to the event loop in which it was started."""

    def __init__(self, backend: Backend, queue: BatchQueue, metrics: Metrics) -> None:
        self._backend, self._queue, self._metrics = backend, queue, metrics
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting = 0

    def start(self) -> None:
        """Begins to take work."""
        self._task = asyncio.create_task(self._run(), name="engine")

    async def infer(self, work: Work) -> Inference:
        """Waits for the image's turn and its result. Cancelling takes the image out of the queue.

        Raises:
            ShuttingDown: the engine takes no more work, or stopped before this image's turn.
            InferenceFailed: the backend failed, or the model's answer is not finite.
        """
        if self._task is None:
            raise ShuttingDown("the engine takes no more images")
        loop = asyncio.get_running_loop()
        entry = Entry(work, loop.time(), loop.create_future())
        self._waiting += 1
        self._idle.clear()
        self._queue.offer(entry)
        self._arrived.set()
        try:
            return await entry.reply
        finally:
            self._queue.discard(entry)
            self._waiting -= 1
            if not self._waiting:
                self._idle.set()

    async def close(self, drain_timeout_s: float) -> None:
        """Refuses new work, finishes what is queued within the limit, then fails the rest."""
        task, self._task = self._task, None
        if task is None:
            return
        try:
            async with asyncio.timeout(drain_timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d images were still waiting after %g s and are refused", self._waiting, drain_timeout_s)
        task.cancel()
        await asyncio.wait([task])
        _fail(self._queue.clear(), ShuttingDown, "the gateway stopped before this image's turn")

    async def _run(self) -> None:
        while True:
            await self._process(await self._next_batch())

    async def _next_batch(self) -> list[Entry]:
        now = asyncio.get_running_loop().time
        while not (entries := self._queue.next_batch(now())):
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(self._queue.due_s()):
                    await self._arrived.wait()
            except TimeoutError:
                pass  # the oldest image has waited long enough
        return entries

    async def _process(self, entries: list[Entry]) -> None:
        now = asyncio.get_running_loop().time
        started_s = now()
        try:
            outputs = await self._backend.infer(_join(entries))
            inference_s = now() - started_s
            self._metrics.batch_done(outputs)
            for row, entry in enumerate(entries):
                _answer(entry, outputs, row, started_s - entry.arrival_s, inference_s)
        except asyncio.CancelledError:
            _fail(entries, ShuttingDown, "the gateway stopped while this image was being classified")
            raise
        except Exception:  # the loop must survive whatever a runtime throws
            logger.exception("a batch of %d images failed", len(entries))
            _fail(entries, InferenceFailed, "the model failed on this batch")


def _join(entries: list[Entry]) -> Batch:
    works = [entry.work for entry in entries]
    return Batch(
        images=np.stack([work.image for work in works]),
        slots=np.array([work.slots for work in works], np.int64),
        num_selected_experts=np.array([[work.num_selected_experts] for work in works], np.int64),
        explain=any(work.explain for work in works),
    )


def _answer(entry: Entry, outputs: Outputs, row: int, queue_s: float, inference_s: float) -> None:
    if entry.reply.done():  # the client went away while the batch ran
        return
    if not np.isfinite(outputs.logits[row]).all():
        entry.reply.set_exception(InferenceFailed("the model's answer for this image is not finite"))
        return
    entry.reply.set_result(
        Inference(
            logits=outputs.logits[row],
            kept=outputs.kept[row],
            expert_load=outputs.expert_load[row],
            token_experts=outputs.token_experts[row]
            if entry.work.explain and outputs.token_experts is not None
            else None,
            queue_s=queue_s,
            inference_s=inference_s,
        )
    )


def _fail(entries: list[Entry], error: type[GatewayError], detail: str) -> None:
    for entry in entries:
        if not entry.reply.done():
            # An instance each: raising one object in several tasks would grow one shared traceback.
            entry.reply.set_exception(error(detail))
