"""What the load generator itself can send: `python -m tests.benchmarks.generator_rate`.

Against a server that answers every upload with the same bytes at once, the highest rate at which a run is valid is
searched, as `loadtest run --find-max` does, with one and with two processes. Poisson arrivals; the sample image; server
and generator share the machine, on loopback. No gateway is in it: nothing here says what one can do. Writes
generator_rate.md.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, cast

import typer
import uvloop
from rich.console import Console

from loadtest.environment import Environment
from loadtest.live_results import Terms
from loadtest.live_session import Session
from loadtest.report import Report
from loadtest.schedule import Kind, draw
from loadtest.search import Objective
from loadtest.tables import print_report
from loadtest.trace import Trace
from tests.loadtest.stalling_server import ANSWER, DESCRIPTIONS, http_reply

OUT = Path("docs/bench/generator_rate.md")
_REPLY = http_reply(b"200 OK", ANSWER)


class _Canned(asyncio.Protocol):
    """Counts the bytes of an upload and answers; looks at nothing else."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._missing = cast(asyncio.Transport, transport), 0  # uvloop's has another base

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        elif data.startswith(b"GET"):
            self._transport.write(http_reply(b"200 OK", DESCRIPTIONS[data.split(b" ", 2)[1]]))
            return
        else:  # a head is small and comes in one piece on loopback
            head, _, body = data.partition(b"\r\n\r\n")
            length = head[head.index(b"Content-Length:") :].split(b"\r\n", 1)[0].split(b":")[1]
            self._missing = int(length) - len(body)
        if not self._missing:
            self._transport.write(_REPLY)


def _serve(pipe: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(_Canned, "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


@contextmanager
def canned_server() -> Iterator[str]:
    """The URL of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that a server that does not start is noticed
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def measured(processes: int, start_hz: float, trial_s: float, console: Console) -> Report:
    """The search; its last run is at the rate found."""
    terms = Terms(warmup_s=1.0, timeout_s=10.0, grace_s=0.0)

    def poisson(rate_hz: float, total_s: float, seed: int) -> tuple[str, Trace]:
        return f"poisson, {rate_hz:g}/s, seed {seed}", draw(Kind.poisson, rate_hz, total_s, seed=seed)

    with canned_server() as url:
        session = Session(url, None, terms, 0, console, processes)
        # The deadline of the canned gateway. A generator that cannot keep up misses it, or its own limit of lag.
        return session.find_max(start_hz, trial_s, Objective(p99_s=0.1, max_shed=0.0), poisson)


def main(
    out: Annotated[Path, typer.Option(help="Markdown to write.")] = OUT,
    start_hz: Annotated[float, typer.Option("--rate", help="First rate.")] = 400.0,
    trial_s: Annotated[float, typer.Option("--duration", help="Seconds of a trial.")] = 10.0,
) -> None:
    """Searches with one and with two processes."""
    console = Console()
    environment = Environment.here()
    rows = []
    for processes in (1, 2):
        report = measured(processes, start_hz, trial_s, console)
        print_report(report, console)
        assert report.search is not None
        assert report.live is not None
        rate = "none" if report.search.rate_hz is None else f"{report.search.rate_hz:,.0f}"
        lag_s, cpu_us = report.live.send_lag_s.p99 or 0.0, 1e6 * report.live.client_cpu_s
        rows.append(f"| {processes} | {rate} | {1000 * lag_s:.1f} | {cpu_us:.0f} |")
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    machine = f"{environment.cpu}, {environment.cores} cores, Python {environment.python}"
    out.write_text(
        "# What the load generator itself can send\n\n"
        "The highest rate of Poisson arrivals at which a run is valid, against a server that answers every upload\n"
        "with the same bytes; generator and server share the machine. Lag and processor time are of the last run.\n\n"
        "| processes | requests/s | sent late, p99 in ms | processor time per request, us |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{machine}, {versions},\n{date.today()}, "
        f"`python -m tests.benchmarks.generator_rate --rate {start_hz:g} --duration {trial_s:g}`.\n"
    )


if __name__ == "__main__":
    typer.run(main)
