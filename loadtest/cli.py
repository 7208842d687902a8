"""`python -m loadtest`: load a gateway, simulate or tune a policy, generate a trace, show and compare reports."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from loadtest.compare import compare
from loadtest.errors import LoadtestError, TraceError
from loadtest.html import write_page
from loadtest.oracle import oracle
from loadtest.public_traces import load_trace
from loadtest.report import PolicyUsed, Report, Setup, oracle_report, summarise
from loadtest.report_file import read_report
from loadtest.rescale import Rescaling
from loadtest.runs import Run, read_runs
from loadtest.schedule import Kind, Mix, draw
from loadtest.search import Objective
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.tables import print_comparison, print_report
from loadtest.terminal import clear_errors
from loadtest.trace import Trace, write_trace
from loadtest.tuner.cli import tune
from vmoe.console import open_console
from vmoe.extras import needs_extra

ORACLE = "oracle"
INVALID = 3  # exit code

# Options of several commands.
Cv = Annotated[float, typer.Option(help="gamma: coefficient of variation of the gaps.")]
Factor = Annotated[
    float | None,
    typer.Option(help="on-off, spike: height of a burst; ramp, step: last rate over first. Default: 5, 10, 10, 4."),
]
Steps = Annotated[int, typer.Option(min=2, help="step: rates of equal length.")]
Budget = Annotated[list[str] | None, typer.Option(help="NAME=SHARE; repeat for a mix. Default: all of budget auto.")]
DeadlineMs = Annotated[
    list[str] | None,
    typer.Option(help="MILLISECONDS or MILLISECONDS=SHARE, repeated for a mix. Default: the budget's."),
]
Window = Annotated[
    str | None, typer.Option(help="FROM:TO: these seconds of the trace; either may be left out.", metavar="FROM:TO")
]
TimeScale = Annotated[float, typer.Option(help="Length over the trace's; 0.5 is twice as fast.")]
Json = Annotated[Path | None, typer.Option(help="Write the report here.")]
Html = Annotated[Path | None, typer.Option(help="Write the report as a page here: docs/reports.md.")]
RateScale = Annotated[float, typer.Option(help="Requests over the trace's, in the same time.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure what a bundle and a policy can hold.")
app.command("tune")(tune)


@app.command("simulate")
def simulate_command(
    bundle: Annotated[Path, typer.Option(help="Directory of an exported model with a latency profile.")],
    trace: Annotated[Path, typer.Option(help="Our own CSV or that of a public trace: docs/loadtest.md.")],
    policy: Annotated[
        str | None,
        typer.Option(help="Name, policy.toml, or `oracle` for an upper bound. Default: as the gateway would choose."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Batches that run at once.")] = 1,
    max_batch_size: Annotated[int | None, typer.Option(min=1, help="Default: the bundle's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the latency noise.")] = 0,
    noise: Annotated[float, typer.Option(min=0, help="Factor on the profile's spread; 0 is none.")] = 1.0,
    slowdown: Annotated[float, typer.Option(help="True latency over the profile's.")] = 1.0,
    slow_from_s: Annotated[float, typer.Option("--slow-from", help="Second from which it is slow.")] = 0.0,
    slow_until_s: Annotated[float, typer.Option("--slow-until", help="Second until which it is slow.")] = math.inf,
    measured: Annotated[
        Path | None,
        typer.Option("--machine", help="Report of `run --predict`: its machine, in place of --noise and --slowdown."),
    ] = None,
    window: Window = None,
    time_scale: TimeScale = 1.0,
    rate_scale: RateScale = 1.0,
    json: Json = None,
    html: Html = None,
) -> None:
    """Runs the gateway's scheduler over TRACE on a virtual clock, with the latencies of the bundle's profile."""
    with clear_errors():
        subject = Subject.load(bundle)
        active = subject.policy(None if policy == ORACLE else policy)
        name, requests = _replayed(trace, Rescaling.parse(window, time_scale, rate_scale), Mix(), seed, active.budgets)
        surroundings = None
        if measured is not None:
            if (found := read_report(measured).prediction) is None:
                raise LoadtestError(f"{measured} says nothing of a machine to simulate: make it with `run --predict`")
            noise, slowdown, surroundings = found.noise, found.slowdown, found.surroundings
        latency = subject.latency(max_batch_size)
        machine = Machine(latency, noise, slowdown, slow_from_s, slow_until_s, seed, surroundings)
        bounding = policy == ORACLE
        setup = Setup(
            kind="simulated",
            policy=PolicyUsed(
                name=ORACLE if bounding else active.config.policy, source=ORACLE if bounding else active.source
            ),
            bundle=str(bundle),
            manifest_sha256=subject.manifest_sha256,
            trace=name,
            trace_sha256=requests.sha256,
            workers=workers,
            max_batch_size=machine.latency.max_batch_size,
            seed=seed,
            noise=noise,
            slowdown=slowdown,
            surroundings=surroundings,
        )
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(setup.policy.name, total=len(requests))
            if bounding:
                bound = oracle(
                    requests,
                    active,
                    subject.ladder,
                    machine,
                    workers=workers,
                    progress=lambda share: progress.update(task, completed=share * len(requests)),
                )
                report = oracle_report(requests, bound, setup)
            else:
                scheduler = subject.scheduler(active, max_batch_size=max_batch_size, workers=workers)
                outcomes = simulate(
                    requests, scheduler, active, machine, lambda done: progress.update(task, completed=done)
                )
                report = summarise(requests, outcomes, subject.ladder, setup)
        print_report(report, open_console())
        _write(report, json, html)


@app.command()
def run(
    url: Annotated[str, typer.Option(help="Of the gateway, for instance http://127.0.0.1:8080.")],
    arrivals: Annotated[Kind | None, typer.Option(help="Arrival process; needs --rate and --duration.")] = None,
    rate_hz: Annotated[float | None, typer.Option("--rate", help="Mean requests per second.")] = None,
    duration_s: Annotated[float | None, typer.Option("--duration", help="Seconds, after the warm-up.")] = None,
    trace: Annotated[Path | None, typer.Option(help="As for `simulate`, instead of --arrivals.")] = None,
    window: Window = None,
    time_scale: TimeScale = 1.0,
    rate_scale: RateScale = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the schedule and of the choice of images.")] = 0,
    cv: Cv = 4.0,
    factor: Factor = None,
    steps: Steps = 2,
    budget: Budget = None,
    deadline_ms: DeadlineMs = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder (CLASS/FILE), IDX data set or one file. Default: the sample.")
    ] = None,
    warmup_s: Annotated[float, typer.Option("--warmup", min=0, help="First seconds, sent and not counted.")] = 2.0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds after which a request has failed.")] = 10.0,
    grace_ms: Annotated[
        float, typer.Option(min=0, help="Beyond the deadline, for the way there and back; still in time.")
    ] = 0.0,
    predict: Annotated[
        Path | None,
        typer.Option(help="Bundle that the gateway serves: probe it first, simulate the same run, and compare."),
    ] = None,
    percentile: Annotated[
        float, typer.Option(min=50, max=99.99, help="Of latency: the run must have requests enough for it.")
    ] = 99.0,
    closed: Annotated[
        int | None, typer.Option(min=1, help="Users who wait for each answer, instead of --arrivals; hides overload.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="That share the schedule, where one core cannot send it; not with --closed.")
    ] = 1,
    find: Annotated[
        bool, typer.Option("--find-max", help="Search from --rate on the highest rate at which the objectives hold.")
    ] = False,
    p99_ms: Annotated[float | None, typer.Option(help="--find-max: p99 of latency, at most.")] = None,
    max_shed: Annotated[
        float, typer.Option(min=0, max=1, help="--find-max: share of requests without an answer, at most.")
    ] = 0.001,
    json: Json = None,
    html: Html = None,
) -> None:
    """Offers load to a live gateway and measures latency, accuracy and refusals. Ctrl-C ends it early, with a report.

    Exits with 3 when the figures may not be relied on; the report says why.
    """
    with clear_errors():
        with needs_extra("loadtest", "a live run"):
            from loadtest.live_results import Terms
            from loadtest.live_session import Session  # needs aiohttp, which simulating does not
        _positive("--timeout", timeout_s)
        if (trace is not None) + (arrivals is not None) + (closed is not None) != 1:
            raise LoadtestError(
                "give one of --arrivals KIND with --rate and --duration, --trace FILE, and --closed USERS"
            )
        if find and (arrivals is None or p99_ms is None):
            raise LoadtestError("--find-max needs --arrivals and --p99-ms")
        if predict is not None and (closed is not None or find):
            raise LoadtestError("--predict compares runs of one schedule: give it with --arrivals or --trace alone")
        if trace is None and (window is not None or (time_scale, rate_scale) != (1, 1)):
            raise LoadtestError("--window, --time-scale and --rate-scale change a --trace, and there is none")
        if trace is not None and (rate_hz is not None or duration_s is not None):
            raise LoadtestError("a trace has its own rate and duration: use --rate-scale, --time-scale and --window")
        if not find and p99_ms is not None:
            raise LoadtestError("--p99-ms is an objective of --find-max, which is not asked for")
        if closed is not None and processes > 1:
            raise LoadtestError(f"--closed runs in one process, got --processes {processes}")
        mix = Mix.parse(budget or (), deadline_ms or ())
        terms = Terms(warmup_s, timeout_s, grace_ms / 1000, percentile)
        session = Session(url, images, terms, seed, Console(stderr=True), processes)

        def drawn(rate_hz: float, total_s: float, seed: int) -> tuple[str, Trace]:
            assert arrivals is not None
            trace = draw(arrivals, rate_hz, total_s, seed=seed, cv=cv, factor=factor, levels=steps, mix=mix)
            return f"{arrivals}, {rate_hz:g}/s, {total_s - warmup_s:g} s, seed {seed}", trace

        if trace is not None:
            name, schedule = _replayed(trace, Rescaling.parse(window, time_scale, rate_scale), mix, seed)
            report = session.run(schedule, name, predict=predict)
        elif duration_s is None or (rate_hz is None and closed is None):
            raise LoadtestError("--closed needs --duration" if closed else "--arrivals needs --rate and --duration")
        elif closed is not None:
            report = session.run_closed(closed, _positive("--duration", duration_s), mix)
        elif find and p99_ms is not None and rate_hz is not None:
            objective = Objective(_positive("--p99-ms", p99_ms) / 1000, max_shed)
            report = session.find_max(rate_hz, _positive("--duration", duration_s), objective, drawn)
        else:
            assert rate_hz is not None
            name, schedule = drawn(rate_hz, warmup_s + _positive("--duration", duration_s), seed)
            report = session.run(schedule, name, predict=predict)
        print_report(report, open_console())
        _write(report, json, html)
    assert report.live is not None
    if not report.live.valid or (report.search is not None and report.search.rate_hz is None):
        raise typer.Exit(INVALID)


@app.command()
def generate(
    kind: Annotated[Kind, typer.Argument(help="Arrival process.")],
    rate_hz: Annotated[float, typer.Option("--rate", help="Mean requests per second.")],
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds.")],
    out: Annotated[Path, typer.Option(help="CSV to write.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cv: Cv = 4.0,
    factor: Factor = None,
    steps: Steps = 2,
    budget: Budget = None,
    deadline_ms: DeadlineMs = None,
) -> None:
    """Draws a trace; the same seed gives the same file."""
    with clear_errors():
        mix = Mix.parse(budget or (), deadline_ms or ())
        trace = draw(kind, rate_hz, duration_s, seed=seed, cv=cv, factor=factor, levels=steps, mix=mix)
        _write_trace(out, trace)


@app.command("html")
def html_command(
    reports: Annotated[list[Path], typer.Argument(help="Written by --json of `run` or `simulate`.")],
    out: Annotated[Path, typer.Option(help="Page to write.")],
) -> None:
    """Shows reports as one page that needs no network: plots over time, tables, machine and versions."""
    with clear_errors():
        write_page(out, read_runs(reports))


@app.command("compare")
def compare_command(
    reports: Annotated[list[Path], typer.Argument(help="Two or more; the first is what the others are held against.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with all of them here.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling behind the intervals.")] = 0,
) -> None:
    """Tells what differs between runs, with a confidence interval on every difference."""
    with clear_errors():
        if len(reports) < 2:
            raise LoadtestError(f"comparing needs two reports or more, got {len(reports)}; `html` shows one")
        runs = read_runs(reports)
        comparisons = [compare(runs[0], other, seed=seed) for other in runs[1:]]
        for comparison in comparisons:
            print_comparison(comparison, open_console())
        if html is not None:
            write_page(html, runs, comparisons)


@app.command()
def convert(
    trace: Annotated[Path, typer.Argument(help="As for `simulate`.")],
    out: Annotated[Path, typer.Option(help="CSV to write.")],
    window: Window = None,
    time_scale: TimeScale = 1.0,
    rate_scale: RateScale = 1.0,
    budget: Annotated[list[str] | None, typer.Option(help="NAME=SHARE instead of the trace's budgets.")] = None,
    deadline_ms: Annotated[list[str] | None, typer.Option(help="MILLISECONDS=SHARE instead of the trace's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
) -> None:
    """Writes TRACE, or a part of it, in our own columns."""
    with clear_errors():
        rescaling = Rescaling.parse(window, time_scale, rate_scale)
        _write_trace(out, _replayed(trace, rescaling, Mix.parse(budget or (), deadline_ms or ()), seed)[1])


def _replayed(
    path: Path, rescaling: Rescaling, mix: Mix, seed: int, budgets: Collection[str] | None = None
) -> tuple[str, Trace]:
    """A description, and what is left of a trace file; `budgets` are those that it may name."""
    generator = np.random.default_rng(seed)
    trace = mix.applied(rescaling.applied(load_trace(path, budgets, seed=seed), generator), generator)
    if not len(trace):
        raise TraceError(f"{path}{rescaling} holds no requests")
    return f"{path}{rescaling}", trace


def _positive(option: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise LoadtestError(f"{option} must be finite and above 0, got {value}")
    return value


def _write_trace(out: Path, trace: Trace) -> None:
    try:
        write_trace(out, trace)
    except OSError as error:
        raise TraceError(f"cannot write {out}: {error.strerror}") from error
    open_console(stderr=True).print(f"{out}: {len(trace):,} requests in {trace.duration_s:.6g} s")


def _write(report: Report, json: Path | None, html: Path | None) -> None:
    if json is not None:
        try:
            json.write_text(report.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise LoadtestError(f"cannot write {json}: {error.strerror}") from error
    if html is not None:
        write_page(html, [Run(report.setup.policy.name, report)])
