"""Memory of a Triton server's instances: `python -m tests.benchmarks.triton_memory`.

S/32 with random weights behind the Python backend of a real server, with and without `packed_weights`. Every instance
is a process of its own; the figures are of these, when the warm-up has run every operating point in batches of up to 8.
Instances of the shipped model, whose weights are few, show what they hold beside weights. Writes triton_memory.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from exporter.bundle import Bundle
from exporter.triton_config import TritonOptions
from tests.benchmarks.live_gateway import BUNDLE, OUT, machine
from tests.benchmarks.memory import MODELS
from tests.benchmarks.process_tree import Memory, memory
from tests.triton_server import TritonServer, python_repository

_MIB = 1 << 20


def held(bundle: Path, instances: int, packed_weights: Path | None) -> list[Memory]:
    """Of every instance of a server that has warmed up."""
    packed = None if packed_weights is None else PurePosixPath(packed_weights)
    options = TritonOptions("python", threads=1, instances=instances, packed_weights=packed)
    with (
        tempfile.TemporaryDirectory() as repository,
        TritonServer(python_repository(bundle, Path(repository), options)) as server,
    ):
        return [memory(pid) for pid in server.stubs]


def row(name: str, instances: list[Memory]) -> str:
    """The largest of them, and all together."""
    most = max(instances, key=lambda each: each.total)
    together = sum(each.proportional for each in instances)
    figures = " | ".join(f"{size / _MIB:.0f}" for size in (most.total, most.private, together))
    return f"| {name} | {len(instances)} | {figures} |"


def measured(name: str, folder: Path) -> Iterator[str]:
    """The rows of one model."""
    bundle, packed_weights = folder / MODELS[name], folder / "packed"
    # A process of its own: torch and the weights would stay in this one.
    command = [sys.executable, "-m", "tests.benchmarks.memory", "write", str(bundle), MODELS[name]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    weights = sum((bundle / file).stat().st_size for file in Bundle.load(bundle, verify=False).manifest.files)
    title = f"{name}, {weights / _MIB:.0f} MiB"
    for instances in (1, 2):
        yield row(f"{title}, packed in memory", held(bundle, instances, None))
    yield row(f"{title}, packed in files, the first start", held(bundle, 2, packed_weights))
    for instances in (1, 2):
        yield row(f"{title}, packed in files", held(bundle, instances, packed_weights))


def main(
    model: Annotated[list[str] | None, typer.Option(help="S/32 or B/16; default: S/32.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = OUT,
) -> None:
    """Measures; needs 2 GB in the folder of temporary files for S/32, 5 GB for B/16, and as much memory."""
    lines = [
        "# Memory of a Triton server's instances\n",
        "| model, weights | instances | RSS of one | private | PSS of all |",
        "|---|" + "--:|" * 4,
    ]

    def add(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    add(row("shipped", held(BUNDLE, 2, None)))
    for name in model or ["S/32"]:
        with tempfile.TemporaryDirectory() as folder:
            for line in measured(name, Path(folder)):
                add(line)
    lines.append(
        "\nMiB of the processes of the instances, when the warm-up has run every operating point in batches of up to 8 "
        f"(the shipped model's: 32). {date.today().isoformat()}, `python -m tests.benchmarks.triton_memory` "
        f"on {machine()}; tritonserver 2.51, Python backend, onnxruntime {version('onnxruntime')}, float32, "
        "one thread, random weights.\n"
    )
    (out / "triton_memory.md").write_text("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
