"""Memory of gateways beside their weights: `python -m tests.benchmarks.memory`.

S/32 and B/16 with random weights are written as bundles. Processes open them with the gateway's engine, with and
without `packed_weights`, run every operating point alone and the full one in a batch, and say what they hold beyond
what they held before, with the engine imported. Writes memory.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from exporter.bundle import Bundle, Manifest, Provenance
from server.backends.base import Batch
from server.backends.ort import OrtBackend
from tests.benchmarks import process_tree
from tests.benchmarks.live_gateway import OUT, machine

MODELS = {"S/32": "vmoe_s32_last2_e8", "B/16": "vmoe_b16_every2_e8"}
BATCH_SIZE = 8
_MIB = 1 << 20


@dataclass(frozen=True)
class Held:
    """What a process holds for a bundle, in bytes, and the seconds until it was loaded."""

    load_s: float
    before: process_tree.Memory
    after: process_tree.Memory


def write_random_bundle(directory: Path, variant: str) -> int:
    """Bytes of its weights."""
    import onnx_ir as ir  # with torch, which the measured processes must not have
    import torch

    from exporter.graph import build_graph
    from exporter.profiling import default_points, make_points
    from exporter.repository import graph_bytes, write_bundle
    from exporter.triton_config import TritonOptions
    from vmoe.config import VARIANTS
    from vmoe.model import VisionTransformer
    from vmoe.preprocess import Preprocessing

    config = VARIANTS[variant]
    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in VisionTransformer(config).state_dict().items()}
    preprocessing = Preprocessing(config.image_size, config.channels, (0.5,) * 3, (0.5,) * 3)
    points = make_points(config, default_points(config))
    most = max(point.num_selected_experts for point in points)
    graph: ir.Model = build_graph(config, state, preprocessing, max_selected_experts=most)
    size_bytes = graph_bytes(graph)
    manifest = Manifest(
        name=variant,
        architecture=config,
        preprocessing=preprocessing,
        labels=tuple(map(str, range(config.num_classes))),
        input="uint8",
        weights="float32",
        max_selected_experts=most,
        max_batch_size=BATCH_SIZE,
        points=points,
        provenance=Provenance(checkpoint="random", checkpoint_sha256="", command="", date="", versions={}),
        files={},
    )
    write_bundle(directory, graph, lambda _: manifest, TritonOptions())
    return size_bytes


def hold(directory: Path, packed_weights: Path | None) -> None:
    """The measured process: loads, runs, says so, and waits for the end of its input."""
    before = process_tree.memory(os.getpid())
    start_s = time.perf_counter()
    bundle = Bundle.load(directory, verify=False)  # a hash over a gigabyte would drown the load
    backend = OrtBackend(bundle, 1, packed_weights)
    load_s = time.perf_counter() - start_s
    for size, points in ((1, bundle.manifest.points), (BATCH_SIZE, bundle.manifest.points[-1:])):
        preprocessing = bundle.manifest.preprocessing
        images = np.zeros((size, *preprocessing.image_size, preprocessing.channels), np.uint8)
        for point in points:
            slots = np.tile(np.array(point.slots, np.int64), (size, 1))
            selected = np.full((size, 1), point.num_selected_experts, np.int64)
            asyncio.run(backend.infer(Batch(images, slots, selected, explain=False)))
    print(json.dumps({"load_s": load_s, "before": vars(before)}), flush=True)
    sys.stdin.read()
    asyncio.run(backend.close())


@contextmanager
def holding(directory: Path, packed_weights: Path | None, processes: int) -> Iterator[list[Held]]:
    """So many processes at once, all loaded."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "hold", str(directory)]
    command += [] if packed_weights is None else ["--packed-weights", str(packed_weights)]
    started: list[subprocess.Popen[str]] = []
    try:
        said: list[tuple[int, dict[str, Any]]] = []
        for _ in range(processes):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            started.append(process)
            said.append((process.pid, json.loads(_line(process))))
        yield [
            Held(found["load_s"], process_tree.Memory(**found["before"]), process_tree.memory(pid))
            for pid, found in said
        ]
    finally:
        for process in started:
            process.communicate()  # the end of its input ends it


def row(name: str, weights_bytes: int, held: list[Held]) -> str:
    """Of the last process started; PSS of all together."""
    last = held[-1]
    total, private = last.after.total - last.before.total, last.after.private - last.before.private
    together = sum(each.after.proportional - each.before.proportional for each in held)
    cells = [f"{weights_bytes / _MIB:.0f}", f"{last.load_s:.1f}", f"{total / _MIB:.0f}", f"{total / weights_bytes:.2f}"]
    cells += [f"{private / _MIB:.0f}", f"{together / _MIB:.0f}", f"{together / weights_bytes:.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


def measured(name: str, variant: str, folder: Path) -> Iterator[str]:
    """The rows of one model."""
    directory, packed_weights = folder / variant, folder / "packed"
    # A process of its own: torch and the weights would stay in this one.
    command = [sys.executable, "-m", "tests.benchmarks.memory", "write", str(directory), variant]
    weights_bytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for processes in (1, 2):
        with holding(directory, None, processes) as held:
            yield row(f"{name}, packed in memory, {processes}", weights_bytes, held)
    with holding(directory, packed_weights, 1) as held:
        yield row(f"{name}, packed in files, the first start", weights_bytes, held)
    for processes in (1, 2):
        with holding(directory, packed_weights, processes) as held:
            yield row(f"{name}, packed in files, {processes}", weights_bytes, held)


commands = typer.Typer(add_completion=False)


@commands.command("write")
def _write(directory: Path, variant: str) -> None:
    print(write_random_bundle(directory, variant))


@commands.command("hold")
def _hold(directory: Path, packed_weights: Path | None = None) -> None:
    hold(directory, packed_weights)


@commands.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(help="S/32 or B/16; both by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = OUT,
) -> None:
    """Measures both models; needs 5 GB in the folder of temporary files, and as much memory."""
    if context.invoked_subcommand is not None:
        return
    lines = [
        "# Memory of gateways beside their weights\n",
        "| model, processes | weights | load, s | RSS | over weights | private | PSS of all | over weights |",
        "|---|" + "--:|" * 7,
    ]
    for name in model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for line in measured(name, MODELS[name], Path(folder)):
                print(line, flush=True)
                lines.append(line)
    lines.append(
        "\nMiB beyond a process that has imported the engine and loaded nothing, after every operating point alone and "
        f"the full one with {BATCH_SIZE} images. RSS and private pages are of the process started last, PSS of all. "
        f"{date.today().isoformat()}, `python -m tests.benchmarks.memory` on {machine()}; onnxruntime "
        f"{version('onnxruntime')}, float32, one thread, random weights.\n"
    )
    (out / "memory.md").write_text("\n".join(lines))


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None, "it was asked for"
    return process.stdout.readline()


if __name__ == "__main__":
    commands()
