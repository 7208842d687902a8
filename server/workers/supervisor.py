"""The parent of the workers: starts them, replaces those that die, passes on signals and policies. Serves nothing.

    SIGTERM, SIGINT    to all workers, which drain; a second one closes at once. One that hangs is killed
    SIGHUP             one worker reads the policy, all put it in force
    a worker dies      another one, see `backoff`; where none was ever warm, a setting is bad: all end, exit status 1
    the parent dies    each worker finds its pipe closed, and drains

uvicorn has a supervisor, which restarts on SIGHUP, replaces for ever, and asks its children for life every half second.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from server.policy_file import PolicyText
from server.settings import Settings
from server.workers.backoff import Backoff
from server.workers.listening import Address, ListenError, reserved
from server.workers.messages import Applied, Apply, Failed, FromWorker, Go, Reload, Share, Shared, Stop, ToWorker, Warm
from server.workers.registry import forget
from server.workers.worker import Start, work

logger = logging.getLogger(__name__)

# Chosen, not tuned: beyond the limit of the drain, for the last batch to run and the last bytes to leave, which has a
# limit of 5 s in a worker; and for one that was told to close at once.
_MARGIN_S: Final = 10.0
_GRACE_S: Final = 1.0


def supervise(settings: Settings) -> int:
    """Serves until SIGINT, or SIGTERM, which then ends this process as it ends a single gateway; the exit status."""
    try:
        with (
            _signals() as signals,
            reserved(settings.host, settings.port) as addresses,
            TemporaryDirectory(prefix="vmoe-workers-") as directory,  # for this user alone
        ):
            supervisor = Supervisor(settings, addresses, Path(directory), signals)
            supervisor.run()
    except ListenError as error:
        logger.error("%s", error)
        return 1
    if supervisor.failed:
        return 1
    if supervisor.stopped_by == signal.SIGTERM:
        signal.raise_signal(signal.SIGTERM)
    return 0


def threads_of(settings: Settings, cores: int) -> int:
    """Of one inference in each worker: ONNX Runtime's own choice would be all cores, for every one of them."""
    return settings.threads or max(1, cores // settings.workers)


@dataclass(eq=False)
class _Worker:
    """Attributes:
    open: its end of the pipe, as far as is known.
    released: told to admit requests.
    """

    number: int
    process: BaseProcess
    pipe: Connection
    started_s: float
    open: bool = True
    warm: bool = False
    released: bool = False

    def send(self, message: ToWorker) -> None:
        with suppress(OSError):  # it has died, as its sentinel will say
            self.pipe.send(message)


@dataclass
class _Sharing:
    """A policy on its way into force everywhere.

    Attributes:
        waiting: for these.
    """

    origin: _Worker
    key: int
    waiting: set[_Worker] = field(default_factory=set)


class Supervisor:
    """Arguments:
        addresses: reserved.
        directory: private, empty.
        signals: gives the number of each signal that came, as a byte.

    Attributes:
        stopped_by: the first signal that asked for it.
        failed: a worker could not be started at all.
    """

    def __init__(
        self, settings: Settings, addresses: Sequence[Address], directory: Path, signals: socket.socket
    ) -> None:
        threads = threads_of(settings, len(os.sched_getaffinity(0)))
        self._settings = settings.model_copy(update={"threads": threads})
        self._addresses, self._directory, self._signals = addresses, directory, signals
        self._context = get_context("spawn")  # a fork would share the threads' locks
        self._workers: dict[int, _Worker] = {}
        self._proven: set[int] = set()  # places in which a worker was warm once
        self._backoffs = {number: Backoff() for number in range(1, settings.workers + 1)}
        self._due: dict[int, float] = {}  # when a dead worker is replaced, by number
        self._policy: PolicyText | None = None  # in force
        self._sharings: dict[int, _Sharing] = {}  # by number of `Apply`
        self._orders = 0
        self._stopping = False
        self.stopped_by: int | None = None
        self.failed = False
        self._kill_s = math.inf  # when those that are left by then are killed

    def run(self) -> None:
        """Returns when all workers have ended."""
        for number in self._backoffs:
            self._start(number)
        workers, threads = self._settings.workers, self._settings.threads
        for _, (host, port, *_) in self._addresses:
            logger.info("%d workers, %d threads in each engine, listen on %s port %s", workers, threads, host, port)
        while self._workers or self._due:
            self._wait()

    def _wait(self) -> None:
        """For whatever comes first: a signal, a message, a death, or the time of a replacement."""
        sentinels = [worker.process.sentinel for worker in self._workers.values()]
        pipes = [worker.pipe for worker in self._workers.values() if worker.open]
        next_s = min(*self._due.values(), self._kill_s, math.inf)
        timeout_s = None if next_s == math.inf else max(0.0, next_s - time.monotonic())
        ready = set(wait([self._signals, *sentinels, *pipes], timeout_s))
        if self._signals in ready:
            for number in self._signals.recv(64):
                self._signalled(number)
        for worker in list(self._workers.values()):
            ended = worker.process.sentinel in ready
            if ended or worker.pipe in ready:
                self._hear(worker)
            if ended:
                self._ended(worker)
        for number, due_s in list(self._due.items()):
            if due_s <= time.monotonic():
                del self._due[number]
                self._start(number)
        if self._kill_s <= time.monotonic():
            self._kill()

    def _start(self, number: int) -> None:
        if self._stopping:  # another one could not be started
            return
        ours, theirs = self._context.Pipe()
        replaces = number in self._proven
        start = Start(self._settings, number, self._addresses, self._directory, self._policy, replaces)
        process = self._context.Process(target=work, args=(start, theirs), name=f"worker {number}", daemon=True)
        try:
            process.start()
        except OSError as error:  # no memory, no process: of the moment, where workers have run before
            ours.close()
            logger.error("worker %d cannot be started: %s", number, error)
            self._lost(number, 0.0)
            return
        finally:
            theirs.close()  # so that its end is seen here
        self._workers[number] = _Worker(number, process, ours, time.monotonic())

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            first = min(self._workers.values(), key=lambda worker: (not worker.warm, worker.number), default=None)
            if first is not None:
                first.send(Reload())
            return
        logger.info("%s: stopping %d workers", signal.Signals(number).name, len(self._workers))
        again, self.stopped_by = self._stopping, self.stopped_by or number
        self._stop(at_once=again)

    def _stop(self, *, at_once: bool = False) -> None:
        self._stopping = True
        self._due.clear()
        drain_s = self._settings.shutdown_delay_s + self._settings.drain_timeout_s + _MARGIN_S
        self._kill_s = min(self._kill_s, time.monotonic() + (_GRACE_S if at_once else drain_s))
        for worker in self._workers.values():
            if worker.released and not at_once:
                worker.send(Stop())
            else:  # nothing is inside yet, or has to be waited for
                worker.process.terminate()

    def _kill(self) -> None:
        """They hang, or wait for something that does."""
        self._kill_s = math.inf
        for worker in self._workers.values():
            logger.error("worker %d has not ended in time: killing it", worker.number)
            worker.process.kill()

    def _hear(self, worker: _Worker) -> None:
        while worker.open and worker.pipe.poll():
            try:
                self._on_message(worker, worker.pipe.recv())
            except (EOFError, OSError):
                worker.open = False

    def _on_message(self, worker: _Worker, message: FromWorker) -> None:
        match message:
            case Warm(policy):
                worker.warm = True
                self._proven.add(worker.number)
                self._policy = self._policy or policy
                self._release()
            case Failed():
                worker.process.terminate()
            case Share(key, policy):
                self._orders += 1
                self._policy = policy
                self._sharings[self._orders] = _Sharing(worker, key, set(self._workers.values()))
                for each in self._workers.values():
                    each.send(Apply(self._orders, policy))
            case Applied(number):
                self._applied(number, worker)

    def _release(self) -> None:
        """A load balancer that sees one worker ready sends to all of them."""
        if len(self._proven) < len(self._backoffs):
            return
        for worker in self._workers.values():
            if worker.warm and not worker.released:
                worker.released = True
                worker.send(Go())

    def _applied(self, number: int, worker: _Worker) -> None:
        """Or has died: its successor starts with the policy."""
        sharing = self._sharings[number]
        sharing.waiting.discard(worker)
        if not sharing.waiting:
            del self._sharings[number]
            sharing.origin.send(Shared(sharing.key))

    def _ended(self, worker: _Worker) -> None:
        worker.process.join()
        exit_code = worker.process.exitcode
        del self._workers[worker.number]
        for number in list(self._sharings):
            self._applied(number, worker)
        worker.pipe.close()
        worker.process.close()
        forget(self._directory, worker.number)
        if self._stopping:
            return
        logger.error("worker %d ended with exit code %s", worker.number, exit_code)
        self._lost(worker.number, time.monotonic() - worker.started_s)

    def _lost(self, number: int, lived_s: float) -> None:
        if number not in self._proven:
            logger.error("worker %d has never been ready: stopping", number)
            self.failed = True
            self._stop()
            return
        delay_s = self._backoffs[number].died(lived_s)
        logger.info("worker %d is replaced in %g s", number, delay_s)
        self._due[number] = time.monotonic() + delay_s


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that gives the number of each signal as a byte, to be waited for beside others."""
    ours, python = socket.socketpair()
    with ours, python:
        python.setblocking(False)
        wakeup_before = signal.set_wakeup_fd(python.fileno())
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        try:
            yield ours
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup_before)
