"""Our gateway against other servers of the same graph: `make bench-gateway`.

    ours       `python -m server --policy fixed`, pinned to the full operating point
    litserve   at the best of several batch timeouts, tried before; batches as large as ours
    fastapi    FastAPI, a thread pool, one session, no batches
    inference  the session alone in one thread, in batches of 16, 8 and 1: what no server can save

Each has one thread per run of ONNX Runtime, and all cores but the last, which the load generator has. Images of
Fashion-MNIST, PNG and JPEG in turn, are sent as raw bodies on connections that stay open. In every round each server
has (1) users in a closed loop, 16 and 32, for throughput and processor time per answer, and (2) Poisson arrivals at
70 % of the least throughput of round 1, for latency from the scheduled arrival. Whose turn it is not is stopped, since
LitServe polls its queue. Writes gateway_peers.json, .md and .png.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from loadtest.client import connect
from loadtest.generator import Plan, offer
from loadtest.images import Images
from loadtest.outcomes import Outcome
from loadtest.schedule import Kind, draw
from loadtest.subject import Subject
from tests.benchmarks import gateway_peer_figures as figures
from tests.benchmarks import process_tree
from tests.benchmarks.live_gateway import (
    BUNDLE,
    CORES,
    OUT,
    TERMS,
    TIMEOUT_S,
    closed_loop,
    machine,
    pin,
    read_images,
)
from tests.benchmarks.peers.classifier import Classifier
from tests.benchmarks.peers.running import Server, alone, ours, peer, target_of

# With 16, half of them wait while the other half is in a batch; with 32 there is a full batch of 16 for everybody.
USERS = (16, 32)
CLOSED_S, OPEN_S, SHARE = 2.0, 6.0, 0.7
BATCH_TIMEOUTS_MS = (1.0, 2.0, 5.0)  # LitServe's default, 0, polls without a pause
INFERENCE_BATCHES = (16, 8, 1)


@dataclass(frozen=True)
class Turn:
    """One server's share of a round.

    Attributes:
        throughput_hz, cpu_s: answers per second, and processor time of each, by number of users in a closed loop.
        rate_hz: offered in the open loop.
        latency_s: of its answers.
        failed: requests without an answer.
        lag_p99_s: of the generator.
    """

    server: str
    throughput_hz: dict[int, float]
    cpu_s: dict[int, float]
    rate_hz: float
    latency_s: list[float]
    failed: int
    lag_p99_s: float


async def throughput(server: Server, images: Images, users: int) -> tuple[float, float]:
    """Answers per second, and processor seconds of the server for each."""
    before_s = process_tree.cpu_s(server.pid)
    async with connect(server.url, TIMEOUT_S, target_of(server)) as client:
        rate_hz, answers = await closed_loop(client, images, users, CLOSED_S)
    if not answers:
        raise SystemExit(f"{server.name} answered nothing")
    return rate_hz, (process_tree.cpu_s(server.pid) - before_s) / answers


async def turn(
    server: Server, images: Images, rate_hz: float, closed: Sequence[tuple[float, float]], seed: int
) -> Turn:
    """The open loop; `closed` is from `throughput`, of each number of users."""
    trace = draw(Kind.poisson, rate_hz, TERMS.warmup_s + OPEN_S, seed=seed)
    async with connect(server.url, TIMEOUT_S, target_of(server)) as client:
        record = await offer(client, Plan(trace, "poisson", TERMS, seed), images)
    counted = record.due_s >= TERMS.warmup_s
    answered = counted & np.isin(record.outcomes.outcome, (Outcome.met, Outcome.late))
    lag_s = (record.sent_s - record.due_s)[counted]
    return Turn(
        server.name,
        {users: answers_hz for users, (answers_hz, _) in zip(USERS, closed, strict=True)},
        {users: cpu_s for users, (_, cpu_s) in zip(USERS, closed, strict=True)},
        rate_hz,
        record.outcomes.latency_s[answered].tolist(),
        int(counted.sum() - answered.sum()),
        float(np.quantile(lag_s, 0.99)),
    )


def measured(servers: Sequence[Server], images: Images, rounds: int) -> list[Turn]:
    """All rounds. Servers start each in another place."""
    turns: list[Turn] = []
    rate_hz = None
    for number in range(rounds):
        order = [*servers[number % len(servers) :], *servers[: number % len(servers)]]
        closed = {}
        for server in order:
            with alone(server, servers):
                closed[server.name] = [asyncio.run(throughput(server, images, users)) for users in USERS]
        rate_hz = rate_hz or SHARE * min(answers_hz for each in closed.values() for answers_hz, _ in each)
        for server in order:
            with alone(server, servers):
                turns.append(asyncio.run(turn(server, images, rate_hz, closed[server.name], number)))
    return turns


def inference_cpu_s(images: Images, duration_s: float = 1.0) -> dict[int, float]:
    """Processor seconds per image of the session alone, by batch size, where the servers run."""
    classifier = Classifier()
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES[:-1])
    found = {}
    try:
        for size in INFERENCE_BATCHES:
            batch = np.stack([classifier.decode(body) for body in images.bodies[:size]])
            classifier.infer(batch)
            runs, start_s = 0, time.thread_time()
            while time.thread_time() < start_s + duration_s:
                classifier.infer(batch)
                runs += 1
            found[size] = (time.thread_time() - start_s) / (runs * size)
    finally:
        os.sched_setaffinity(0, own)
    return found


def rate_by_batch_timeout_ms(images: Images) -> dict[float, float]:
    """LitServe's throughput by batch timeout."""
    found = {}
    for timeout_ms in BATCH_TIMEOUTS_MS:
        with peer("litserve", f"{timeout_ms:g}") as server:
            found[timeout_ms], _ = asyncio.run(throughput(server, images, USERS[0]))
    return found


