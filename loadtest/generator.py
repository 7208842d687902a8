"""Offers a trace to a live gateway, open loop: every request leaves at its time, whatever became of those before it.

    trace, drawn beforehand -> pace (sleeps until a request is due) -> one task per request -> recorder -> report

Latency counts from the scheduled arrival (wrk2, MLPerf LoadGen's Server scenario), so that a stall of the gateway, of
the network or of this generator is paid by everybody who was due meanwhile. What was due while the generator slept too
long is sent at once, and noted as lag.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.client import Client, Failed, Target, connect
from loadtest.errors import LoadtestError
from loadtest.images import Images
from loadtest.live_results import Terms, live_report, live_setup
from loadtest.recorder import Record, Recorder
from loadtest.report import Report
from loadtest.trace import Trace

logger = logging.getLogger(__name__)

_LEAD_S = 0.1  # before the first arrival, so that it is not late already
_TICK_S = 0.25  # between two reports of progress


@dataclass(frozen=True, eq=False)
class Plan:
    """A live run.

    Attributes:
        trace: warm-up included; trace_name: file or description.
        seed: of the schedule and of the choice of images.
    """

    trace: Trace
    trace_name: str
    terms: Terms
    seed: int


async def measure(
    url: str, plan: Plan, images: Callable[[tuple[str, ...]], Images], progress: Callable[[Recorder], None]
) -> Report:
    """Runs a plan against the gateway at `url`, and reports. The first Ctrl-C ends the sending, the second the waiting.

    Arguments:
        images: to be sent to a model with these class names.
        progress: called now and then.

    Raises:
        LoadtestError: nobody serves there, or not what the trace asks for.
    """
    async with connect(url, plan.terms.timeout_s) as client:
        loaded = images(client.target.labels)
        before = await client.batch_counts()
        record = await offer(client, plan, loaded, progress)
        counts = (before, await client.batch_counts())
        setup = live_setup(client.target, plan.trace_name, plan.trace, plan.seed)
    return live_report(record, plan.trace, plan.terms, setup, counts)


def soon() -> float:
    """A start on the monotonic clock, so that the first arrival is not late already."""
    return time.monotonic() + _LEAD_S


async def offer(
    client: Client,
    plan: Plan,
    images: Images,
    progress: Callable[[Recorder], None] = lambda recorder: None,
    chosen: npt.NDArray[np.int64] | None = None,
    when_ready: Callable[[], float] = soon,
) -> Record:
    """Sends every request of the plan; what came of it.

    Arguments:
        progress: called now and then; what it raises ends the run.
        chosen: (N,) the image of each request; by the plan's seed where it is None.
        when_ready: called when everything is prepared; the start of the schedule, on the monotonic clock.
    """
    trace = plan.trace
    chosen = images.choose(trace, plan.seed) if chosen is None else chosen
    recorder = Recorder(plan.terms.grace_s)
    recorder.expect(trace.arrival_s, due_after_s(trace, client.target), images.labels[chosen])
    run = _Run(client, trace, images, chosen.tolist(), recorder)
    before_s = time.process_time()
    interrupted = await run.to_the_end(progress, when_ready())
    return recorder.record(run.start_s, time.process_time() - before_s, interrupted=interrupted)


def due_after_s(trace: Trace, target: Target) -> npt.NDArray[np.float64]:
    """(N,) deadlines from the arrival.

    Raises:
        LoadtestError: the trace names a budget that the gateway does not have.
    """
    if unknown := [name for name in trace.budgets if name not in target.deadline_s]:
        raise LoadtestError(f"unknown budget {unknown[0]!r}; the gateway has {', '.join(target.deadline_s)}")
    own_s = np.array([target.deadline_s[name] for name in trace.budgets])[trace.budget]
    return np.where(np.isnan(trace.deadline_s), own_s, trace.deadline_s)


class _Run:
    """One pass over a trace. Everything a request needs is made before the first is due."""

    def __init__(self, client: Client, trace: Trace, images: Images, chosen: list[int], recorder: Recorder) -> None:
        self._client, self._images, self._chosen, self._recorder = client, images, chosen, recorder
        self._due_s: list[float] = trace.arrival_s.tolist()
        self._addresses = client.addresses(trace)
        self._headers = [{"Content-Type": media_type} for media_type in images.media_types]
        self._open: set[asyncio.Task[None]] = set()
        self.start_s = 0.0

    async def to_the_end(self, progress: Callable[[Recorder], None], start_s: float) -> bool:
        """True when it was stopped by hand."""
        self.start_s = start_s
        pacing = asyncio.create_task(self._pace())
        reporting = asyncio.create_task(report_progress(self._recorder, progress))

        def stop() -> None:
            for task in (pacing,) if not pacing.done() else tuple(self._open):
                task.cancel()

        try:
            with on_interrupt(stop):
                while not pacing.done() or self._open:
                    waited = self._open if pacing.done() else (pacing,)
                    await asyncio.wait((*waited, reporting), return_when=asyncio.FIRST_COMPLETED)
                    if reporting.done():
                        reporting.result()  # raises what `progress` raised
        finally:
            for task in (pacing, reporting, *self._open):
                task.cancel()
            await asyncio.gather(reporting, *self._open, return_exceptions=True)
        progress(self._recorder)
        if not pacing.cancelled():
            pacing.result()  # raises what the pacing raised
        return pacing.cancelled()

    async def _pace(self) -> None:
        now = time.monotonic
        for index, due_s in enumerate(self._due_s):
            # Also when late: 0 lets the tasks of those before run, so that catching up cannot starve them.
            await asyncio.sleep(max(self.start_s + due_s - now(), 0))
            task = asyncio.create_task(self._send(index))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

    async def _send(self, index: int) -> None:
        now = time.monotonic
        recorder, image = self._recorder, self._chosen[index]
        recorder.sent(index, now() - self.start_s)
        try:
            reply = await self._client.classify(
                self._addresses[index], self._images.bodies[image], self._headers[image]
            )
        except asyncio.CancelledError:  # nobody waits any longer; it was sent, so it has an outcome
            reply = Failed("given up")
        recorder.ended(index, reply, now() - self.start_s)


async def report_progress(recorder: Recorder, progress: Callable[[Recorder], None]) -> None:
    """Calls `progress` now and then, until it is cancelled."""
    while True:
        progress(recorder)
        await asyncio.sleep(_TICK_S)


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`, in the loop."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except (ValueError, RuntimeError):  # not the main thread: nobody can interrupt it
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
