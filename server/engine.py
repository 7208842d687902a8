"""The asyncio shell around scheduler and backend: waits, where the scheduler decides.

One task owns the queue. It asks for batches whenever an image arrived or a worker came back, and starts each in a task
of its own; while batches run, the next ones gather. A failing backend fails that batch's images and nothing else. The
only clock is the event loop's.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

import numpy as np

from server.backends import base
from server.deadline_queue import Request
from server.decision import Batch, Refusal, ShedReason
from server.errors import (
    BackendUnavailable,
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
from server.ranking import Ranking, rank
from server.scheduler import Scheduler
from server.work import Inference, Work

logger = logging.getLogger(__name__)

_REFUSALS: Final[dict[ShedReason, type[Unavailable]]] = {
    "deadline": Overloaded,
    "share": OverShare,
    "queue_full": QueueFull,
    "queue_bytes": QueueFull,
    "backend": BackendUnavailable,
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
        backend: started; says how many batches may run at once.
        scheduler: decides; nobody else may change it.
    """

    def __init__(self, backend: base.Backend, scheduler: Scheduler, metrics: Metrics) -> None:
        self._backend, self._scheduler, self._metrics = backend, scheduler, metrics
        self._task: asyncio.Task[None] | None = None
        self._batches: dict[Batch, asyncio.Task[None]] = {}
        self._alarms: dict[Batch, asyncio.TimerHandle] = {}  # when the next image of a running batch is too late
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Begins to take work."""
        self._metrics.watch(self._scheduler, asyncio.get_running_loop().time)
        self._task = asyncio.create_task(self._run(), name="engine")

    def wake(self) -> None:
        """The backend can run more batches at once than it could, or fewer."""
        self._wake.set()

    def check(self, requests: Sequence[Request]) -> None:
        """Refuses what `infer` would refuse, before anything is spent on it.

        Arguments:
            requests: the images of one form; alike but for their pixels.

        Raises:
            Unavailable: they cannot all be answered in time behind what waits already, or the queue is full.
            DeadlineExceeded: an idle gateway could not answer them in time either.
        """
        self._ask_backend()
        if refusal := self._scheduler.check(requests, asyncio.get_running_loop().time()):
            raise self._shed(requests[0], refusal, len(requests))

    async def infer(self, request: Request, work: Work) -> Inference:
        """Waits for the image's turn and its result. Cancelling takes the image out of the queue.

        Raises:
            Unavailable: as for `check`; or the engine takes no more work, or stopped before this image's turn.
            DeadlineExceeded: decoding left too little time, its turn would have come too late, or its batch takes too
                long for it.
            InferenceFailed: the model failed, or its answer is not finite.
            GatewayError: what the backend gave as the reason of its failure.
        """
        if self._task is None:
            raise ShuttingDown("the engine takes no more images")
        loop = asyncio.get_running_loop()
        job = _Job(work, loop.time(), loop.create_future())
        self._ask_backend()
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
            if not self._scheduler.cancel(request):
                self._abandon(request)
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
        tasks, running = (task, *self._batches.values()), list(self._scheduler.running)
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        for batch in running:
            self._fail(batch.requests, ShuttingDown, "the gateway stopped while this image was being classified")
        self._fail(self._scheduler.clear(), ShuttingDown, "the gateway stopped before this image's turn")

    def _shed(self, request: Request, refusal: Refusal, images: int = 1) -> GatewayError:
        self._metrics.shed(request.budget.name, refusal.reason, images)
        if refusal.retry_after_s is None:
            return DeadlineExceeded(refusal.detail)
        return _REFUSALS[refusal.reason](refusal.detail, refusal.retry_after_s)

    def _ask_backend(self) -> None:
        self._scheduler.workers = self._backend.num_workers
        self._scheduler.floors_only = self._backend.floors_only

    def _abandon(self, request: Request) -> None:
        """Stops the batch of a client that has gone, if all others have gone, too, and stopping spares anything."""
        if not self._backend.cancellable:
            return
        for batch, task in self._batches.items():
            if request in batch.requests and all(each.payload.reply.done() for each in batch.requests):
                task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # A batch that hangs must not keep those who wait from hearing that they are late.
            queue = self._scheduler.queue
            alarm = loop.call_at(queue.deadlines[0], self._wake.set) if len(queue) else None
            try:
                await self._wake.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
            self._wake.clear()
            self._decide()

    def _decide(self) -> None:
        try:
            self._start_batches()
        except Exception:  # others must survive whatever a policy does; its queue might make it fail for ever
            logger.exception("the decision failed, %d images with it", len(self._scheduler.queue))
            self._fail(self._scheduler.clear(), InferenceFailed, "the scheduler failed")

    def _start_batches(self) -> None:
        self._ask_backend()
        if not self._scheduler.workers:
            # Whoever waits could only be late; told now, a client has time to ask another gateway.
            self._fail(self._scheduler.clear(), BackendUnavailable, "no inference server is available any more")
        while (batch := self._next_batch()) is not None:
            task = self._batches[batch] = asyncio.create_task(self._process(batch))
            task.add_done_callback(functools.partial(self._ended, batch))

    def _ended(self, batch: Batch, _: asyncio.Task[None]) -> None:
        del self._batches[batch]
        if batch in self._scheduler.running:  # cancelled before its first step
            self._scheduler.on_batch_done(batch, asyncio.get_running_loop().time(), failed=True)
            self._wake.set()

    def _next_batch(self) -> Batch | None:
        now = asyncio.get_running_loop().time()
        started_s = perf_counter()
        batch, late = self._scheduler.next_batch(now)
        if batch is not None:
            self._metrics.decided(batch, perf_counter() - started_s)
        for request in late:
            waited_ms, allowed_ms = 1000 * (now - request.arrival_s), 1000 * (request.deadline_s - request.arrival_s)
            detail = f"the image has waited {waited_ms:.0f} ms and cannot be answered within {allowed_ms:g} ms any more"
            self._fail([request], DeadlineExceeded, detail)
        return batch

    async def _process(self, batch: Batch) -> None:
        now = asyncio.get_running_loop().time
        failed = True
        try:
            rungs = [
                request.payload.work.pinned or self._scheduler.ladder.rungs[rung]
                for request, rung in zip(batch.requests, batch.rungs, strict=True)
            ]
            self._set_alarm(batch)
            outputs = await self._backend.infer(self._join(batch, rungs))
            done_s, failed = now(), False
            # The next batch first: writing the answers of this one takes the loop milliseconds, in which the backend
            # can work.
            self._scheduler.on_batch_done(batch, done_s)
            self._decide()
            self._metrics.batch_done(batch, outputs, done_s - batch.started_s)
            ranking, kept = rank(outputs.logits), outputs.kept.tolist()
            for row, rung in enumerate(rungs):
                self._answer(batch, rung, outputs, ranking, kept[row], row, done_s)
        except GatewayError as error:  # the backend knows why and has logged it
            self._fail(batch.requests, type(error), str(error))
        except Exception:  # other batches must survive whatever a runtime throws
            logger.exception("a batch of %d images failed", len(batch.requests))
            self._fail(batch.requests, InferenceFailed, "the model failed on this batch")
        finally:
            if (alarm := self._alarms.pop(batch, None)) is not None:
                alarm.cancel()
            if failed:
                self._scheduler.on_batch_done(batch, now(), failed=True)
                self._wake.set()

    def _set_alarm(self, batch: Batch) -> None:
        """For the first of those who still wait."""
        for request in batch.requests:  # in order of deadlines
            if not request.payload.reply.done():
                loop = asyncio.get_running_loop()
                self._alarms[batch] = loop.call_at(request.deadline_s + base.GRACE_S, self._expire, batch)
                break

    def _expire(self, batch: Batch) -> None:
        """Tells those whose time is over. The batch goes on: for others, and else until its backend gives it up, which
        must see for itself that it took too long."""
        now = asyncio.get_running_loop().time()
        for request in batch.requests:
            if request.deadline_s + base.GRACE_S <= now:
                allowed_ms = 1000 * (request.deadline_s - request.arrival_s)
                self._fail([request], DeadlineExceeded, f"the model did not answer within {allowed_ms:g} ms")
        self._set_alarm(batch)

    def _answer(
        self,
        batch: Batch,
        rung: Rung,
        outputs: base.Outputs,
        ranking: Ranking,
        kept: Sequence[float],
        row: int,
        done_s: float,
    ) -> None:
        request = batch.requests[row]
        job: _Job = request.payload
        if job.reply.done():  # the client went away while the batch ran, or was told that it takes too long
            return
        if not ranking.is_finite[row]:
            self._fail([request], InferenceFailed, "the model's answer for this image is not finite")
            return
        inference = Inference(
            classes=ranking.classes[row],
            probabilities=ranking.probabilities[row],
            kept=kept,
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

    def _join(self, batch: Batch, rungs: Sequence[Rung]) -> base.Batch:
        works: list[Work] = [request.payload.work for request in batch.requests]
        return base.Batch(
            images=np.stack([work.image for work in works]),
            slots=np.array([rung.slots for rung in rungs], np.int64),
            num_selected_experts=np.array([[rung.num_selected_experts] for rung in rungs], np.int64),
            explain=any(work.explain for work in works),
            profiled_s=batch.median_s / self._scheduler.latency.scale,
            deadline_s=max(request.deadline_s for request in batch.requests),
            models=tuple(rung.model for rung in rungs),
        )

    def _fail(self, requests: Sequence[Request], error: type[GatewayError], detail: str) -> None:
        for request in requests:
            reply: asyncio.Future[Inference] = request.payload.reply
            if reply.done():  # the client has gone, or has been told, and was counted
                continue
            # An instance each: raising one object in several tasks would grow one shared traceback.
            reply.set_exception(error(detail))
            if error is DeadlineExceeded:
                self._metrics.deadline_missed(request.budget.name)
            else:
                self._metrics.failed(request.budget.name, error.code)
