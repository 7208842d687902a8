"""The steps of `python -m loadtest tune`, and what it says meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest.errors import LoadtestError, ObjectiveUnreached
from loadtest.progress import LiveProgress
from loadtest.public_traces import load_trace
from loadtest.subject import Subject
from loadtest.tuner.bench import Benches, RunAll, benches, side_by_side
from loadtest.tuner.confirmation import Administrator, Live, confirm
from loadtest.tuner.front import finalist_table, print_front, write_plot
from loadtest.tuner.objective import Objective, Verdict, judge
from loadtest.tuner.search import Candidate, search
from loadtest.tuner.stopping import Stop
from loadtest.tuner.written import check_writable, provenance_of, render, write
from server.policy_file import PolicyConfig
from server.provenance import Expected, Provenance

_FINALISTS: Final = 5  # and the default policy; chosen, not tuned
_CONFIRMED: Final = 3  # live, of those; each takes as long as the loads that were held out


@dataclass(frozen=True)
class Gateway:
    """Where finalists are confirmed; see `confirmation.confirm`."""

    url: str
    admin_key: str
    grace_ms: float
    images: Path | None


@dataclass(frozen=True)
class Options:
    """What the command line says; see `bench.benches` for what cuts and draws.

    Attributes:
        policy: whose budgets are kept, as `Subject.policy` takes it.
        out: policy.toml to write; plot: HTML to write.
        jobs: processes that simulate.
        best_effort: write the nearest where the objective is out of reach.
        command: gives the same file again.
    """

    bundle: Path
    trace: Path
    objective: Objective
    loads: tuple[float, ...]
    trials: int
    seed: int
    noise_seeds: int
    held_out: float
    workers: int
    max_batch_size: int | None
    jobs: int
    policy: str | None
    out: Path
    plot: Path | None
    best_effort: bool
    gateway: Gateway | None
    command: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Finalist:
    """A candidate on what was held out.

    Attributes:
        live: None where it was not confirmed.
    """

    candidate: Candidate
    expected: tuple[Expected, ...]
    verdict: Verdict
    live: Live | None = None


def tune(options: Options, console: Console) -> None:
    """Searches, chooses, and writes `options.out`.

    Raises:
        ObjectiveUnreached: nothing was written.
        LoadtestError: the search cannot start as asked, or the gateway failed.
    """
    for path in (options.out, options.plot):
        if path is not None:
            check_writable(path)
    gateway = options.gateway
    administrator = None if gateway is None else Administrator(gateway.url, gateway.admin_key)
    if administrator is not None:
        administrator.check()
    subject = Subject.load(options.bundle)
    base = subject.policy(options.policy)
    trace = load_trace(options.trace, base.budgets, seed=options.seed)
    steps = benches(
        subject,
        trace,
        options.loads,
        seed=options.seed,
        noise_seeds=options.noise_seeds,
        held_out=options.held_out,
        workers=options.workers,
        max_batch_size=options.max_batch_size,
    )
    candidates, trials, finalists = _searched(options, steps, base.config, console)
    print_front(candidates, options.objective, console)
    if options.plot is not None:
        write_plot(options.plot, candidates, options.objective)
    console.print(
        finalist_table([(each.candidate, each.expected, each.verdict.holds) for each in finalists], options.objective)
    )

    def provenance(finalist: Finalist) -> Provenance:
        return provenance_of(
            manifest_sha256=subject.manifest_sha256,
            trace_sha256=trace.sha256,
            seed=options.seed,
            trials=trials,
            objective=options.objective,
            command=options.command,
            expected=finalist.expected,
        )

    if gateway is not None and administrator is not None:
        texts = [render(each.candidate.active, provenance(each), ()) for each in finalists]
        finalists = _confirmed(finalists, texts, steps, options, gateway, administrator, console)
    chosen = _choose(finalists, options)
    write(options.out, render(chosen.candidate.active, provenance(chosen), _remarks(chosen, finalists, options)))
    what = f"{chosen.candidate.active.config.policy} of trial {chosen.candidate.number}"
    console.print(f"{options.out}: {what}", soft_wrap=True)


def _searched(
    options: Options, steps: Benches, base: PolicyConfig, console: Console
) -> tuple[list[Candidate], int, list[Finalist]]:
    """Every candidate, the number of trials, and the finalists in order."""
    stop = Stop()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        side_by_side(options.jobs) as run_all,
    ):
        task = progress.add_task("", total=options.trials)

        def show(done: int, best: Candidate) -> None:
            verdict = best.verdict
            description = f"best: trial {best.number}, {_figures(options.objective, verdict)}"
            progress.update(task, completed=done, description=description)

        with stop.on_interrupt():
            candidates, trials = search(
                steps.searched,
                options.objective,
                base,
                trials=options.trials,
                seed=options.seed,
                progress=show,
                stopped=stop,
                run_all=run_all,
            )
        progress.update(task, description="comparing the finalists")
        finalists = _finalists(candidates, steps, options.objective, run_all)
    if stop.asked:
        console.print(f"stopped by hand after {trials} of {options.trials} trials: going on with the best so far")
    return candidates, trials, finalists


def _finalists(
    candidates: Sequence[Candidate], steps: Benches, objective: Objective, run_all: RunAll
) -> list[Finalist]:
    """The best of the search and the default, ordered by other noise, with what to expect of them."""
    chosen = sorted(candidates, key=lambda each: (each.verdict.rank, each.number))[:_FINALISTS]
    if candidates[0] not in chosen:
        chosen.append(candidates[0])
    ranks = {each.number: judge(objective, steps.compared.figures(each.active, run_all)).rank for each in chosen}
    finalists = []
    for each in sorted(chosen, key=lambda each: (ranks[each.number], each.number)):
        expected = steps.held_out.figures(each.active, run_all)
        finalists.append(Finalist(each, expected, judge(objective, expected)))
    return finalists


def _confirmed(
    finalists: Sequence[Finalist],
    texts: Sequence[str],
    steps: Benches,
    options: Options,
    gateway: Gateway,
    administrator: Administrator,
    console: Console,
) -> list[Finalist]:
    """The first few of those that may win, with what they did live. An interruption or a failure leaves the rest as it
    was: hours of searching must not be lost to a gateway."""
    eligible = [index for index, each in enumerate(finalists) if each.verdict.holds or options.best_effort]
    found = list(finalists)
    requests = sum(len(trace) for trace in steps.held_out.traces.values())
    with administrator.borrowed():
        for index in eligible[:_CONFIRMED]:
            try:
                with LiveProgress(requests, Console(stderr=True)) as progress:
                    live = confirm(
                        gateway.url,
                        administrator,
                        texts[index],
                        steps.held_out.traces,
                        seed=options.seed,
                        grace_ms=gateway.grace_ms,
                        images=gateway.images,
                        progress=progress.update,
                    )
            except LoadtestError as error:
                console.print(f"not confirmed: {error}", markup=False, soft_wrap=True)
                break
            if live.interrupted:
                console.print("stopped by hand: the rest is not confirmed")
                break
            found[index] = replace(found[index], live=live)
    confirmed = [
        (each.candidate, each.live.figures, judge(options.objective, each.live.figures).holds)
        for each in found
        if each.live is not None
    ]
    console.print(finalist_table(confirmed, options.objective, title=f"live, {gateway.url}"))
    for each in found:
        for reason in () if each.live is None else each.live.invalid:
            console.print(f"trial {each.candidate.number} live NOT VALID: {reason}", markup=False, soft_wrap=True)
    return found


def _choose(finalists: Sequence[Finalist], options: Options) -> Finalist:
    """The first that holds on what was held out and, where that was measured validly, live.

    Raises:
        ObjectiveUnreached: none does.
    """
    objective = options.objective
    for each in finalists:
        live = None if each.live is None or each.live.invalid else judge(objective, each.live.figures)
        if each.verdict.holds and (live is None or live.holds):
            return each
    nearest = min(finalists, key=lambda each: each.verdict.rank)
    if options.best_effort:
        return nearest
    raise ObjectiveUnreached(
        f"out of reach: {objective}. The nearest, trial {nearest.candidate.number}, expects "
        f"{_figures(objective, nearest.verdict)}. {options.out} was not written: loosen the objective, lower --load, "
        "allow more --trials, or write the nearest with --best-effort"
    )


def _remarks(chosen: Finalist, finalists: Sequence[Finalist], options: Options) -> list[str]:
    default = next(each for each in finalists if each.candidate.number == 0)
    remarks = [
        f"Expected on what was held out from the search: {_figures(options.objective, chosen.verdict)};",
        f"of the default policy: {_figures(options.objective, default.verdict)}.",
    ]
    if not chosen.verdict.holds:
        remarks.insert(0, "THE OBJECTIVE IS OUT OF REACH; this is the nearest.")
    if options.gateway is not None and (chosen.live is None or chosen.live.invalid):
        remarks.append("Not confirmed live.")
    elif chosen.live is not None:
        remarks.append(f"Measured live: {_figures(options.objective, judge(options.objective, chosen.live.figures))}.")
    return remarks


def _figures(objective: Objective, verdict: Verdict) -> str:
    """Mean and worst over the loads."""
    return (
        f"{objective.goal.replace('_', ' ')} {100 * verdict.gain:.2f} %, p99 {verdict.p99_ms:.1f} ms, "
        f"shed {100 * verdict.shed_ratio:.3f} %"
    )
