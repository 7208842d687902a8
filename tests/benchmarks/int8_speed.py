"""How much faster 8 bits are here: `make bench-int8`, or `python -m tests.benchmarks.int8_speed`.

The shipped model and V-MoE-S/32 with random weights, float32 and int8, at batch 1 and 8 and two operating points, and
one large product alone, in interleaved rounds of one run. Medians and ratios of them. Writes int8_speed.json and .md.
If `make export-int8` has left its bundle, the page shows what both manifests say point by point, too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from exporter.bundle import Bundle, Manifest, Point
from exporter.graph import build_graph
from exporter.int8 import Int8Products, Range
from exporter.machine import processor
from exporter.products import Products
from exporter.profiling import make_points
from exporter.quantise import quantised_products
from exporter.recover import recover
from exporter.session import open_session, run
from exporter.tape import Tape
from tests.benchmarks.interleaved import times_s
from vmoe.checkpoint import Checkpoint
from vmoe.config import VARIANTS
from vmoe.data import FASHION_MNIST_DIRECTORY, load_images
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing

SHIPPED = Path("model_repository/vmoe-fashion-mnist")
INT8 = Path("model_repository/vmoe-fashion-mnist-int8")
OUT = Path("docs/bench")
BATCHES = (1, 8)
CALIBRATION_IMAGES = 8  # speed does not depend on them; a batch of them is timed
PRODUCT = (400, 384, 1536)  # rows, in, out: the first one of an MLP of S/32 at batch 8

Run = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """One case both ways."""

    model: str
    case: str
    float32_s: float
    int8_s: float


def shipped() -> tuple[Checkpoint, npt.NDArray[np.uint8]]:
    """The model that ships, and images of its training split."""
    checkpoint = recover(Bundle.load(SHIPPED))
    images = load_images(FASHION_MNIST_DIRECTORY, checkpoint.preprocessing, train=True)
    return checkpoint, images.read(np.arange(CALIBRATION_IMAGES))[0]


def random_s32() -> tuple[Checkpoint, npt.NDArray[np.uint8]]:
    """S/32 as initialised, with routers that decide, and noise."""
    config = VARIANTS["vmoe_s32_last2_e8"]
    torch.manual_seed(0)
    state = VisionTransformer(config).state_dict()
    state = {name: torch.randn(value.shape) if "router" in name else value for name, value in state.items()}
    channels = config.channels
    preprocessing = Preprocessing(config.image_size, channels, (0.5,) * channels, (0.5,) * channels)
    shape = (CALIBRATION_IMAGES, *config.image_size, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Checkpoint(config, state, preprocessing, tuple(map(str, range(config.num_classes)))), images


MODELS = {"shipped": shipped, "S/32": random_s32}


def sessions_of(
    checkpoint: Checkpoint, points: tuple[Point, ...], images: npt.NDArray[np.uint8], folder: Path, threads: int
) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """Of the float32 graph and of the one in 8 bits."""
    state = {name: value.numpy() for name, value in checkpoint.state.items()}
    if checkpoint.config.position_embedding == "sincos2d":
        state["sincos2d"] = checkpoint.model().sincos2d.numpy()

    def build(products: Products | None = None) -> ir.Model:
        return build_graph(checkpoint.config, state, checkpoint.preprocessing, products=products)

    quiet = Console(quiet=True)
    coarse, _ = quantised_products(build, checkpoint.config, points, images, Path("noise"), threads, quiet)
    paths = folder / "float32.onnx", folder / "int8.onnx"
    for path, products in zip(paths, (None, coarse), strict=True):
        ir.save(build(products), path, external_data=f"{path.stem}.data")
    return open_session(paths[0], threads, alone=False), open_session(paths[1], threads, alone=False)


def product(products: Products, path: Path, threads: int) -> ort.InferenceSession:
    """One product of the size PRODUCT; in 8 bits it reads uint8."""
    rows, width, columns = PRODUCT
    weight = np.random.default_rng(0).standard_normal((width, columns)).astype(np.float32)
    tape = Tape({}, "float32", products)
    kind = ir.DataType.UINT8 if isinstance(products, Int8Products) else ir.DataType.FLOAT
    x = ir.val("x", kind, [rows, width])
    y = tape.affine(x, "x", ("weight", weight), ("bias", np.zeros(columns, np.float32)))
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, columns])
    ir.save(ir.Model(tape.graph([x], [y], 20), ir_version=10), path)
    return open_session(path, threads, alone=False)


Entry = tuple[str, str, Run, Run]  # model, case, float32, int8


def entries(models: list[str], folder: Path, threads: int) -> Iterator[Entry]:
    """Everything that is timed."""
    values = np.random.default_rng(0).integers(0, 256, PRODUCT[:2])
    feeds = {"float32": {"x": values.astype(np.float32)}, "int8": {"x": values.astype(np.uint8)}}
    plain = product(Products(), folder / "plain.onnx", threads)
    coarse = product(Int8Products({"x": Range(-128.0, 127.0)}), folder / "coarse.onnx", threads)
    case = "{} x {} x {}".format(*PRODUCT)
    yield "product", case, lambda: plain.run(None, feeds["float32"]), lambda: coarse.run(None, feeds["int8"])
    for name in models:
        checkpoint, images = MODELS[name]()
        config = checkpoint.config
        assert config.moe is not None
        full = config.operating_point
        assert full is not None
        points = make_points(config, (OperatingPoint(0.25, 1), full))
        subfolder = folder / name.replace("/", "")
        subfolder.mkdir()
        exact, eight = sessions_of(checkpoint, points, images, subfolder, threads)
        for batch in BATCHES:
            for point in reversed(points):
                exactly, coarsely = (_answers(session, images[:batch], point) for session in (exact, eight))
                yield name, f"batch {batch}, {point.operating_point}", exactly, coarsely


def _answers(session: ort.InferenceSession, images: npt.NDArray[np.uint8], point: Point) -> Run:
    return lambda: run(session, images, point, ["logits"])


def measure(models: list[str], rounds: int, threads: int, progress: Progress) -> list[Timed]:
    with tempfile.TemporaryDirectory() as folder:
        found = list(entries(models, Path(folder), threads))
        calls = [way for _, _, *ways in found for way in ways]
        task = progress.add_task("rounds", total=(rounds + 1) * len(calls))
        medians = [statistics.median(each) for each in times_s(calls, rounds, lambda: progress.advance(task))]
    pairs = zip(medians[::2], medians[1::2], strict=True)
    return [Timed(model, case, *pair) for (model, case, _, _), pair in zip(found, pairs, strict=True)]


def vnni() -> str:
    """Whether the processor multiplies and adds bytes in one instruction."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
    return "VNNI" if {"avx512_vnni", "avx_vnni"} & set(flags) else "no VNNI"


