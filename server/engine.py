"""The asyncio shell around scheduler and backend: waits, where the scheduler decides.

One task owns the queue. It asks for batches whenever an image arrived or a worker came back, and starts each in a task
of its own; while batches run, the next ones gather. A failing backend fails that batch's images and nothing else. The
only clock is the event loop's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

import numpy as np

from server.backends import base
from server.deadline_queue import Request
from server.errors import (
    DeadlineExceeded,
    GatewayError,
    InferenceFailed,
    Overloaded,
    OverShare,
    QueueFull,
    ShuttingDown,
    Unavailable,
)
from server.ladder import Rung
from server.metrics import Metrics
from server.scheduler import Batch, Refusal, Scheduler, ShedReason
from server.work import Inference, Work

logger = logging.getLogger(__name__)

_REFUSALS: Final[dict[ShedReason, type[Unavailable]]] = {
    "deadline": Overloaded,
    "share": OverShare,
    "queue_full": QueueFull,
    "queue_bytes": QueueFull,
}


@dataclass(frozen=True, eq=False, slots=True)
class _Job:
    """The payload of a request: what to do, since when it is in the queue, and where the answer goes."""

    work: Work
    queued_s: float
    reply: asyncio.Future[Inference] = field(repr=False)


class Engine:
    """Infers images in batches. Belongs to the event loop in which it was started.

    Arguments:
        backend: runs as many batches at once as the scheduler's limits say.
        scheduler: decides; nobody else may change it.
    """

    def __init__(self, backend: base.Backend, scheduler: Scheduler, metrics: Metrics) -> None:
        self._backend, self._scheduler, self._metrics = backend, scheduler, metrics
        self._task: asyncio.Task[None] | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Begins to take work."""
        self._metrics.watch(self._scheduler, asyncio.get_running_loop().time)
        self._task = asyncio.create_task(self._run(), name="engine")

    def check(self, request: Request) -> None:
        """Refuses what `infer` would refuse, before anything is spent on it.

        Raises:
            Unavailable: it cannot be answered in time behind what waits already, or the queue is full.
        """
        if refusal := self._scheduler.check(request, asyncio.get_running_loop().time()):
            raise self._shed(request, refusal)

    async def infer(self, request: Request, work: Work) -> Inference:
        """Waits for the image's turn and its result. Cancelling takes the image out of the queue.

        Raises:
            Unavailable: as for `check`; or the engine takes no more work, or stopped before this image's turn.
            DeadlineExceeded: its turn would have come too late.
            InferenceFailed: the backend failed, or the model's answer is not finite.
        """
        if self._task is None:
            raise ShuttingDown("the engine takes no more images")
        loop = asyncio.get_running_loop()
        job = _Job(work, loop.time(), loop.create_future())
        request.payload = job
        if refusal := self._scheduler.offer(request, job.queued_s):
            raise self._shed(request, refusal)
        budget = request.budget.name
        self._metrics.admitted(budget)
        self._wake.set()
        try:
            return await job.reply
        except asyncio.CancelledError:
            if not job.reply.cancelled():  # answered in the same turn of the loop
                job.reply.exception()  # marks a failure as seen
                raise
            self._scheduler.cancel(request)
            if loop.time() > request.deadline_s:
                self._metrics.deadline_missed(budget)
            else:
                self._metrics.cancelled(budget)
            raise

    async def close(self) -> None:
        """Takes no more work; what still waits or runs fails."""
        task, self._task = self._task, None
        if task is None:
            return
        tasks, running = (task, *self._batches), list(self._scheduler.running)
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        for batch in self._scheduler.running.copy():  # of a task that was cancelled before its first step
            self._scheduler.on_batch_done(batch, asyncio.get_running_loop().time(), failed=True)
        for batch in running:
            _fail(batch.requests, ShuttingDown, "the gateway stopped while this image was being classified")
        _fail(self._scheduler.clear(), ShuttingDown, "the gateway stopped before this image's turn")

    def _shed(self, request: Request, refusal: Refusal) -> Unavailable:
        self._metrics.shed(request.budget.name, refusal.reason)
        return _REFUSALS[refusal.reason](refusal.detail, refusal.retry_after_s)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._scheduler.free_workers and (batch := self._next_batch()) is not None:
                    task = asyncio.create_task(self._process(batch))
                    self._batches.add(task)
                    task.add_done_callback(self._batches.discard)
            except Exception:  # the loop must survive whatever a policy does; its queue might make it fail for ever
                logger.exception("the decision failed, %d images with it", len(self._scheduler.queue))
                _fail(self._scheduler.clear(), InferenceFailed, "the scheduler failed")

    def _next_batch(self) -> Batch | None:
        now = asyncio.get_running_loop().time()
        started_s = perf_counter()
        batch, late = self._scheduler.next_batch(now)
        if batch is not None:
            self._metrics.decided(batch, perf_counter() - started_s)
        for request in late:
            self._metrics.deadline_missed(request.budget.name)
            waited_ms, allowed_ms = 1000 * (now - request.arrival_s), 1000 * (request.deadline_s - request.arrival_s)
            detail = f"the image has waited {waited_ms:.0f} ms and cannot be answered within {allowed_ms:g} ms any more"
            _fail([request], DeadlineExceeded, detail)
        return batch

    async def _process(self, batch: Batch) -> None:
        now = asyncio.get_running_loop().time
        failed = True
        try:
            rungs = [
                request.payload.work.pinned or self._scheduler.ladder.rungs[rung]
                for request, rung in zip(batch.requests, batch.rungs, strict=True)
            ]
            outputs = await self._backend.infer(_join(batch, rungs))
            done_s = now()
            self._metrics.batch_done(batch, outputs, done_s - batch.started_s)
            for row, rung in enumerate(rungs):
                self._answer(batch, rung, outputs, row, done_s)
            failed = False
        except Exception:  # other batches must survive whatever a runtime throws
            logger.exception("a batch of %d images failed", len(batch.requests))
            _fail(batch.requests, InferenceFailed, "the model failed on this batch")
        finally:
            self._scheduler.on_batch_done(batch, now(), failed=failed)
            self._wake.set()

    def _answer(self, batch: Batch, rung: Rung, outputs: base.Outputs, row: int, done_s: float) -> None:
        request = batch.requests[row]
        job: _Job = request.payload
        if job.reply.done():  # the client went away while the batch ran
            return
        if not np.isfinite(outputs.logits[row]).all():
            job.reply.set_exception(InferenceFailed("the model's answer for this image is not finite"))
            return
        inference = Inference(
            logits=outputs.logits[row],
            kept=outputs.kept[row],
            expert_load=outputs.expert_load[row],
            token_experts=outputs.token_experts[row]
            if job.work.explain and outputs.token_experts is not None
            else None,
            rung=rung,
            reason=batch.reasons[row],
            degraded=batch.rungs[row] < request.ceiling,
            deadline_met=done_s <= request.deadline_s,
            queue_s=batch.started_s - job.queued_s,
            inference_s=done_s - batch.started_s,
        )
        self._metrics.answered(request.budget.name, inference)
        job.reply.set_result(inference)


def _join(batch: Batch, rungs: Sequence[Rung]) -> base.Batch:
    works: list[Work] = [request.payload.work for request in batch.requests]
    return base.Batch(
        images=np.stack([work.image for work in works]),
        slots=np.array([rung.slots for rung in rungs], np.int64),
        num_selected_experts=np.array([[rung.num_selected_experts] for rung in rungs], np.int64),
        explain=any(work.explain for work in works),
    )


def _fail(requests: Sequence[Request], error: type[GatewayError], detail: str) -> None:
    for request in requests:
        reply: asyncio.Future[Inference] = request.payload.reply
        if not reply.done():
            # An instance each: raising one object in several tasks would grow one shared traceback.
            reply.set_exception(error(detail))
