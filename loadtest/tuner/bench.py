"""Simulates a policy at several loads, each with several seeds of latency noise.

**Held out.** A search finds what suits the very noise and arrivals it looks at. So the trace is cut in two: the first
part is searched, the rest only tells what to expect of the policy that was chosen. The noise has other seeds each time:
for searching, for the comparison of the finalists on the searched part, and for the expectation.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from loadtest.errors import LoadtestError, TraceError
from loadtest.report import Figures, PolicyUsed, Setup, summarise
from loadtest.rescale import Rescaling
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.trace import Trace
from server.policy_file import ActivePolicy
from server.provenance import Expected


@dataclass(frozen=True, eq=False)
class Task:
    """One simulation."""

    subject: Subject
    active: ActivePolicy
    trace: Trace
    seed: int
    workers: int
    max_batch_size: int | None


RunAll = Callable[[Callable[[Task], Figures], Sequence[Task]], Iterable[Figures]]


def one_by_one(run: Callable[[Task], Figures], tasks: Sequence[Task]) -> Iterable[Figures]:
    """In this process."""
    return map(run, tasks)


@contextmanager
def side_by_side(processes: int) -> Iterator[RunAll]:
    """In several processes. Results keep the order of the tasks, so nothing depends on their number."""
    if processes == 1:
        yield one_by_one
        return
    # Not by fork: the progress bar has a thread, and a lock that it may hold at that moment.
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches all of them; what it means is decided by the first one.
    with ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield pool.map


@dataclass(frozen=True, eq=False)
class Bench:
    """A machine and the loads that it is put under.

    Attributes:
        traces: by load, the arrival rate over that of the trace.
        seeds: of the latency noise; figures are means over them.
    """

    subject: Subject
    traces: dict[float, Trace]
    seeds: tuple[int, ...]
    workers: int = 1
    max_batch_size: int | None = None

    def figures(self, active: ActivePolicy, run_all: RunAll = one_by_one) -> tuple[Expected, ...]:
        """One per load."""
        tasks = [
            Task(self.subject, active, trace, seed, self.workers, self.max_batch_size)
            for trace in self.traces.values()
            for seed in self.seeds
        ]
        runs, count = list(run_all(_run, tasks)), len(self.seeds)
        return tuple(_mean(load, runs[i * count : (i + 1) * count]) for i, load in enumerate(self.traces))


def _run(task: Task) -> Figures:
    subject, trace = task.subject, task.trace
    machine = Machine(subject.latency(task.max_batch_size), seed=task.seed)
    scheduler = subject.scheduler(task.active, max_batch_size=task.max_batch_size, workers=task.workers)
    setup = Setup(
        kind="simulated",
        policy=PolicyUsed(name=task.active.config.policy, source=task.active.source),
        bundle=str(subject.directory),
        manifest_sha256=subject.manifest_sha256,
        trace="",
        trace_sha256=trace.sha256,
        workers=task.workers,
        max_batch_size=machine.latency.max_batch_size,
        seed=task.seed,
    )
    return summarise(trace, simulate(trace, scheduler, task.active, machine), subject.ladder, setup)


def _mean(load: float, runs: Sequence[Figures]) -> Expected:
    def mean(read: Callable[[Figures], float | None]) -> float | None:
        values = [read(run) for run in runs]
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None

    p99_s = mean(lambda run: run.latency_s.p99)
    return Expected(
        load=load,
        effective_accuracy=mean(lambda run: run.effective_accuracy),
        # Where nothing was answered there is no mean, but nothing is gained either: 0, and not unknown.
        mean_accuracy=mean(lambda run: run.mean_accuracy if run.answered else run.effective_accuracy),
        slo_attainment=mean(lambda run: run.slo_attainment),
        shed_ratio=mean(lambda run: run.shed_ratio),
        p99_ms=None if p99_s is None else 1000 * p99_s,
    )


@dataclass(frozen=True)
class Benches:
    """The same machine, for the three steps of tuning."""

    searched: Bench
    compared: Bench
    held_out: Bench


def benches(
    subject: Subject,
    trace: Trace,
    loads: Sequence[float],
    *,
    seed: int,
    noise_seeds: int,
    held_out: float,
    workers: int,
    max_batch_size: int | None,
) -> Benches:
    """Cuts a trace in two and draws seeds.

    Arguments:
        held_out: share of the trace's time at its end; 0 expects on the searched part, with other noise.

    Raises:
        LoadtestError: an option means nothing, or a part has no requests.
    """
    if not 0 <= held_out < 1:
        raise LoadtestError(f"--held-out is a share of the trace and must be from 0 to below 1, got {held_out}")
    if bad := [load for load in loads if not 0 < load < float("inf")]:
        raise LoadtestError(f"--load must be finite and above 0, got {bad[0]}")
    if len(set(loads)) < len(loads):
        raise LoadtestError(f"--load must name each load once, got {', '.join(f'{load:g}' for load in loads)}")
    cut_s = trace.duration_s * (1 - held_out)
    cut = int(np.searchsorted(trace.arrival_s, cut_s, side="right"))
    parts = (trace.part(slice(0, cut)), trace.part(slice(cut, len(trace)), cut_s) if held_out else trace)
    draws = np.random.SeedSequence(seed).generate_state(3 * noise_seeds + len(loads)).tolist()
    seeds = [tuple(draws[start : start + noise_seeds]) for start in range(0, 3 * noise_seeds, noise_seeds)]
    searched, rest = (
        {
            load: Rescaling(rate_scale=load).applied(part, np.random.default_rng(draw))
            for load, draw in zip(sorted(loads), draws[3 * noise_seeds :], strict=True)
        }
        for part in parts
    )
    for what, traces in (("searched", searched), ("held out", rest)):
        if empty := [load for load, each in traces.items() if not len(each)]:
            raise TraceError(f"the part of the trace that is {what} holds no requests at load {empty[0]:g}")
    bench = Bench(subject, searched, seeds[0], workers, max_batch_size)
    return Benches(bench, replace(bench, seeds=seeds[1]), replace(bench, traces=rest, seeds=seeds[2]))