def markdown(results: list[Timed]) -> str:
    lines = ["| model | case | float32 | int8 | float32 / int8 |", "| --- | --- | --: | --: | --: |"]
    for each in results:
        times = f"{1000 * each.float32_s:.2f} ms | {1000 * each.int8_s:.2f} ms"
        lines.append(f"| {each.model} | {each.case} | {times} | {each.float32_s / each.int8_s:.2f} |")
    return "\n".join(lines) + "\n"


def shipped_table(exact: Manifest, coarse: Manifest) -> str:
    """Both bundles point by point, as their manifests have it: of the same points, timed in one run."""
    lines = [
        "## The shipped bundles\n",
        f"{exact.name} and {coarse.name}; times are those of `--profile-with`, on "
        f"{'no machine' if exact.profile is None else exact.profile.machine}.\n",
        "| C | K | float32 | int8 | lost, points | float32 / int8, batch 1 | batch 8 |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    counterpart = {(point.slots, point.num_selected_experts): point for point in coarse.points}
    for point in exact.points:
        other = counterpart[point.slots, point.num_selected_experts]
        assert point.accuracy is not None
        assert other.accuracy is not None
        times = [{entry.batch_size: entry.median_s for entry in each.latency} for each in (point, other)]
        ratios = (f"{times[0][size] / times[1][size]:.2f}" for size in BATCHES)
        accuracies = f"{100 * point.accuracy:.2f} % | {100 * other.accuracy:.2f} %"
        lost = 100 * (point.accuracy - other.accuracy)
        name = f"{point.capacity_factor:g} | {point.num_selected_experts}"
        lines.append(f"| {name} | {accuracies} | {lost:.2f} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


NOTES = """\
*product*: one matrix product alone, rows x in x out, without the rounding of its input. *S/32*: random weights.

With AVX2 a float32 product does 8 multiply-adds with one instruction (vfmadd), of which two start per cycle: 16.
In 8 bits, 32 multiply-adds take vpmaddubsw and vpmaddwd, of which two start per cycle, too, and vpaddd: 32 per cycle at
best, twice as many. VNNI has one instruction of the same width for the three (vpdpbusd): four times as many. Softmax,
LayerNorm, GELU, attention's own products and routing take the same time either way, and rounding comes on top."""


def main(
    out: Annotated[Path, typer.Option(help="Directory for json and md.")] = OUT,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    models: Annotated[list[str] | None, typer.Option("--model", help="shipped or S/32; default both.")] = None,
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
) -> None:
    """Times float32 and int8, interleaved."""
    threads = threads or len(os.sched_getaffinity(0))
    with Progress() as progress:
        results = measure(models or list(MODELS), rounds, threads, progress)
    machine = (
        f"{threads} threads, {processor()}, {vnni()}, ONNX Runtime {ort.__version__}, Python "
        f"{platform.python_version()}, {date.today().isoformat()}; medians of {rounds} interleaved rounds."
    )
    out.mkdir(parents=True, exist_ok=True)
    text = f"# Speed in 8 bits\n\n`make bench-int8` wrote this page. {machine}\n\n{NOTES}\n\n{markdown(results)}"
    if INT8.is_dir():
        text += "\n" + shipped_table(Bundle.load(SHIPPED).manifest, Bundle.load(INT8).manifest)
    (out / "int8_speed.md").write_text(text)
    record = {"machine": machine, "results": [asdict(each) for each in results]}
    (out / "int8_speed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(results), end="")


if __name__ == "__main__":
    typer.run(main)
