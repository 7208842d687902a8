"""How much a fleet holds, simulated: `make bench-fleet`, which runs this module. Prints the tables of docs/scaling.md.

A row is one gateway with a number of workers; a worker runs one batch at a time: the embedded engine, or one
instance of a Triton. Its rate is the highest at which 99 % of the images offered are answered in time, found by
bisection with one seed. Several gateways hold the sum of their rows, as they share nothing.

Workers have the latencies of the shipped profile times a factor. A factor below 1 stands for a faster machine as an
assumption: no GPU was measured, and a real one has another shape over the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest import arrivals
from loadtest.report import Figures, PolicyUsed, Setup, summarise
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.trace import Trace
from server.policy_file import default_policy

BUNDLE = Path("model_repository/vmoe-fashion-mnist")
OBJECTIVE = 0.99
PRECISION = 0.02  # of the rate
SEED = 501
REQUESTS = 40_000  # per run, within the durations below: enough that 1 % are hundreds
SHORTEST_S, LONGEST_S = 15.0, 60.0  # five and twenty periods of the bursts

Draw = Callable[[float, float, np.random.Generator], arrivals.Times]
TRACES: dict[str, Draw] = {"Poisson": arrivals.poisson, "bursts": arrivals.on_off}


@dataclass(frozen=True)
class Fleet:
    """Attributes:
    factor: a worker's time over the profile's.
    """

    workers: int
    factor: float = 1.0


FLEETS = (Fleet(1), Fleet(4), Fleet(16), Fleet(1, 0.1), Fleet(4, 0.1))


def run(subject: Subject, policy: str, fleet: Fleet, trace: Trace, slow_from_s: float = 0.0) -> Figures:
    """One simulation."""
    active = default_policy(subject.manifest, subject.ladder, policy)
    scheduler = subject.scheduler(active, workers=fleet.workers)
    machine = Machine(subject.latency(), slowdown=fleet.factor, slow_from_s=slow_from_s, seed=SEED)
    setup = Setup(
        kind="simulated",
        policy=PolicyUsed(name=policy, source=active.source),
        bundle=str(subject.directory),
        manifest_sha256=subject.manifest_sha256,
        trace="",
        trace_sha256="",
        workers=fleet.workers,
        max_batch_size=machine.latency.max_batch_size,
        slowdown=fleet.factor,
    )
    return summarise(trace, simulate(trace, scheduler, active, machine), subject.ladder, setup)


def held(subject: Subject, policy: str, fleet: Fleet, draw: Draw) -> tuple[float, Figures]:
    """The highest rate that meets the objective, and what it looks like there."""

    def figures_at(rate_hz: float) -> Figures:
        duration_s = min(max(REQUESTS / rate_hz, SHORTEST_S), LONGEST_S)
        return run(subject, policy, fleet, Trace.of(draw(rate_hz, duration_s, np.random.default_rng(SEED))))

    largest = subject.manifest.max_batch_size
    capacity_hz = fleet.workers * largest / subject.latency().uniform_s(subject.ladder.full, largest) / fleet.factor
    low, high = 0.0, 1.6 * capacity_hz  # even the cheapest points hold less than this
    best: Figures | None = None
    while best is None or high - low > PRECISION * high:
        rate_hz = (low + high) / 2
        figures = figures_at(rate_hz)
        if figures.slo_attainment is not None and figures.slo_attainment >= OBJECTIVE:
            low, best = rate_hz, figures
        else:
            high = rate_hz
    return low, best


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def main() -> None:
    subject = Subject.load(BUNDLE)
    print(
        "| workers | time over profile | arrivals | `fixed` at full: images/s | `foresight`: images/s | per worker ",
        end="",
    )
    print("| effective accuracy | refused | late | p99 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for fleet in FLEETS:
        for name, draw in TRACES.items():
            full_hz, _ = held(subject, "fixed", fleet, draw)
            rate_hz, at = held(subject, "foresight", fleet, draw)
            assert at.latency_s is not None
            cells = (
                str(fleet.workers),
                f"{fleet.factor:g}",
                name,
                f"{full_hz:,.0f}",
                f"{rate_hz:,.0f}",
                f"{rate_hz / fleet.workers:,.0f}",
                percent(at.effective_accuracy),
                percent(at.shed_ratio),
                percent(at.missed_ratio),
                f"{1000 * at.latency_s.p99:.0f} ms",
            )
            print("| " + " | ".join(cells) + " |", flush=True)
    print()
    print("| offered, of what one worker holds at full | in time | effective accuracy | refused | late |")
    print("|---|---|---|---|---|")
    full_hz, _ = held(subject, "fixed", Fleet(1), arrivals.poisson)
    for share in (0.3, 0.4, 0.5, 0.6):
        trace = Trace.of(arrivals.poisson(share * full_hz, 60.0, np.random.default_rng(SEED)))
        at = run(subject, "foresight", Fleet(1, 2.0), trace, slow_from_s=30.0)
        row = (f"{share:g}", *map(percent, (at.slo_attainment, at.effective_accuracy, at.shed_ratio, at.missed_ratio)))
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
