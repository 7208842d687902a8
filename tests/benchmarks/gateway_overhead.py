"""What the gateway's short cut past its web framework saves: `python -m tests.benchmarks.gateway_overhead`.

Two gateways that differ in this alone answer a closed loop of users in turns, at the cheapest point of the shipped
bundle; each has all cores but the last, the users the last one. Prints images per second and the gateway's processor
time per request, medians over the turns, and their ratios.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import server.app
from loadtest.images import Images
from loadtest.subject import Subject
from server.cli import main as serve
from tests.benchmarks import process_tree
from tests.benchmarks.live_gateway import BUNDLE, POLICIES, gateway, pin, put_policy, read_images, saturate

WAYS = ("short cut", "framework")


def turn(pid: int, url: str, images: Images) -> tuple[float, float]:
    """Images per second, and processor seconds of process `pid` per image."""
    before_s = process_tree.cpu_s(pid)
    rate_hz, answers = asyncio.run(saturate(url, images))
    return rate_hz, (process_tree.cpu_s(pid) - before_s) / answers


def main(turns: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """Measures both ways in one run."""
    pin()
    images = read_images(Subject.load(BUNDLE))
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        modules = {"short cut": ("server",), "framework": ("tests.benchmarks.gateway_overhead", "framework")}
        running = {way: stack.enter_context(gateway("fixed", *modules[way])) for way in WAYS}
        for url, _ in running.values():
            put_policy(url, POLICIES["fixed cheapest"])
        for _ in track(range(turns), "measuring"):
            for way, (url, pid) in running.items():
                found[way].append(turn(pid, url, images))
    table = Table("way", "images/s", "us of processor per image")
    medians = {way: np.median(values, axis=0) for way, values in found.items()}
    for way, (rate_hz, cpu_s) in medians.items():
        table.add_row(way, f"{rate_hz:.0f}", f"{1e6 * cpu_s:.0f}")
    ratio = medians["short cut"] / medians["framework"]
    table.add_row("ratio", f"{ratio[0]:.2f}", f"{ratio[1]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["framework"]:
        server.app.ShortCut = lambda app, classify: app  # type: ignore[misc,assignment]
        serve(sys.argv[2:])
    else:
        typer.run(main)
