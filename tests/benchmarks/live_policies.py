"""Does the simulated ranking of policies hold live? `python -m tests.benchmarks.live_policies`

    probe      the gateway at the full point: capacity, and the machine to simulate (`loadtest.calibration`)
    live       in every repetition, for every trace: each policy serves the same arrivals for one short block, in an
               order drawn by chance; nothing is inside between two blocks
    simulate   the very same traces, with the very same policies, on the machine that the probes saw

Blocks are short and orders random so that a machine that changes its speed does so to every policy alike. A pair of
policies is compared block by block: paired differences in effective accuracy, with a bootstrap interval of their mean.
Where the live or the simulated interval contains 0 a pair is undecided; otherwise the two agree or are opposite.
Writes live_policies.json, live_policies.md and live_policies.png; takes about 17 minutes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib as mpl
import numpy as np
import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.calibration import Calibration
from loadtest.generator import Plan
from loadtest.report import Report
from loadtest.subject import Subject
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
from tests.benchmarks.paired import Interval, interval, kendall_tau, verdict

FIRST_SEED = 401
BLOCK_S = 6.0  # warm-up included: two periods of the bursts
TRACES = {"on-off 1:5": (2 / 3, True), "Poisson 1.2x": (1.2, False), "Poisson 2x": (2.0, False)}
Kind = Literal["live", "simulated"]
KINDS: tuple[Kind, ...] = ("live", "simulated")
FIGURES = {
    "effective %": "effective_accuracy",
    "in time %": "slo_attainment",
    "shed %": "shed_ratio",
    "missed %": "missed_ratio",
    "accuracy %": "mean_accuracy",
}


@dataclass(frozen=True)
class Block:
    """One policy on one trace in one repetition; ratios, and seconds by name."""

    kind: Kind
    trace: str
    seed: int
    policy: str
    effective_accuracy: float
    slo_attainment: float
    shed_ratio: float
    missed_ratio: float
    mean_accuracy: float | None
    p50_s: float | None
    p99_s: float | None
    send_lag_p99_s: float | None = None
    failures: int = 0


def block(report: Report, trace: str, seed: int, policy: str) -> Block:
    assert report.effective_accuracy is not None
    assert report.slo_attainment is not None
    assert report.shed_ratio is not None
    assert report.missed_ratio is not None
    live = report.live
    return Block(
        "simulated" if live is None else "live",
        trace,
        seed,
        policy,
        report.effective_accuracy,
        report.slo_attainment,
        report.shed_ratio,
        report.missed_ratio,
        report.mean_accuracy,
        report.latency_s.p50,
        report.latency_s.p99,
        None if live is None else live.send_lag_s.p99,
        0 if live is None else sum(live.failures.values()),
    )


def run_all(subject: Subject, repetitions: int, first_seed: int) -> tuple[list[Block], list[Calibration]]:
    """Live and simulated blocks; the probes, of which the first two are before the runs and two more between them."""
    images = read_images(subject)
    seeds = range(first_seed, first_seed + repetitions)
    blocks: list[Block] = []
    plans: list[tuple[str, int, str, Plan]] = []
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns) as progress, gateway("foresight") as (url, _):
        bar = progress.add_task("running", total=2 * len(seeds) * len(TRACES) * len(POLICIES), now="probing")
        probes = [probed(url, subject, images) for _ in range(2)]
        capacity_hz = float(np.mean([each.crowd_hz for each in probes]))
        for turn, seed in enumerate(seeds):
            if turn in (repetitions // 3, 2 * repetitions // 3) and turn:
                probes.append(probed(url, subject, images))
            for number, (name, (load, bursts)) in enumerate(TRACES.items()):
                trace = draw(load, bursts, capacity_hz, BLOCK_S, [seed, number])
                plan = Plan(trace, name, TERMS, seed)
                for policy in np.random.default_rng([seed, number, 1]).permutation(list(POLICIES)).tolist():
                    progress.update(bar, now=f"{name}, {policy}")
                    put_policy(url, POLICIES[policy])
                    blocks.append(block(run_live(url, plan, images), name, seed, policy))
                    plans.append((name, seed, policy, plan))
                    progress.advance(bar)
        for name, seed, policy, plan in plans:
            progress.update(bar, now=f"simulating {name}, {policy}")
            blocks.append(block(predictor(subject, policy, probes).predict(plan), name, seed, policy))
            progress.advance(bar)
    return blocks, probes


def values(blocks: Sequence[Block], kind: Kind, trace: str, policy: str, figure: str) -> list[float]:
    """One per repetition, in the order of the seeds."""
    here = [each for each in blocks if (each.kind, each.trace, each.policy) == (kind, trace, policy)]
    found = [getattr(each, figure) for each in sorted(here, key=lambda each: each.seed)]
    return [value for value in found if value is not None]


def lead(blocks: Sequence[Block], kind: Kind, trace: str, first: str, second: str) -> Interval:
    """Of the first policy over the second, in effective accuracy."""
    one, other = (values(blocks, kind, trace, policy, "effective_accuracy") for policy in (first, second))
    return interval(np.array(one) - np.array(other))


def means(blocks: Sequence[Block], kind: Kind, trace: str) -> dict[str, float]:
    return {policy: float(np.mean(values(blocks, kind, trace, policy, "effective_accuracy"))) for policy in POLICIES}


def markdown(blocks: Sequence[Block]) -> str:
    parts = []
    for trace in TRACES:
        parts.append(f"## {trace}\n\nLive / simulated, means over the repetitions.\n\n")
        parts.append(f"| policy | {' | '.join(FIGURES)} | p50 ms | p99 ms |\n| --- {'| --: ' * (len(FIGURES) + 2)}|\n")
        for policy in POLICIES:
            cells = [_pair(blocks, trace, policy, figure, 100.0) for figure in FIGURES.values()]
            cells += [_pair(blocks, trace, policy, figure, 1000.0) for figure in ("p50_s", "p99_s")]
            parts.append(f"| {policy} | {' | '.join(cells)} |\n")
        parts.append(
            "\nPaired differences in effective accuracy, points, with their intervals of 95 %:\n\n"
            "| pair | live | simulated | verdict |\n| --- | --: | --: | --- |\n"
        )
        for first, second in itertools.combinations(POLICIES, 2):
            live, simulated = (lead(blocks, kind, trace, first, second) for kind in KINDS)
            parts.append(
                f"| {first} - {second} | {_points(live)} | {_points(simulated)} | {verdict(live, simulated)} |\n"
            )
        parts.append(f"\n{_summary(blocks, trace)}\n\n")
    return "".join(parts)


def _summary(blocks: Sequence[Block], trace: str) -> str:
    pairs = list(itertools.combinations(POLICIES, 2))
    found = [verdict(*(lead(blocks, kind, trace, *pair) for kind in KINDS)) for pair in pairs]
    opposite = [
        f"{first} and {second}" for (first, second), each in zip(pairs, found, strict=True) if each == "opposite"
    ]
    live, simulated = (means(blocks, kind, trace) for kind in KINDS)
    orders = [" > ".join(sorted(each, key=lambda policy: -each[policy])) for each in (live, simulated)]
    named = f" ({', '.join(opposite)})" if opposite else ""
    return (
        f"Of {len(pairs)} pairs {found.count('agree')} agree, {found.count('opposite')} are opposite{named}, "
        f"{found.count('undecided')} undecided. By means, live: {orders[0]}; simulated: {orders[1]}. "
        f"Kendall's tau {kendall_tau(live, simulated):.2f}."
    )


def plot(blocks: Sequence[Block], path: Path) -> None:
    """Live against simulated effective accuracy, with intervals; on the diagonal both are equal."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(TRACES), figsize=(4.6 * len(TRACES), 4.4))
    for panel, trace in zip(panels, TRACES, strict=True):
        for policy, marker in zip(POLICIES, "*Dsov", strict=True):
            live, simulated = (
                interval(100 * np.array(values(blocks, kind, trace, policy, "effective_accuracy"))) for kind in KINDS
            )
            panel.errorbar(
                simulated.mean,
                live.mean,
                xerr=[[simulated.mean - simulated.low], [simulated.high - simulated.mean]],
                yerr=[[live.mean - live.low], [live.high - live.mean]],
                fmt=marker,
                markersize=12 if policy == "foresight" else 7,
                capsize=3,
                label=policy,
            )
        low = min(panel.get_xlim()[0], panel.get_ylim()[0])
        high = max(panel.get_xlim()[1], panel.get_ylim()[1])
        panel.plot((low, high), (low, high), color="0.7", linewidth=1, zorder=0)
        panel.set(xlabel="simulated effective accuracy, %", ylabel="live, %", title=trace)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Directory for json, md and png.")] = OUT,
    repetitions: Annotated[int, typer.Option(min=2)] = 10,
    first_seed: Annotated[int, typer.Option(min=0)] = FIRST_SEED,
) -> None:
    """Runs policies live and simulated over the same traces."""
    pin()
    blocks, probes = run_all(Subject.load(BUNDLE), repetitions, first_seed)
    live = [each for each in blocks if each.kind == "live"]
    command = f"python -m tests.benchmarks.live_policies --repetitions {repetitions}"
    lags = [each.send_lag_p99_s for each in live if each.send_lag_p99_s is not None]
    conditions = Conditions(command, probes, lags, sum(each.failures for each in live))
    text = (
        "# Policies, live and simulated\n\n"
        + conditions.markdown()
        + f"Every policy served the same {repetitions} traces of each kind, {BLOCK_S:g} s each, the first "
        f"{WARMUP_S:g} s cut, in random order within a trace; rates are multiples of the capacity. What the gateway "
        "had learned about the machine stayed from block to block; a simulated block starts with what the probes "
        "taught. *Effective accuracy* is the measured accuracy of the point where the answer was in time by the "
        "client's clock, 0 where not.\n\n![Live against simulated effective accuracy](live_policies.png)\n\n"
        + markdown(blocks).rstrip()
        + "\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    document = conditions.document() | {"blocks": [asdict(each) for each in blocks]}
    (out / "live_policies.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "live_policies.md").write_text(text)
    plot(blocks, out / "live_policies.png")
    print(text)


def _pair(blocks: Sequence[Block], trace: str, policy: str, figure: str, scale: float) -> str:
    cells = []
    for kind in KINDS:
        found = values(blocks, kind, trace, policy, figure)
        cells.append(f"{scale * np.mean(found):.1f}" if found else "-")
    return " / ".join(cells)


def _points(lead: Interval) -> str:
    return f"{100 * lead.mean:+.1f} ({100 * lead.low:+.1f} to {100 * lead.high:+.1f})"


if __name__ == "__main__":
    typer.run(main)