def png_and_jpeg(images: Images) -> Images:
    """Every second one as JPEG, of Pillow's default quality."""
    bodies, media_types = list(images.bodies), list(images.media_types)
    for index in range(1, len(bodies), 2):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(bodies[index])).save(buffer, "JPEG")
        bodies[index], media_types[index] = buffer.getvalue(), "image/jpeg"
    return Images(bodies, media_types, images.names, images.labels)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    against: Annotated[Path | None, typer.Option(help="Another checkout, measured in place of the peers.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of one inference; only with --against.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = OUT,
) -> None:
    """Compares the servers; took two minutes and a half."""
    if threads > 1 and against is None:
        raise typer.BadParameter("--threads needs --against: the peers have one")
    pin()
    images = png_and_jpeg(read_images(Subject.load(BUNDLE)))
    tried = rate_by_batch_timeout_ms(images) if against is None else {}
    with ExitStack() as stack:
        starting = [ours("ours", threads=threads)]
        if against is None:
            starting += [peer("litserve", f"{max(tried, key=lambda each: tried[each]):g}"), peer("fastapi")]
        else:
            starting += [ours(str(against), against.resolve(), threads)]
        turns = measured([stack.enter_context(each) for each in starting], images, rounds)
    inference_s = inference_cpu_s(images)
    packages = ("onnxruntime", "uvicorn", "fastapi") + (("litserve",) if against is None else ())
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    conditions = (
        f"{date.today().isoformat()}, `python -m tests.benchmarks.gateway_peers --rounds {rounds} --threads {threads}` "
        f"on {machine()} (load average at the end {os.getloadavg()[0]:.1f}); {versions}, `{BUNDLE.name}`, float32."
    )
    text = figures.markdown(turns, inference_s, tried, conditions)
    Console().print(text, markup=False, highlight=False)
    if against is None:
        document = {"conditions": conditions, "inference_cpu_s": inference_s, "litserve_batch_timeout_ms": tried}
        document["turns"] = [asdict(each) for each in turns]
        (out / "gateway_peers.json").write_text(json.dumps(document) + "\n")
        (out / "gateway_peers.md").write_text(text)
        figures.plot(turns, inference_s, out / "gateway_peers.png")


if __name__ == "__main__":
    typer.run(main)
