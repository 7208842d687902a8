"""A closed loop: N users who each send the next image when they have the answer to the last one.

This is how many benchmarks measure, and it answers another question than an open loop: users who wait do not send, so a
slow gateway gets less load, and the requests that others would have sent meanwhile are missing from the percentiles
("coordinated omission"). Use it for the throughput of a fixed number of callers, not for latency under a load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from loadtest.client import Answered, Client, Failed, connect
from loadtest.generator import due_after_s, on_interrupt, report_progress
from loadtest.images import Images
from loadtest.live_results import Terms, live_report, live_setup
from loadtest.recorder import Record, Recorder
from loadtest.report import Report
from loadtest.schedule import Mix
from loadtest.trace import Trace

# Chosen, not tuned: whoever is refused would otherwise ask again thousands of times a second.
_PAUSE_S = 0.1
_WISHES = 10_000  # drawn beforehand, and used in turn


@dataclass(frozen=True)
class ClosedPlan:
    """A run of `duration_s`, warm-up included; `seed` is of images and wishes."""

    users: int
    duration_s: float
    mix: Mix
    terms: Terms
    seed: int


async def measure_closed(
    url: str, plan: ClosedPlan, images: Callable[[tuple[str, ...]], Images], progress: Callable[[Recorder], None]
) -> Report:
    """Runs a plan against the gateway at `url`, and reports. Arguments and errors as those of `generator.measure`."""
    async with connect(url, plan.terms.timeout_s) as client:
        loaded = images(client.target.labels)
        before = await client.batch_counts()
        record, trace = await _offer(client, plan, loaded, progress)
        counts = (before, await client.batch_counts())
        name = f"closed loop, {plan.users} users, {plan.duration_s - plan.terms.warmup_s:g} s, seed {plan.seed}"
        setup = live_setup(client.target, name, trace, plan.seed)
    return live_report(record, trace, plan.terms, setup, counts, plan.users)


async def _offer(
    client: Client, plan: ClosedPlan, images: Images, progress: Callable[[Recorder], None]
) -> tuple[Record, Trace]:
    """What came of it, and the trace that came about."""
    wishes = plan.mix.applied(Trace.of(np.zeros(_WISHES)), np.random.default_rng(plan.seed))
    users = _Users(client, wishes, images, plan)
    before_s = time.process_time()
    interrupted = await users.to_the_end(plan.users, plan.duration_s, progress)
    record = users.recorder.record(users.start_s, time.process_time() - before_s, interrupted=interrupted)
    size = len(record.due_s)
    return record, replace(wishes.part(np.arange(size) % _WISHES), arrival_s=record.due_s)


class _Users:
    """They take wishes and images in turn."""

    def __init__(self, client: Client, wishes: Trace, images: Images, plan: ClosedPlan) -> None:
        self.recorder = Recorder(plan.terms.grace_s)
        self.start_s = 0.0
        self._client, self._images = client, images
        self._chosen: list[int] = images.choose(wishes, plan.seed).tolist()
        self._deadline_s: list[float] = due_after_s(wishes, client.target).tolist()
        self._addresses = client.addresses(wishes)
        self._count = 0

    async def to_the_end(self, users: int, duration_s: float, progress: Callable[[Recorder], None]) -> bool:
        """True when it was stopped by hand."""
        loop = asyncio.get_running_loop()
        self.start_s = loop.time()
        tasks = [asyncio.create_task(self._user(self.start_s + duration_s)) for _ in range(users)]
        reporting = asyncio.create_task(report_progress(self.recorder, progress))
        interrupted = False

        def stop() -> None:
            nonlocal interrupted
            interrupted = True
            for task in tasks:
                task.cancel()

        try:
            with on_interrupt(stop):
                await asyncio.wait(tasks)
        finally:
            for task in (reporting, *tasks):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(reporting, return_exceptions=True)
        progress(self.recorder)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return interrupted

    async def _user(self, end_s: float) -> None:
        now, recorder = asyncio.get_running_loop().time, self.recorder
        while (due_s := now()) < end_s:
            index, self._count = self._count, self._count + 1
            wish = index % _WISHES
            image = self._chosen[wish]
            recorder.expect([due_s - self.start_s], [self._deadline_s[wish]], [int(self._images.labels[image])])
            recorder.sent(index, now() - self.start_s)
            headers = {"Content-Type": self._images.media_types[image]}
            try:
                reply = await self._client.classify(self._addresses[wish], self._images.bodies[image], headers)
            except asyncio.CancelledError:  # it was sent, so it has an outcome
                recorder.ended(index, Failed("given up"), now() - self.start_s)
                raise
            recorder.ended(index, reply, now() - self.start_s)
            if not isinstance(reply, Answered):
                await asyncio.sleep(_PAUSE_S)
