"""`python -m loadtest`: simulate a policy on a trace, generate a trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from loadtest import arrivals
from loadtest.errors import LoadtestError, TraceError
from loadtest.oracle import oracle
from loadtest.report import PolicyUsed, Report, Setup, oracle_report, summarise
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.tables import print_report
from loadtest.trace import Trace, read_trace, write_trace
from server.budgets import DEFAULT_BUDGET

ORACLE = "oracle"

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure what a bundle and a policy can hold.")


class Kind(StrEnum):
    """Arrival processes."""

    constant = "constant"
    poisson = "poisson"
    gamma = "gamma"
    on_off = "on-off"
    diurnal = "diurnal"
    spike = "spike"


@app.command("simulate")
def simulate_command(
    bundle: Annotated[Path, typer.Option(help="Directory of an exported model with a latency profile.")],
    trace: Annotated[Path, typer.Option(help="CSV with arrival_s and optionally budget, deadline_ms, image.")],
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
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
) -> None:
    """Runs the gateway's scheduler over TRACE on a virtual clock, with the latencies of the bundle's profile."""
    with _clear_errors():
        subject = Subject.load(bundle)
        active = subject.policy(None if policy == ORACLE else policy)
        requests = read_trace(trace, active.budgets)
        machine = Machine(subject.latency(max_batch_size), noise, slowdown, slow_from_s, slow_until_s, seed)
        bounding = policy == ORACLE
        setup = Setup(
            kind="simulated",
            policy=PolicyUsed(
                name=ORACLE if bounding else active.config.policy, source=ORACLE if bounding else active.source
            ),
            bundle=str(bundle),
            manifest_sha256=subject.manifest_sha256,
            trace=str(trace),
            trace_sha256=requests.sha256,
            workers=workers,
            max_batch_size=machine.latency.max_batch_size,
            seed=seed,
            noise=noise,
            slowdown=slowdown,
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
        print_report(report, Console())
        if json is not None:
            _write(json, report)


@app.command()
def generate(
    kind: Annotated[Kind, typer.Argument(help="Arrival process.")],
    rate_hz: Annotated[float, typer.Option("--rate", help="Mean requests per second.")],
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds.")],
    out: Annotated[Path, typer.Option(help="CSV to write.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cv: Annotated[float, typer.Option(help="gamma: coefficient of variation of the gaps.")] = 4.0,
    factor: Annotated[float | None, typer.Option(help="on-off, spike: height of a burst. Default: 5, 10.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="NAME=SHARE; repeat for a mix. Default: all of budget auto.")
    ] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="Default: the budget's.")] = None,
) -> None:
    """Draws a trace; the same seed gives the same file."""
    with _clear_errors():
        for name, value in (("--rate", rate_hz), ("--duration", duration_s), ("--cv", cv), ("--factor", factor)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise LoadtestError(f"{name} must be finite and above 0, got {value}")
        generator = np.random.default_rng(seed)
        times = _draw(kind, rate_hz, duration_s, cv, factor, generator)
        names, shares = _shares(budget or [f"{DEFAULT_BUDGET}=1"])
        codes = generator.choice(len(names), size=len(times), p=shares)
        deadlines = None if deadline_ms is None else np.full(len(times), deadline_ms / 1000)
        try:
            write_trace(out, Trace.of(times, codes, names, deadlines))
        except OSError as error:
            raise TraceError(f"cannot write {out}: {error.strerror}") from error
    Console(stderr=True).print(f"{out}: {len(times):,} requests in {duration_s:g} s")


def _draw(
    kind: Kind, rate_hz: float, duration_s: float, cv: float, factor: float | None, generator: np.random.Generator
) -> arrivals.Times:
    match kind:
        case Kind.constant:
            return arrivals.constant(rate_hz, duration_s)
        case Kind.poisson:
            return arrivals.poisson(rate_hz, duration_s, generator)
        case Kind.gamma:
            return arrivals.gamma(rate_hz, duration_s, cv, generator)
        case Kind.on_off:
            return arrivals.on_off(rate_hz, duration_s, generator, factor=5.0 if factor is None else factor)
        case Kind.diurnal:
            return arrivals.diurnal(rate_hz, duration_s, generator)
        case Kind.spike:
            return arrivals.spike(rate_hz, duration_s, generator, factor=10.0 if factor is None else factor)


def _shares(texts: list[str]) -> tuple[list[str], list[float]]:
    """Names and shares that sum to 1."""
    shares: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            shares[name] = float(number or 1)
        except ValueError as error:
            raise LoadtestError(f"--budget must be NAME=SHARE with a number above 0, got {text!r}") from error
        if not (name and math.isfinite(shares[name]) and shares[name] > 0):
            raise LoadtestError(f"--budget must be NAME=SHARE with a number above 0, got {text!r}")
    total = sum(shares.values())
    return list(shares), [share / total for share in shares.values()]


def _write(path: Path, report: Report) -> None:
    try:
        path.write_text(report.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise LoadtestError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """A message instead of a traceback for what the user can mend."""
    try:
        yield
    except LoadtestError as error:
        typer.echo(f"error: {error}", err=True)  # not through rich, which reads brackets as markup
        raise typer.Exit(1) from error
