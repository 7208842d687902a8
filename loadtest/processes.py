"""Several processes that share a schedule, for rates that one core cannot send.

    parent   interleaves the schedule: process r of R gets every R-th request from the r-th on
    process  connects, prepares, says that it is ready          -> pipe: READY
    parent   when all are: one start for all on the monotonic clock, which they share
    process  offers its part as a single generator would        -> pipe: a `Tally` now and then, at the end the `Record`
    parent   merges the records, in the order of the schedule, and reports as of one process

A process that ends early takes the run with it: what it did not send was due.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final

import numpy as np
import numpy.typing as npt

from loadtest.batch_counts import BatchCounts
from loadtest.client import Target, connect
from loadtest.errors import GeneratorFailed
from loadtest.generator import Plan, due_after_s, offer, soon
from loadtest.images import Images
from loadtest.live_results import live_report, live_setup
from loadtest.recorder import Record, Recorder, Tally, interleaved
from loadtest.report import Report

_READY: Final = "ready"


@dataclass(frozen=True)
class _Failure:
    """Why a process gives up."""

    why: str


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    name: str


def measure_in_processes(
    url: str,
    plan: Plan,
    images: Callable[[tuple[str, ...]], Images],
    progress: Callable[[Tally], None],
    processes: int,
) -> Report:
    """As `generator.measure`, from several processes; `progress` takes what ended lately in one of them.

    Raises:
        GeneratorFailed: a process ended before its requests did.
        LoadtestError: nobody serves there, or not what the trace asks for.
    """

    async def describe() -> tuple[Images, Target, BatchCounts | None]:
        async with connect(url, plan.terms.timeout_s) as client:
            due_after_s(plan.trace, client.target)  # refuses unknown budgets before anything is started
            return images(client.target.labels), client.target, await client.batch_counts()

    async def counts_of(target: Target) -> BatchCounts | None:
        async with connect(url, plan.terms.timeout_s, target) as client:
            return await client.batch_counts()

    loaded, target, before = asyncio.run(describe())
    chosen = loaded.choose(plan.trace, plan.seed)
    shares = [
        (replace(plan, trace=plan.trace.part(slice(first, None, processes))), chosen[first::processes])
        for first in range(processes)
    ]
    with _started(url, shares, loaded) as workers:
        for worker in workers:
            _receive(worker)  # ready
        start_s = soon()
        for worker in workers:
            worker.pipe.send(start_s)
        with _interrupts_passed_on(workers):
            record = interleaved(_records(workers, progress))
    setup = live_setup(target, plan.trace_name, plan.trace, plan.seed)
    return live_report(record, plan.trace, plan.terms, setup, (before, asyncio.run(counts_of(target))))


def _records(workers: Sequence[_Worker], progress: Callable[[Tally], None]) -> list[Record]:
    """Of all workers, in their order."""
    records: dict[str, Record] = {}
    open_pipes = {worker.pipe: worker for worker in workers}
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            assert isinstance(pipe, Connection)
            worker = open_pipes[pipe]
            message = _receive(worker)
            if isinstance(message, Record):
                records[worker.name] = message
                del open_pipes[pipe]
            else:
                assert isinstance(message, Tally)
                progress(message)
    return [records[worker.name] for worker in workers]


def _receive(worker: _Worker) -> object:
    """The next message that is no failure."""
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        worker.process.join()
        raise GeneratorFailed(f"{worker.name} ended with exit code {worker.process.exitcode}") from error
    if isinstance(message, _Failure):
        raise GeneratorFailed(f"{worker.name} gave up: {message.why}")
    return message


@contextmanager
def _started(url: str, shares: Sequence[tuple[Plan, npt.NDArray[np.int64]]], images: Images) -> Iterator[list[_Worker]]:
    """Processes, all of which have ended at the end."""
    context = get_context("spawn")  # a fork would copy the threads' locks as they are
    workers: list[_Worker] = []
    try:
        for number, (plan, chosen) in enumerate(shares, 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, url, plan, images, chosen), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            workers.append(_Worker(process, ours, f"process {number} of {len(shares)}"))
        yield workers
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()  # no effect on one that is done
            worker.process.join()


@contextmanager
def _interrupts_passed_on(workers: Sequence[_Worker]) -> Iterator[None]:
    """Ctrl-C ends the sending of all, a second one the waiting."""
    if threading.current_thread() is not threading.main_thread():  # nobody can interrupt it
        yield
        return

    def pass_on(number: int, frame: object) -> None:
        for worker in workers:
            if worker.process.is_alive() and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGINT)

    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, url: str, plan: Plan, images: Images, chosen: npt.NDArray[np.int64]) -> None:
    """Main function of a process."""
    os.setpgrp()  # the terminal's Ctrl-C comes by way of the parent, once

    def when_ready() -> float:
        pipe.send(_READY)
        return float(pipe.recv())

    def progress(recorder: Recorder) -> None:
        pipe.send(recorder.take_tally())

    async def main() -> Record:
        async with connect(url, plan.terms.timeout_s) as client:
            return await offer(client, plan, images, progress, chosen, when_ready)

    try:
        record: Record | _Failure = asyncio.run(main())
    except (BrokenPipeError, EOFError):  # the parent is gone
        return
    except Exception as error:
        record = _Failure(f"{type(error).__name__}: {error}")
    pipe.send(record)
