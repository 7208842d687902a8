"""`python -m loadtest.demo`: what adaptive compute is worth, on this machine, in two minutes.

Starts the gateway with the shipped model three times in turn: with its default policy, fixed at the full operating
point, and fixed at the cheapest. Each is offered the same trace, whose bursts are more than the full point holds: how
much that is comes from a short closed loop at the full point beforehand. Leaves the three reports and their comparison
as a page.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from rich.console import Console

from loadtest.arrivals import on_off
from loadtest.compare import compare
from loadtest.errors import LoadtestError, TargetError
from loadtest.html import write_page
from loadtest.live_results import Terms
from loadtest.live_session import Session
from loadtest.runs import Run
from loadtest.schedule import Mix
from loadtest.tables import print_comparison, print_report
from loadtest.trace import Trace, read_trace, write_trace
from vmoe.console import open_console

_FIXED: Final = 'policy = "fixed"\n\n[budgets.auto]\nfloor = "{point}"\nceiling = "{point}"\n'
# The first is what the others are held against. Empty: as the gateway chooses.
_POLICIES: Final[Mapping[str, str]] = {
    "default": "",
    "fixed full": _FIXED.format(point="full"),
    "fixed cheapest": _FIXED.format(point="cheapest"),
}
# All chosen, not tuned. Half of what the full point holds, and every ten seconds a burst of three at 1.25 times that:
# at best the cheapest point holds 1 / 0.73 times as much, by its share of the compute.
_CALM, _BURST, _CALM_S, _BURST_S = 0.5, 1.25, 7.0, 3.0
_USERS: Final = 16  # keep batches large and wait less than a time-out
_TIMEOUT_S: Final = 10.0
_WARMUP_S: Final = 2.0
_START_LIMIT_S: Final = 60.0


@contextmanager
def gateway(policy: Path | None, model_repository: Path) -> Iterator[str]:
    """The URL of a gateway in a process of its own, ready.

    Where there are several cores, one is left for the generator: one that waits for its turn sends late, and its run is
    not valid.

    Raises:
        TargetError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # Linux
    threads = max((len(cores) or os.cpu_count() or 1) - 1, 1)
    command = [sys.executable, "-m", "server", "--port", str(port), "--threads", str(threads), "--log-level", "warning"]
    command += ["--model-repository", str(model_repository)] + ([] if policy is None else ["--policy", str(policy)])
    process = subprocess.Popen(command)
    if len(cores) > 1:
        os.sched_setaffinity(process.pid, cores[:-1])  # at once: threads started later inherit it
    url = f"http://127.0.0.1:{port}"
    try:
        end_s = time.monotonic() + _START_LIMIT_S
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > end_s:
                raise TargetError(f"the gateway did not get ready within {_START_LIMIT_S:g} s: {' '.join(command)}")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


def bursts(capacity_hz: float, duration_s: float, seed: int) -> Trace:
    """Calm and bursts in turn, relative to what the full point holds."""
    period_s = _CALM_S + _BURST_S
    mean = (_CALM_S * _CALM + _BURST_S * _BURST) / period_s
    # The mean of a part of the trace depends on where it ends, that of whole periods does not.
    whole_s = -(-duration_s // period_s) * period_s
    arrival_s = on_off(
        mean * capacity_hz,
        whole_s,
        np.random.default_rng(seed),
        on_s=_BURST_S,
        off_s=_CALM_S,
        factor=_BURST / _CALM,
    )
    return Trace.of(arrival_s[arrival_s < duration_s])


def demonstrate(
    out: Path,
    *,
    model_repository: Path,
    images: Path | None,
    duration_s: float,
    calibration_s: float,
    seed: int,
    console: Console,
) -> Path:
    """Runs everything; the page.

    Arguments:
        images: as for `run`.

    Raises:
        LoadtestError: a gateway does not start, or nothing can be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {name: _policy_file(out, name, text) for name, text in _POLICIES.items()}
    terms = Terms(_WARMUP_S, _TIMEOUT_S, 0.0, 99.0)
    with gateway(files["fixed full"], model_repository) as url:
        patient = Mix.parse((), (f"{1000 * _TIMEOUT_S:g}",))  # nobody is refused
        session = Session(url, images, Terms(1.0, _TIMEOUT_S, 0.0, 99.0), seed, Console(stderr=True))
        calibration = session.run_closed(_USERS, calibration_s, patient)
    capacity_hz = calibration.answered / calibration_s
    console.print(f"the full point holds {capacity_hz:,.0f} requests/s here; bursts ask for {_BURST:g} times as many")
    write_trace(out / "trace.csv", bursts(capacity_hz, _WARMUP_S + duration_s, seed))
    trace = read_trace(out / "trace.csv")  # to the nanosecond, so that who replays the file offers the same
    name = f"bursts of {_BURST:g} times the {capacity_hz:,.0f}/s of the full point, seed {seed}"
    runs = []
    for policy, file in files.items():
        with gateway(file, model_repository) as url:
            report = Session(url, images, terms, seed, Console(stderr=True)).run(trace, name)
        console.rule(policy)
        print_report(report, console)
        (out / f"{policy.replace(' ', '-')}.json").write_text(report.model_dump_json(indent=2) + "\n")
        runs.append(Run(policy, report))
    comparisons = [compare(runs[0], other, seed=seed) for other in runs[1:]]
    for comparison in comparisons:
        print_comparison(comparison, console)
    page = out / "index.html"
    write_page(page, runs, comparisons)
    return page


def _policy_file(out: Path, name: str, text: str) -> Path | None:
    if not text:
        return None
    path = out / f"{name.replace(' ', '-')}.toml"
    path.write_text(text)
    return path


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz") as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def main(
    out: Annotated[Path, typer.Option(help="Directory of the page and the reports.")] = Path("runs/loadtest-demo"),
    model_repository: Annotated[Path, typer.Option(help="Of the shipped model.")] = Path("model_repository"),
    images: Annotated[Path | None, typer.Option(help="As for `loadtest run`.")] = None,
    duration_s: Annotated[float, typer.Option("--duration", min=1, help="Seconds, of each run.")] = 30.0,
    calibration_s: Annotated[float, typer.Option("--calibration", min=0.5, help="Seconds.")] = 4.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Offers the same bursts to three policies, and compares them."""
    console = open_console()
    try:
        page = demonstrate(
            out,
            model_repository=model_repository,
            images=images,
            duration_s=duration_s,
            calibration_s=calibration_s,
            seed=seed,
            console=console,
        )
    except (LoadtestError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    console.print(f"{page.resolve().as_uri()}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
