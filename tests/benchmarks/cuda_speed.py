"""The graph of `--target cuda` on a GPU: `python -m tests.benchmarks.cuda_speed`, with onnxruntime-gpu and CUDA torch.

For S/32 and B/16 with random weights: latency and images per second by batch and operating point, interleaved, medians;
against the ragged graph in float32 on the same device, the dense ViT in the same form, and torch.compile under autocast
to float16. The share of a large float16 product's rate is that of what the experts were asked for, not of padding.
Inputs and outputs are bound: images lie on the device, slots and K on the host.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
import typer

from exporter.cuda import HalfProducts, PaddedLayers
from exporter.moe_graph import MoeLayers
from exporter.session import has_cuda
from tests.benchmarks.model_subjects import CHEAP, FULL, Subject, dense_gflop, expert_rows, feeds_of, pair_gflop
from tests.benchmarks.torch_compiled import compiled, torch_inputs

BATCHES = (1, 8, 32)
PEAK_SIDE = 8192
WARM_UP = 3


@dataclass(frozen=True)
class Timed:
    """gflop: of one run, asked for; null where it is not counted."""

    model: str
    batch: int
    way: str
    case: str
    median_s: float
    gflop: float | None


def bound(
    session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]], device: str
) -> Callable[[], npt.NDArray[np.float32]]:
    """Runs a graph for its logits, with images and logits on a device, `cuda` or `cpu`; returns when they are there."""
    binding = session.io_binding()
    for name, values in feeds.items():
        place = device if name == "images" else "cpu"
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, place, 0))
    binding.bind_output("logits", device)

    def run() -> npt.NDArray[np.float32]:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0].numpy()  # a few numbers per image

    return run


def gflop(session: ort.InferenceSession, subject: Subject, feeds: Mapping[str, npt.NDArray[Any]]) -> float:
    """Of one run of a sparse graph."""
    (experts,) = session.run(["token_experts"], feeds)
    rows = expert_rows(subject.config, experts, shortcut=subject.shortcut)
    return dense_gflop(subject.config, len(experts), shortcut=subject.shortcut) + pair_gflop(subject.config) * sum(rows)


def on_torch(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> object:
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        logits = call(*inputs, max_selected_experts=FULL.num_selected_experts).logits
    torch.cuda.synchronize()
    return logits


def peak_gflop_per_s(rounds: int) -> float:
    """Of one large float16 product in PyTorch."""
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE, device="cuda", dtype=torch.float16) for _ in range(2))
    return 2 * PEAK_SIDE**3 / 1e9 / _median_s([lambda: (a @ b, torch.cuda.synchronize())], rounds)[0]


def _median_s(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(WARM_UP + rounds):
        for place, call in enumerate(calls):
            start_s = time.perf_counter()
            call()
            if turn >= WARM_UP:
                samples[place].append(time.perf_counter() - start_s)
    return [statistics.median(each) for each in samples]


def measure(subject: Subject, rounds: int) -> list[Timed]:
    half = HalfProducts()
    sparse = {
        "cuda": subject.session("cuda", PaddedLayers, products=half, device="CUDA"),
        "ragged, float32": subject.session("ragged", MoeLayers, device="CUDA"),
    }
    dense = subject.session("dense", MoeLayers, dense=True, products=half, device="CUDA")
    call = compiled(subject.torch_model().cuda())
    entries: list[tuple[int, str, str, float | None, Callable[[], object]]] = []
    for batch in BATCHES:
        for case in (str(FULL), str(CHEAP)):
            feeds = feeds_of(subject.config, batch, case)
            for way, session in sparse.items():
                entries.append((batch, way, case, gflop(session, subject, feeds), bound(session, feeds, "cuda")))
            inputs = tuple(each.cuda() for each in torch_inputs(subject, batch, case))
            entries.append((batch, "torch.compile", case, None, lambda inputs=inputs: on_torch(call, inputs)))
        config = replace(subject.config, moe=None)
        work = dense_gflop(config, batch, shortcut=subject.shortcut)
        entries.append((batch, "dense", str(FULL), work, bound(dense, feeds_of(config, batch, ""), "cuda")))
    medians_s = _median_s([run for *_, run in entries], rounds)
    return [
        Timed(subject.name, batch, way, case, median_s, work)
        for (batch, way, case, work, _), median_s in zip(entries, medians_s, strict=True)
    ]


def markdown(results: list[Timed], peak: float, machine: str) -> str:
    lines = [
        f"# The graph on a GPU\n\n`python -m tests.benchmarks.cuda_speed` wrote this page. {machine}\n",
        f"One float16 product of {PEAK_SIDE} x {PEAK_SIDE}: {peak / 1000:.0f} TFLOP/s.\n",
        "| model | batch | way | point | ms | images/s | share of the product's rate |\n|---|--:|---|---|--:|--:|--:|",
    ]
    for each in results:
        share = "-" if each.gflop is None else f"{each.gflop / each.median_s / peak:.2f}"
        figures = f"{1000 * each.median_s:.2f} | {each.batch / each.median_s:.0f} | {share}"
        lines.append(f"| {each.model} | {each.batch} | {each.way} | {each.case} | {figures} |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Directory for json and md.")] = Path("docs/bench"),
    rounds: Annotated[int, typer.Option(min=1)] = 30,
) -> None:
    """Times the graph of `--target cuda` and its peers on the first CUDA device."""
    if not (has_cuda() and torch.cuda.is_available()):
        typer.echo("error: needs a CUDA device, onnxruntime-gpu in place of onnxruntime, and torch with CUDA", err=True)
        raise typer.Exit(1)
    results: list[Timed] = []
    for name in ("S/32", "B/16"):
        with tempfile.TemporaryDirectory() as folder:
            results += measure(Subject.named(name, Path(folder), 0), rounds)
    peak = peak_gflop_per_s(rounds)
    versions = f"ONNX Runtime {ort.__version__}, torch {torch.__version__}"
    machine = f"{torch.cuda.get_device_name()}, {versions}, {time.strftime('%Y-%m-%d')}; medians of {rounds} rounds."
    out.mkdir(parents=True, exist_ok=True)
    (out / "cuda_speed.md").write_text(markdown(results, peak, machine))
    content = {"machine": machine, "peak_gflop_per_s": peak, "results": [asdict(each) for each in results]}
    (out / "cuda_speed.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
