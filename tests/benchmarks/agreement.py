"""How well does the simulator predict a live gateway? `python -m tests.benchmarks.agreement`

    probe      the gateway at the full point: capacity, and the machine to simulate (`loadtest.calibration`)
    live       every load, policy and seed, in an order drawn by chance
    simulate   the very same traces, with the very same policies, on the machine that the probes saw

Asked for: attainment within 2 points and p50 within 15 % of what was measured. Writes agreement.json and agreement.md;
takes about 7 minutes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.calibration import Calibration
from loadtest.generator import Plan
from loadtest.report import Report
from loadtest.subject import Subject
from loadtest.validity import MAX_SEND_LAG_S
from tests.benchmarks.live_gateway import (
    BUNDLE,
    OUT,
    POLICIES,
    TERMS,
    WARMUP_S,
    Conditions,
    draw,
    gateway,
    pin,
    predictor,
    probed,
    put_policy,
    read_images,
    run_live,
)

FIRST_SEED = 501
DURATION_S = 10.0  # after the warm-up
# Mean over the capacity at the full point, and whether it comes in bursts.
LOADS = {
    "Poisson 0.3x": (0.3, False),
    "Poisson 0.7x": (0.7, False),
    "Poisson 1.0x": (1.0, False),
    "Poisson 1.3x": (1.3, False),
    "on-off 1:5, 0.67x": (2 / 3, True),
}
COMPARED = ("foresight", "fixed full")
# Asked of the simulator when it was planned.
MAX_ATTAINMENT, MAX_P50 = 0.02, 0.15
_COLUMNS = {"in time %": "slo_attainment", "effective %": "effective_accuracy", "shed %": "shed_ratio"}


@dataclass(frozen=True)
class Figures:
    """Ratios, and seconds by name."""

    slo_attainment: float
    effective_accuracy: float
    shed_ratio: float
    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class Run:
    """One load, policy and seed."""

    load: str
    policy: str
    seed: int
    measured: Figures
    predicted: Figures
    send_lag_p99_s: float
    failures: int

    @property
    def attainment_off(self) -> float:
        """Predicted less measured."""
        return self.predicted.slo_attainment - self.measured.slo_attainment

    @property
    def p50_off(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted.p50_s / self.measured.p50_s - 1

    @property
    def agrees(self) -> bool:
        return abs(self.attainment_off) <= MAX_ATTAINMENT and abs(self.p50_off) <= MAX_P50


def figures(report: Report) -> Figures:
    found = (
        report.slo_attainment,
        report.effective_accuracy,
        report.shed_ratio,
        report.latency_s.p50,
        report.latency_s.p99,
    )
    known = [value for value in found if value is not None]
    if len(known) < len(found):
        raise SystemExit(f"a run of {report.offered} requests answered {report.answered}: the gateway is not well")
    return Figures(*known)


def run_all(subject: Subject, seeds: Sequence[int], duration_s: float) -> tuple[list[Run], list[Calibration]]:
    """Runs, and the probes: two before the runs, one after them."""
    images = read_images(subject)
    tasks = list(product(LOADS, COMPARED, seeds))
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    measured: list[tuple[str, str, Plan, Report]] = []
    with Progress(*columns) as progress, gateway("foresight") as (url, _):
        bar = progress.add_task("running", total=len(tasks), now="probing")
        probes = [probed(url, subject, images) for _ in range(2)]
        capacity_hz = float(np.mean([each.crowd_hz for each in probes]))
        for place in np.random.default_rng(seeds[0]).permutation(len(tasks)).tolist():
            load, policy, seed = tasks[place]
            progress.update(bar, now=f"{load}, {policy}")
            share, bursts = LOADS[load]
            trace = draw(share, bursts, capacity_hz, WARMUP_S + duration_s, [seed, list(LOADS).index(load)])
            plan = Plan(trace, load, TERMS, seed)
            put_policy(url, POLICIES[policy])
            measured.append((load, policy, plan, run_live(url, plan, images)))
            progress.advance(bar)
        probes.append(probed(url, subject, images))
    runs = []
    for load, policy, plan, report in measured:
        assert report.live is not None
        predicted = figures(predictor(subject, policy, probes).predict(plan))
        failures = sum(report.live.failures.values())
        lag_s = report.live.send_lag_s.p99 or 0.0
        runs.append(Run(load, policy, plan.seed, figures(report), predicted, lag_s, failures))
    return runs, probes


def markdown(runs: Sequence[Run]) -> str:
    parts = []
    for policy in COMPARED:
        parts.append(
            f"## {policy}\n\nMeasured / predicted, means over the seeds; the largest difference of any run.\n\n"
            f"| load | {' | '.join(_COLUMNS)} | p50 ms | p99 ms | in time off by | p50 off by | runs that agree |\n"
            f"| --- {'| --: ' * 8}|\n"
        )
        for load in LOADS:
            here = [run for run in runs if (run.load, run.policy) == (load, policy)]
            cells = [_pair(here, name, 100.0) for name in _COLUMNS.values()]
            cells += [_pair(here, name, 1000.0) for name in ("p50_s", "p99_s")]
            attainment = max((run.attainment_off for run in here), key=abs)
            p50 = max((run.p50_off for run in here), key=abs)
            cells += [f"{100 * attainment:+.1f} points", f"{100 * p50:+.0f} %"]
            parts.append(f"| {load} | {' | '.join(cells)} | {sum(run.agrees for run in here)} of {len(here)} |\n")
        parts.append("\n")
    attainments, p50s = ([getattr(run, name) for run in runs] for name in ("attainment_off", "p50_off"))
    in_bounds = [
        sum(abs(each) <= bound for each in found) for found, bound in ((attainments, MAX_ATTAINMENT), (p50s, MAX_P50))
    ]
    kept_up = [run for run in runs if run.send_lag_p99_s <= MAX_SEND_LAG_S]
    parts.append(
        f"Of {len(runs)} runs {sum(run.agrees for run in runs)} agree: attainment within {100 * MAX_ATTAINMENT:g} "
        f"points and p50 within {100 * MAX_P50:g} %. Attainment is within its bound in {in_bounds[0]}, p50 in "
        f"{in_bounds[1]}. On average predictions of attainment are {100 * np.mean(attainments):+.1f} points off, of "
        f"p50 {100 * np.mean(p50s):+.0f} %; the median of absolute differences is "
        f"{100 * np.median(np.abs(attainments)):.1f} points and {100 * np.median(np.abs(p50s)):.0f} %. Of the "
        f"{len(kept_up)} runs in which the generator kept up {sum(run.agrees for run in kept_up)} agree.\n"
    )
    return "".join(parts)


def main(
    out: Annotated[Path, typer.Option(help="Directory for json and md.")] = OUT,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per load and policy.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0)] = FIRST_SEED,
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds counted, per run.")] = DURATION_S,
) -> None:
    """Compares live runs with their simulation."""
    pin()
    runs, probes = run_all(Subject.load(BUNDLE), range(first_seed, first_seed + seeds), duration_s)
    command = f"python -m tests.benchmarks.agreement --seeds {seeds} --duration {duration_s:g}"
    conditions = Conditions(command, probes, [run.send_lag_p99_s for run in runs], sum(run.failures for run in runs))
    text = (
        "# Simulated and live runs of the same traces\n\n"
        + conditions.markdown()
        + f"{duration_s:g} s per run after {WARMUP_S:g} s of warm-up, seeds per load and policy: {seeds}; loads "
        "are multiples of the capacity. All arrivals and policies are the same live and simulated, and nothing was "
        "fitted to these runs.\n\n" + markdown(runs)
    )
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = conditions.document() | {"runs": [asdict(run) for run in runs]}
    (out / "agreement.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "agreement.md").write_text(text)
    print(text)


def _pair(runs: Sequence[Run], figure: str, scale: float) -> str:
    measured, predicted = (
        scale * float(np.mean([getattr(getattr(run, kind), figure) for run in runs]))
        for kind in ("measured", "predicted")
    )
    return f"{measured:.1f} / {predicted:.1f}"


if __name__ == "__main__":
    typer.run(main)
