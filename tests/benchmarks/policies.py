"""Every policy and every static point on every trace, simulated: `make bench-policy`, which runs this module.

Policies share arrivals and the seed of the noise, so that their differences are paired; the table has means over the
seeds. Tuning must use other seeds than these. Writes policies.json, policies.md and policies.png.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from loadtest.environment import Environment
from loadtest.oracle import oracle
from loadtest.report import PolicyUsed, Setup, summarise
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from server.policy_file import POLICY_NAMES, ActivePolicy, default_policy, parse_policy
from tests.benchmarks.decision_time import decision_times
from tests.benchmarks.policy_traces import DURATION_S, TRACES, draw

BUNDLE = Path("model_repository/vmoe-fashion-mnist")
OUT = Path("docs/bench")
FIRST_SEED = 101
STEPS_PER_BATCH = 8  # of the oracle: within 0.1 % of a grid four times as fine, in a tenth of its time


@dataclass(frozen=True)
class Result:
    """One policy on one trace with one seed; ratios."""

    trace: str
    seed: int
    policy: str
    slo_attainment: float
    mean_accuracy: float | None
    effective_accuracy: float
    shed_ratio: float
    missed_ratio: float
    of_oracle: float


def contenders(subject: Subject) -> dict[str, ActivePolicy]:
    """Policies with their defaults, and `fixed` at every rung of the frontier."""
    found = {name: default_policy(subject.manifest, subject.ladder, name) for name in POLICY_NAMES if name != "fixed"}
    for rung in subject.ladder.frontier:
        point = subject.ladder.rungs[rung].point
        assert point is not None
        text = f"{point.capacity_factor:g},{point.num_selected_experts}"
        table = f'policy = "fixed"\n[budgets.auto]\nfloor = "{text}"\nceiling = "{text}"\n'
        found[f"fixed {text}"] = parse_policy(table, subject.manifest, subject.ladder, "benchmark")
    return found


def capacity_hz(subject: Subject) -> float:
    """Images per second of one worker at the full point."""
    largest = subject.manifest.max_batch_size
    return largest / subject.latency().uniform_s(subject.ladder.full, largest)


def compare(bundle: Path, trace_name: str, seed: int) -> list[Result]:
    """Every contender on one trace."""
    subject = Subject.load(bundle)
    trace = draw(trace_name, capacity_hz(subject), seed)
    machine = Machine(subject.latency(), seed=seed)
    everybody = contenders(subject)
    bound = oracle(trace, everybody["foresight"], subject.ladder, machine, workers=1, steps_per_batch=STEPS_PER_BATCH)
    if bound is None:
        raise SystemExit(f"{bundle} has no measured accuracies; export it with --images")
    results = []
    for name, active in everybody.items():
        scheduler = subject.scheduler(active)
        setup = Setup(
            kind="simulated",
            policy=PolicyUsed(name=name, source=active.source),
            bundle=str(bundle),
            manifest_sha256=subject.manifest_sha256,
            trace=trace_name,
            trace_sha256="",
            workers=1,
            max_batch_size=machine.latency.max_batch_size,
        )
        report = summarise(trace, simulate(trace, scheduler, active, machine), subject.ladder, setup)
        # None only for a trace without requests or a bundle without accuracies.
        assert report.slo_attainment is not None
        assert report.effective_accuracy is not None
        assert report.shed_ratio is not None
        assert report.missed_ratio is not None
        results.append(
            Result(
                trace_name,
                seed,
                name,
                report.slo_attainment,
                report.mean_accuracy,
                report.effective_accuracy,
                report.shed_ratio,
                report.missed_ratio,
                report.effective_accuracy / bound.effective_accuracy,
            )
        )
    return results


def run_all(bundle: Path, traces: Sequence[str], seeds: Sequence[int], jobs: int) -> list[Result]:
    """With a progress bar; in the order of traces, seeds and contenders, however many processes work."""
    tasks = [(name, seed) for name in traces for seed in seeds]
    found: dict[tuple[str, int], list[Result]] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ProcessPoolExecutor(jobs) as pool:
        bar = progress.add_task("simulating", total=len(tasks))
        futures = {pool.submit(compare, bundle, *task): task for task in tasks}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.update(bar, advance=1)
    return [result for task in tasks for result in found[task]]


def main(
    bundle: Annotated[Path, typer.Option(help="Directory of the model.")] = BUNDLE,
    out: Annotated[Path, typer.Option(help="Directory for json, md and png.")] = OUT,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per trace.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0)] = FIRST_SEED,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    trace: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TRACES)}; repeat. Default: all.")] = None,
) -> None:
    """Compares policies on the shipped bundle."""
    from tests.benchmarks.policy_figures import markdown, plot  # matplotlib takes a second

    subject = Subject.load(bundle)
    times = decision_times(subject)  # first, while nothing else runs
    results = run_all(bundle, trace or list(TRACES), range(first_seed, first_seed + seeds), jobs)
    here = Environment.here()
    document = {
        "command": f"python -m tests.benchmarks.policies --seeds {seeds} --first-seed {first_seed}",
        "date": date.today().isoformat(),
        "machine": f"{here.cpu}, {here.cores} cores",
        "profile": subject.manifest.profile.model_dump() if subject.manifest.profile else None,
        "versions": here.versions | {"python": here.python},
        "manifest_sha256": subject.manifest_sha256,
        "capacity_hz": capacity_hz(subject),
        "duration_s": DURATION_S,
        "seeds": list(range(first_seed, first_seed + seeds)),
        "results": [asdict(result) for result in results],
        "decision_us": times,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "policies.json").write_text(json.dumps(document, indent=1) + "\n")
    profile = subject.manifest.profile
    header = (
        f"Simulated on {date.today().isoformat()} by `{document['command']}` with the profile of `{bundle}`"
        f" ({'unknown machine' if profile is None else f'{profile.machine}, {profile.runtime}, {profile.date}'}); "
        f"full-accuracy capacity {capacity_hz(subject):.0f} images/s, {DURATION_S:.0f} s per trace, means over "
        f"{seeds} seeds; noise as profiled, one worker, one budget. Leads are paired, ± standard error. Decision times "
        f"on {document['machine']}, Python {platform.python_version()}.\n\n"
    )
    text = header + markdown(results, times)
    (out / "policies.md").write_text(text)
    plot(results, out / "policies.png")
    print(text)


if __name__ == "__main__":
    typer.run(main)
