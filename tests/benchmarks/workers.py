"""One gateway, two workers, or two workers in front of one engine process: `make bench-workers`.

    one process      `python -m server` with two threads per inference
    one thread       the same with one
    two workers      `--workers 2` with one thread each, engines of their own
    shared engine    `--workers 2` on the Triton server of `make serve-triton`, whose engine is one process, two threads

All at the full operating point of the shipped model, and all have all cores, which they share with the load generator:
that costs all of them throughput, and most the engines whose two threads wait for each other on their cores. They run
side by side, and whose turn it is not is idle. In every round each has (1) 16 and 32 users in a closed loop, for
throughput and processor time per answer, and (2) Poisson arrivals at 70 % of the least throughput of round 1, for
latency from the scheduled arrival. Writes workers.json and workers.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from loadtest.images import Images
from loadtest.subject import Subject
from tests.benchmarks import process_tree
from tests.benchmarks.gateway_peers import SHARE, USERS, Turn, png_and_jpeg, throughput, turn
from tests.benchmarks.live_gateway import (
    BUNDLE,
    CORES,
    OUT,
    POLICIES,
    free_port,
    machine,
    put_policy,
    read_images,
    serving,
)
from tests.benchmarks.peers.running import Server

ARRANGEMENTS: Mapping[str, Sequence[str]] = {
    "one process": ("server", "--threads", "2"),
    "one thread": ("server", "--threads", "1"),
    "two workers": ("server", "--workers", "2", "--threads", "1"),
    "shared engine": (
        *("tests.triton_server", str(BUNDLE), sys.executable, "-m", "server", "--workers", "2"),
        *("--backend", "triton", "--triton-urls", "GRPC_URL"),
    ),
}
_MIB = 1 << 20


@contextmanager
def running(name: str) -> Iterator[Server]:
    """One of `ARRANGEMENTS`, ready."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    arguments = (*ARRANGEMENTS[name], "--port", str(port), "--policy", "fixed", "--log-level", "warning")
    with serving(url, "/readyz", *arguments, cores=CORES) as pid:
        put_policy(url, POLICIES["fixed full"])
        yield Server(name, url, pid)


def measured(servers: Sequence[Server], images: Images, rounds: int) -> list[Turn]:
    """All rounds. Servers start each in another place."""
    turns: list[Turn] = []
    rate_hz = None
    for number in range(rounds):
        order = [*servers[number % len(servers) :], *servers[: number % len(servers)]]
        closed = {server.name: [asyncio.run(throughput(server, images, users)) for users in USERS] for server in order}
        rate_hz = rate_hz or SHARE * min(answers_hz for each in closed.values() for answers_hz, _ in each)
        turns += [asyncio.run(turn(server, images, rate_hz, closed[server.name], number)) for server in order]
    return turns


def markdown(turns: Sequence[Turn], memory_mib: Mapping[str, float], conditions: str) -> str:
    """Medians over the rounds, ratios to the first arrangement by round; latencies of all rounds together.

    Arguments:
        memory_mib: of all processes of an arrangement.
    """
    first = next(iter(memory_mib))
    users = tuple(turns[0].throughput_hz)
    head = [f"answers/s, {each} users" for each in users] + [f"over {first}, by round"]
    head += [f"processor ms per answer, {users[-1]}", "p50, ms", "p99, ms", "without an answer", "memory, MiB"]
    lines = [
        "# One gateway or several workers\n",
        f"{conditions}\n",
        f"| | {' | '.join(head)} |",
        "|---|" + "--:|" * len(head),
    ]
    by_name = {name: [each for each in turns if each.server == name] for name in memory_mib}
    for name, own in by_name.items():
        rates = {each: [turn.throughput_hz[each] for turn in own] for each in users}
        ratios = [
            mine / theirs.throughput_hz[users[-1]]
            for mine, theirs in zip(rates[users[-1]], by_name[first], strict=True)
        ]
        p50_ms, p99_ms = 1000 * np.quantile(np.concatenate([turn.latency_s for turn in own]), (0.5, 0.99))
        cells = [f"{np.median(rates[each]):.0f}" for each in users]
        cells += [", ".join(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{1000 * np.median([turn.cpu_s[users[-1]] for turn in own]):.2f}"]
        cells += [f"{p50_ms:.1f}", f"{p99_ms:.1f}", f"{sum(turn.failed for turn in own)}", f"{memory_mib[name]:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lag_ms = 1000 * max(turn.lag_p99_s for turn in turns)
    lines.append(
        f"\nRatios are of throughput with {users[-1]} users. p50 and p99 of latency at {turns[0].rate_hz:.0f} "
        f"requests/s, Poisson, {100 * SHARE:.0f} % of the least throughput of the first round, from the scheduled "
        f"arrival; requests without an answer were refused or late. The generator was late by {lag_ms:.1f} ms (p99) in "
        "the worst turn. Memory is resident, a shared page counting by its share (PSS), after the last round, of all "
        "processes.\n"
    )
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = OUT,
) -> None:
    """Compares the arrangements; about a minute per round."""
    images = png_and_jpeg(read_images(Subject.load(BUNDLE)))
    with ExitStack() as stack:
        servers = [stack.enter_context(running(name)) for name in ARRANGEMENTS]
        turns = measured(servers, images, rounds)
        memory_mib = {
            server.name: sum(process_tree.memory(pid).proportional for pid in process_tree.members(server.pid)) / _MIB
            for server in servers
        }
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "uvicorn", "prometheus-client"))
    conditions = (
        f"{date.today().isoformat()}, `python -m tests.benchmarks.workers --rounds {rounds}` on {machine()}, shared "
        f"with the load generator (load average at the end {os.getloadavg()[0]:.1f}); {versions}, Triton 2.51 with the "
        f"Python backend, `{BUNDLE.name}`, float32, full operating point."
    )
    text = markdown(turns, memory_mib, conditions)
    Console().print(text, markup=False, highlight=False)
    document = {"conditions": conditions, "memory_mib": memory_mib, "turns": [asdict(each) for each in turns]}
    (out / "workers.json").write_text(json.dumps(document) + "\n")
    (out / "workers.md").write_text(text)


if __name__ == "__main__":
    typer.run(main)
