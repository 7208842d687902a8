"""Confirms the simulated ranking of policies on a live gateway: `python -m tests.benchmarks.live_policies`.

    calibrate   closed loop at the full and at the cheapest point: images/s of gateway and generator on this machine
    simulate    the same traces, on the profile slowed down to the calibrated capacity
    run live    a gateway process per policy, trace and repetition, in an order that turns with the repetition

A pair of policies is decided where the mean of its paired differences in effective accuracy (one per repetition, same
seed) is larger than their spread, largest less smallest; other pairs are ties. The ranking agrees where no pair is
decided one way live and the other way in simulation. Writes live_policies.json and live_policies.md.

The generator keeps the last core of the machine to itself and the gateway has the others, so that neither holds up the
other; both compete for whatever else runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest import arrivals
from loadtest.client import Answered, Client, connect
from loadtest.generator import Plan, measure
from loadtest.images import SAMPLE, Images, load_images
from loadtest.live_results import Terms
from loadtest.report import PolicyUsed, Report, Setup, summarise
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from loadtest.trace import Trace
from server.policy_file import ActivePolicy, parse_policy
from vmoe.data import FASHION_MNIST_DIRECTORY

BUNDLE = Path("model_repository/vmoe-fashion-mnist")
OUT = Path("docs/bench")
FIRST_SEED = 301
MAX_BATCH_SIZE = 16  # the gateway's default
# Chosen, not tuned. The default deadline of 100 ms suits the profiled machine; gateway, generator and others on two
# cores are several times slower. The grace is for HTTP there and back, which the gateway's deadline and the simulator
# leave out.
DEADLINE_MS, GRACE_S = 300.0, 0.05
WARMUP_S, TIMEOUT_S = 3.0, 5.0
CORES = sorted(os.sched_getaffinity(0))  # Linux
USERS, CALIBRATION_S, CALIBRATION_ROUNDS = 32, 3.0, 3

_BUDGET = "[budgets.auto]\ndeadline_ms = {deadline_ms}\n"
_FIXED = 'policy = "fixed"\n' + _BUDGET + 'floor = "{point}"\nceiling = "{point}"\n'
POLICIES = {
    name: f'policy = "{name}"\n{_BUDGET.format(deadline_ms=DEADLINE_MS)}' for name in ("foresight", "slackfit", "aimd")
} | {f"fixed {point}": _FIXED.format(deadline_ms=DEADLINE_MS, point=point) for point in ("full", "cheapest")}
TRACES = ("on-off 1:5", "Poisson 1.2x")


@dataclass(frozen=True)
class Result:
    """One policy on one trace with one seed; ratios, and seconds by name."""

    kind: str
    trace: str
    seed: int
    policy: str
    effective_accuracy: float
    slo_attainment: float
    shed_ratio: float
    missed_ratio: float
    mean_accuracy: float | None
    p99_s: float | None
    gateway_slo_attainment: float | None = None
    live_effective_accuracy: float | None = None
    send_lag_p99_s: float | None = None
    client_cpu_s: float | None = None
    failures: int = 0
    valid: bool = True


def draw(name: str, capacity_hz: float, duration_s: float, seed: int) -> Trace:
    """One of `TRACES`, of the same loads as those of `policy_traces`."""
    generator = np.random.default_rng([seed, TRACES.index(name)])
    if name == "on-off 1:5":
        return Trace.of(arrivals.on_off(2 / 3 * capacity_hz, duration_s, generator))
    return Trace.of(arrivals.poisson(1.2 * capacity_hz, duration_s, generator))


@contextmanager
def gateway(policy: Path, *module: str) -> Iterator[tuple[str, int]]:
    """URL and process id of `python -m server`, or of another module that takes its options, ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    arguments = ("--port", str(port), "--threads", "1", "--policy", str(policy), "--log-level", "warning")
    # Set before Python starts: a thread keeps the affinity that it was started with.
    cores = ",".join(map(str, CORES[:-1]))
    process = subprocess.Popen(
        ["taskset", "--cpu-list", cores, sys.executable, "-m", *(module or ("server",)), *arguments]
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + 60
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit("the gateway did not get ready")
            time.sleep(0.1)
        yield url, process.pid  # taskset has become the server
    finally:
        process.terminate()
        process.wait(timeout=60)


async def saturate(url: str, images: Images) -> tuple[float, int]:
    """Answers per second to `USERS` who each send the next image when they have the last answer; and all answers."""
    answers = total = 0

    async def user(client: Client, number: int, end_s: float) -> None:
        nonlocal answers, total
        address = client.address("auto", 1000 * TIMEOUT_S)
        for place in itertools.count(number, USERS):
            if time.monotonic() >= end_s:
                return
            image = place % len(images)
            headers = {"Content-Type": images.media_types[image]}
            reply = await client.classify(address, images.bodies[image], headers)
            answers += isinstance(reply, Answered)  # after the wait: others count too
            total += isinstance(reply, Answered)

    async with connect(url, TIMEOUT_S) as client:
        for seconds in (1.0, CALIBRATION_S):  # the first is warm-up
            answers, start_s = 0, time.monotonic()
            await asyncio.gather(*(user(client, number, start_s + seconds) for number in range(USERS)))
            rate_hz = answers / (time.monotonic() - start_s)
    return rate_hz, total


def calibrate(files: Mapping[str, Path], images: Images) -> dict[str, float]:
    """Images per second at the full and at the cheapest point: medians of turns, for the load of others changes."""
    found: dict[str, list[float]] = {"fixed full": [], "fixed cheapest": []}
    with gateway(files["fixed full"]) as (full, _), gateway(files["fixed cheapest"]) as (cheapest, _):
        for _ in range(CALIBRATION_ROUNDS):
            for name, url in (("fixed full", full), ("fixed cheapest", cheapest)):
                found[name].append(asyncio.run(saturate(url, images))[0])
    return {name: float(np.median(rates_hz)) for name, rates_hz in found.items()}


def run_live(url: str, trace: Trace, seed: int, images: Images) -> Report:
    plan = Plan(trace, "trace", Terms(WARMUP_S, TIMEOUT_S, GRACE_S), seed)
    return asyncio.run(measure(url, plan, lambda labels: images, lambda recorder: None))


def run_simulated(subject: Subject, active: ActivePolicy, trace: Trace, seed: int, slowdown: float) -> Report:
    """With the warm-up cut, as live."""
    machine = Machine(subject.latency(MAX_BATCH_SIZE), slowdown=slowdown, seed=seed)
    outcomes = simulate(trace, subject.scheduler(active, max_batch_size=MAX_BATCH_SIZE), active, machine)
    keep = slice(int(np.searchsorted(trace.arrival_s, WARMUP_S)), len(trace))
    setup = Setup(
        kind="simulated",
        policy=PolicyUsed(name=active.config.policy, source=active.source),
        bundle=str(subject.directory),
        manifest_sha256=subject.manifest_sha256,
        trace="trace",
        trace_sha256=trace.sha256,
        workers=1,
        max_batch_size=MAX_BATCH_SIZE,
        slowdown=slowdown,
    )
    return summarise(trace.part(keep, WARMUP_S), outcomes.part(keep), subject.ladder, setup)


def result(report: Report, trace: str, seed: int, policy: str) -> Result:
    assert report.effective_accuracy is not None
    assert report.slo_attainment is not None
    assert report.shed_ratio is not None
    assert report.missed_ratio is not None
    ratios = (report.effective_accuracy, report.slo_attainment, report.shed_ratio, report.missed_ratio)
    found = Result(report.setup.kind, trace, seed, policy, *ratios, report.mean_accuracy, report.latency_s.p99)
    if (live := report.live) is None:
        return found
    return Result(
        **asdict(found)
        | {
            "gateway_slo_attainment": live.gateway_slo_attainment,
            "live_effective_accuracy": live.effective_accuracy,
            "send_lag_p99_s": live.send_lag_s.p99,
            "client_cpu_s": live.client_cpu_s,
            "failures": sum(live.failures.values()),
            "valid": live.valid,
        }
    )


def decided(results: Sequence[Result], kind: str, trace: str, first: str, second: str) -> float | None:
    """Mean lead of the first in effective accuracy where it exceeds the spread over the repetitions; None for a tie."""
    here = {
        (each.policy, each.seed): each.effective_accuracy
        for each in results
        if each.kind == kind and each.trace == trace
    }
    gaps = [here[first, seed] - here[second, seed] for policy, seed in here if policy == first]
    mean = float(np.mean(gaps))
    return mean if abs(mean) > max(gaps) - min(gaps) else None


def markdown(results: Sequence[Result]) -> str:
    parts = []
    for trace in dict.fromkeys(each.trace for each in results):
        parts.append(
            f"### {trace}\n\nLive / simulated, means over the repetitions. A star marks a live run that was not valid."
            "\n\n"
            "| policy | effective % | in time % | shed % | missed % | accuracy % | p99 ms | right and in time % "
            "| in time by the gateway % | effective %, live runs |\n| --- " + "| --: " * 9 + "|\n"
        )
        policies = list(dict.fromkeys(each.policy for each in results if each.trace == trace))

        def mean(kind: str, policy: str, figure: str, scale: float = 100.0, at: str = trace) -> str:
            here = [each for each in results if (each.kind, each.trace, each.policy) == (kind, at, policy)]
            known = [value for each in here if (value := getattr(each, figure)) is not None]
            return f"{scale * np.mean(known):.1f}" if known else "-"

        for policy in policies:
            figures = ("effective_accuracy", "slo_attainment", "shed_ratio", "missed_ratio", "mean_accuracy")
            cells = [f"{mean('live', policy, name)} / {mean('simulated', policy, name)}" for name in figures]
            cells.append(f"{mean('live', policy, 'p99_s', 1000)} / {mean('simulated', policy, 'p99_s', 1000)}")
            cells += [mean("live", policy, name) for name in ("live_effective_accuracy", "gateway_slo_attainment")]
            runs = [each for each in results if (each.kind, each.trace, each.policy) == ("live", trace, policy)]
            # A star where the generator itself was held up.
            cells.append(", ".join(f"{100 * each.effective_accuracy:.1f}{'' if each.valid else '*'}" for each in runs))
            parts.append(f"| {policy} | {' | '.join(cells)} |\n")
        same, opposite, ties = 0, [], []
        for first, second in itertools.combinations(policies, 2):
            live, simulated = (decided(results, kind, trace, first, second) for kind in ("live", "simulated"))
            if live is None or simulated is None:
                where = [kind for kind, lead in (("live", live), ("simulated", simulated)) if lead is None]
                ties.append(f"{first} and {second} ({' and '.join(where)})")
            elif (live > 0) == (simulated > 0):
                same += 1
            else:
                opposite.append(
                    f"{first} over {second} by {100 * live:+.1f} points live, {100 * simulated:+.1f} simulated"
                )
        parts.append(
            f"\nPairs in the same order: {same}. In the opposite order: {'; '.join(opposite) or 'none'}. "
            f"Ties within the spread: {'; '.join(ties) or 'none'}.\n\n"
        )
    return "".join(parts)


def main(
    out: Annotated[Path, typer.Option(help="Directory for json and md.")] = OUT,
    repetitions: Annotated[int, typer.Option(min=2)] = 2,
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds counted, per run.")] = 20.0,
    first_seed: Annotated[int, typer.Option(min=0)] = FIRST_SEED,
) -> None:
    """Runs policies live and simulated over the same traces."""
    if len(CORES) < 2:
        raise SystemExit("gateway and generator need a core each; this process may use one")
    os.sched_setaffinity(0, CORES[-1:])
    subject = Subject.load(BUNDLE)
    data = FASHION_MNIST_DIRECTORY
    images = load_images(data if data.is_dir() else SAMPLE, subject.manifest.labels)
    actives = {name: parse_policy(text, subject.manifest, subject.ladder, name) for name, text in POLICIES.items()}
    seeds = range(first_seed, first_seed + repetitions)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name.replace(' ', '-')}.toml" for name in POLICIES}
        for name, file in files.items():
            file.write_text(POLICIES[name])
        rates_hz = calibrate(files, images)
        capacity_hz = rates_hz["fixed full"]
        latency = subject.latency(MAX_BATCH_SIZE)
        profiled = {
            name: MAX_BATCH_SIZE / latency.uniform_s(rung, MAX_BATCH_SIZE)
            for name, rung in (("fixed full", subject.ladder.full), ("fixed cheapest", subject.ladder.frontier[0]))
        }
        slowdown = profiled["fixed full"] / capacity_hz
        print(f"live {rates_hz}, profiled {profiled}, slowdown {slowdown:.2f}", flush=True)
        columns = (
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
        )
        with Progress(*columns) as progress:
            bar = progress.add_task("running", total=len(seeds) * len(TRACES) * len(POLICIES), now="")
            for turn, seed in enumerate(seeds):
                order = list(POLICIES)[turn:] + list(POLICIES)[:turn]
                for trace_name, name in itertools.product(TRACES, order):
                    progress.update(bar, now=f"{trace_name}, {name}")
                    trace = draw(trace_name, capacity_hz, WARMUP_S + duration_s, seed)
                    with gateway(files[name]) as (url, _):
                        results.append(result(run_live(url, trace, seed, images), trace_name, seed, name))
                    simulated = run_simulated(subject, actives[name], trace, seed, slowdown)
                    results.append(result(simulated, trace_name, seed, name))
                    progress.update(bar, advance=1)
    live = [each for each in results if each.kind == "live"]
    command = f"python -m tests.benchmarks.live_policies --repetitions {repetitions} --duration {duration_s:g}"
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    lag_ms = [1000 * (each.send_lag_p99_s or 0) for each in live]
    header = (
        f"# Policies, live and simulated\n\n{date.today().isoformat()}, `{command}` on {machine}, which other "
        f"processes shared (load average at the end {os.getloadavg()[0]:.1f}); Python {platform.python_version()}, "
        f"float32, `{BUNDLE.name}`, batches of up to {MAX_BATCH_SIZE}, `--threads 1`, deadline {DEADLINE_MS:g} ms, "
        f"grace {1000 * GRACE_S:g} ms (live), {WARMUP_S:g} s warm-up cut, {duration_s:g} s counted, {repetitions} "
        "repetitions. The generator had a core to itself, the gateway the others.\n\n"
        f"Closed loop, {USERS} users, medians of {CALIBRATION_ROUNDS} turns: "
        f"{rates_hz['fixed full']:.0f} images/s at the full point, "
        f"{rates_hz['fixed cheapest']:.0f} at the cheapest; by the profile {profiled['fixed full']:.0f} and "
        f"{profiled['fixed cheapest']:.0f}. Loads are multiples of the first; the simulated machine is "
        f"{slowdown:.2f} times slower than the profile.\n\n"
        f"Of {len(live)} live runs {sum(each.valid for each in live)} were valid by the generator's own criteria; p99 "
        f"of its send lag was {min(lag_ms):.1f} to {max(lag_ms):.1f} ms, its processor time "
        f"{1e6 * np.mean([each.client_cpu_s or 0 for each in live]):.0f} us per request; "
        f"{sum(each.failures for each in live)} requests failed.\n\n"
    )
    document = {
        "command": command,
        "machine": machine,
        "date": date.today().isoformat(),
        "live_hz": rates_hz,
        "profiled_hz": profiled,
        "slowdown": slowdown,
        "results": [asdict(each) for each in results],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "live_policies.json").write_text(json.dumps(document, indent=1) + "\n")
    text = header + markdown(results)
    (out / "live_policies.md").write_text(text)
    print(text)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    typer.run(main)
