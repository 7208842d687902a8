"""How near the machine's limit the graph runs: `make bench-model`, or `python -m tests.benchmarks.model_speed`.

For the shipped architecture, S/32 and B/16 with random weights, at batch 1 and 8, in interleaved rounds of one run:

    ours        the exported graph at seven operating points and with no slots at all
    peers       the same without the class-token shortcut; every expert on every token; padded buffers; the dense ViT of
                the same backbone; PyTorch eager and compiled
    peak        one MatMul with a constant (packed) weight, as large as the model's largest

All figures are medians over the rounds, and ratios of them. FLOPs are counted for what each run really computed (a
multiplication and an addition are two), so that a ratio of times can be held against the ratio of FLOPs, its bound
where arithmetic is all that costs. Writes model_speed.json, .md and .png.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
import typer
from rich.progress import Progress

from exporter.graph import build_graph
from exporter.moe_graph import MoeLayers
from tests.benchmarks.peer_graphs import MaskedLayers, PaddedLayers, packed_matmul
from vmoe.config import VARIANTS, ModelConfig
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing

OUT = Path("docs/bench")
MODELS = {"tiny": "vmoe_fashion_mnist", "S/32": "vmoe_s32_last2_e8", "B/16": "vmoe_b16_every2_e8"}
BATCHES = (1, 8)
FULL, CHEAP = OperatingPoint(1.05, 2), OperatingPoint(0.25, 1)
POINTS = (FULL, *(OperatingPoint(c, k) for c, k in ((0.5, 2), (0.25, 2), (1, 1), (0.5, 1))), CHEAP)
NO_SLOTS = "no slots"
MIXED = "mixed"  # half of the batch at the full point, half at the cheapest
CASES = (*map(str, POINTS), NO_SLOTS)
PEAK_ROWS = 1568  # B/16 at batch 8: enough that the weights' way through the caches is no part of it
WARM_UP, SHORTEST_S = 2, 0.02  # runs; a timed sample repeats a run that is shorter

Run = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """One way to run one case. gflop: of one run; null where it is not counted."""

    model: str
    batch: int
    way: str
    case: str
    median_s: float
    gflop: float | None


def random_state(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """Weights as initialised, and routers that decide."""
    generator = torch.Generator().manual_seed(0)
    state = dict(model.state_dict())
    for name, value in state.items():
        if "router" in name or name.endswith("position_embedding"):
            state[name] = torch.randn(value.shape, generator=generator) * (1.0 if "router" in name else 0.5)
    return state


def feeds_of(config: ModelConfig, batch: int, case: str) -> dict[str, npt.NDArray[Any]]:
    images = np.random.default_rng(batch).integers(0, 256, (batch, *config.image_size, config.channels), np.uint8)
    if config.moe is None:
        return {"images": images}
    points = {str(point): point for point in POINTS}
    names = [CASES[0], str(CHEAP)] * (batch // 2) if case == MIXED else [case] * batch
    layers = len(config.moe.layers)
    slots = [(0,) * layers if name == NO_SLOTS else config.slots(points[name]) for name in names]
    selected = [[1 if name == NO_SLOTS else points[name].num_selected_experts] for name in names]
    return {"images": images, "slots": np.array(slots), "num_selected_experts": np.array(selected)}


def dense_gflop(config: ModelConfig, batch: int, *, shortcut: bool) -> float:
    """All but the experts' work; multiplications of matrices alone."""
    tokens, size, width = config.tokens_per_image, config.hidden_size, config.mlp_dim
    sparse = () if config.moe is None else config.moe.layers
    patch = config.patch_size[0] * config.patch_size[1] * config.channels
    total = 2 * config.grid[0] * config.grid[1] * patch * size + 2 * size * config.num_classes
    for index in range(config.num_layers):
        rows = queries = tokens
        if shortcut and index == config.num_layers - 1:
            rows, queries = 1, tokens if index in sparse else 1
        total += 2 * size * size * (2 * queries + 2 * tokens) + 4 * queries * tokens * size
        if index in sparse:
            assert config.moe is not None
            total += 2 * tokens * size * config.moe.num_experts
        else:
            total += 4 * rows * size * width
    return batch * total / 1e9


def expert_rows(config: ModelConfig, experts: npt.NDArray[np.int64], *, shortcut: bool) -> int:
    """Kept pairs that are computed; experts: (B, L, S, K), -1 where nobody served."""
    kept = (experts >= 0).sum(axis=3)  # (B, L, S)
    assert config.moe is not None
    if shortcut and config.moe.layers[-1] == config.num_layers - 1:
        kept[:, -1, 1:] = 0
    return int(kept.sum())


@dataclass(frozen=True)
class Subject:
    """A model of the benchmark, and graphs of it on disk.

    Attributes:
        shortcut: the head reads the class token alone, so that the shortcut applies.
    """

    name: str
    config: ModelConfig
    folder: Path
    threads: int

    @property
    def shortcut(self) -> bool:
        return self.config.classifier == "token"

    def preprocessing(self) -> Preprocessing:
        config = self.config
        return Preprocessing(config.image_size, config.channels, (0.5,) * config.channels, (0.5,) * config.channels)

    def torch_model(self, config: ModelConfig | None = None) -> VisionTransformer:
        torch.manual_seed(0)
        model = VisionTransformer(config or self.config).eval()
        model.load_state_dict(random_state(model))
        return model

    def session(
        self, way: str, layers: type[MoeLayers], *, shortcut: bool, dense: bool = False
    ) -> ort.InferenceSession:
        config = replace(self.config, moe=None) if dense else self.config
        model = self.torch_model(config)
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        if config.position_embedding == "sincos2d":
            state["sincos2d"] = model.sincos2d.numpy()
        graph = build_graph(
            config,
            state,
            self.preprocessing(),
            max_selected_experts=None if dense else FULL.num_selected_experts,
            class_token_shortcut=shortcut,
            moe_layers=layers,
        )
        path = self.folder / f"{way}.onnx"
        ir.save(graph, path, external_data=f"{way}.data")
        return open_session(path, self.threads)


def open_session(model: Path | bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


Entry = tuple[str, str, float | None, Run]  # way, case, gflop, run


def onnx_entries(subject: Subject, batch: int, sessions: Mapping[str, ort.InferenceSession]) -> Iterator[Entry]:
    """Every way and case that runs in ONNX Runtime."""
    config = subject.config
    assert config.moe is not None
    pair_gflop = 4 * config.hidden_size * config.mlp_dim / 1e9
    mixed = (MIXED,) if batch > 1 else ()
    for way, session in sessions.items():
        cases = {
            "ours": (*CASES, *mixed),
            "without shortcut": (str(FULL), str(CHEAP)),
            "padded": (str(FULL), str(CHEAP), *mixed),
            "masked": (str(CHEAP),),
            "dense": (str(FULL),),
        }[way]
        for case in cases:
            dense = replace(config, moe=None)
            feeds = feeds_of(dense if way == "dense" else config, batch, case)
            shortcut = subject.shortcut and way in ("ours", "dense")
            gflop = None
            if way == "dense":
                gflop = dense_gflop(dense, batch, shortcut=shortcut)
            elif way in ("ours", "without shortcut"):
                (experts,) = session.run(["token_experts"], feeds)
                gflop = dense_gflop(config, batch, shortcut=shortcut)
                gflop += pair_gflop * expert_rows(config, experts, shortcut=shortcut)
            yield way, case, gflop, lambda session=session, feeds=feeds: session.run(["logits"], feeds)


def torch_entries(subject: Subject, batch: int, model: VisionTransformer, compiled: Any) -> Iterator[Entry]:
    for case in (str(FULL), str(CHEAP)):
        feeds = feeds_of(subject.config, batch, case)
        images = torch.from_numpy(feeds["images"].astype(np.float32) / 127.5 - 1)
        slots, selected = torch.from_numpy(feeds["slots"]), torch.from_numpy(feeds["num_selected_experts"][:, 0])
        most = int(selected.max())
        for way, call in (("torch eager", model), ("torch.compile", compiled)):
            if call is None:
                continue

            def run(call: Any = call, inputs: tuple[Any, ...] = (images, slots, selected), most: int = most) -> object:
                with torch.inference_mode():
                    return call(*inputs, max_selected_experts=most)

            yield way, case, None, run


def sample_s(run: Run) -> float:
    """Seconds of one run, from as many as fill `SHORTEST_S`."""
    count, start_s = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start_s < SHORTEST_S:
        run()
        count += 1
    return (time.perf_counter() - start_s) / count


def measure(subject: Subject, rounds: int, progress: Progress, *, with_torch: bool, with_compile: bool) -> list[Timed]:
    token = subject.shortcut
    sessions = {"ours": subject.session("ours", MoeLayers, shortcut=True)}
    if token:
        sessions["without shortcut"] = subject.session("full", MoeLayers, shortcut=False)
    sessions["padded"] = subject.session("padded", PaddedLayers, shortcut=False)
    sessions["masked"] = subject.session("masked", MaskedLayers, shortcut=False)
    sessions["dense"] = subject.session("dense", MoeLayers, shortcut=True, dense=True)
    gc.collect()
    size, width = subject.config.hidden_size, subject.config.mlp_dim
    peak = open_session(ir.to_proto(packed_matmul(PEAK_ROWS, size, width)).SerializeToString(), subject.threads)
    x = np.random.default_rng(0).standard_normal((PEAK_ROWS, size)).astype(np.float32)
    model = compiled = None
    if with_torch:
        model = subject.torch_model()
        compiled = torch.compile(model, dynamic=False) if with_compile else None
    entries: list[tuple[int, Entry]] = [
        (0, ("peak", "MatMul", 2 * PEAK_ROWS * size * width / 1e9, lambda: peak.run(None, {"x": x})))
    ]
    for batch in BATCHES:
        entries += [(batch, entry) for entry in onnx_entries(subject, batch, sessions)]
        if model is not None:
            entries += [(batch, entry) for entry in torch_entries(subject, batch, model, compiled)]
    task = progress.add_task(subject.name, total=(rounds + 1) * len(entries))
    samples: list[list[float]] = [[] for _ in entries]
    for turn in range(rounds + 1):
        for place, (_, (_, _, _, run)) in enumerate(entries):
            if turn == 0:  # the first compiles
                for _ in range(WARM_UP):
                    run()
            else:
                samples[place].append(sample_s(run))
            progress.advance(task)
    return [
        Timed(subject.name, batch, way, case, statistics.median(times), gflop)
        for (batch, (way, case, gflop, _)), times in zip(entries, samples, strict=True)
    ]


def markdown(results: list[Timed]) -> str:
    by = {(each.model, each.batch, each.way, each.case): each for each in results}
    parts = []
    for model in dict.fromkeys(each.model for each in results):
        peak = by[model, 0, "peak", "MatMul"]
        assert peak.gflop is not None
        peak_rate = peak.gflop / peak.median_s
        parts.append(f"## {model}\n\nPacked MatMul: {peak_rate:.0f} GFLOP/s.\n\n")
        for batch in BATCHES:
            full = by[model, batch, "ours", str(FULL)]
            assert full.gflop is not None
            parts.append(
                f"Batch {batch}: {1000 * full.median_s:.2f} ms at {FULL}, {full.gflop:.2f} GFLOP.\n\n"
                f"| ours | time over {FULL} | FLOPs over {FULL} | share of the MatMul's rate |\n"
                "| --- | --: | --: | --: |\n"
            )
            for (name, size, way, case), each in by.items():
                if (name, size, way) == (model, batch, "ours"):
                    assert each.gflop is not None
                    cells = (each.median_s / full.median_s, each.gflop / full.gflop)
                    share = each.gflop / each.median_s / peak_rate
                    parts.append(f"| {case} | {cells[0]:.3f} | {cells[1]:.3f} | {share:.2f} |\n")
            parts.append("\n| other | case | time over ours |\n| --- | --- | --: |\n")
            for (name, size, way, case), each in by.items():
                if (name, size) == (model, batch) and way != "ours":
                    ours = by[model, batch, "ours", case]
                    parts.append(f"| {way} | {case} | {each.median_s / ours.median_s:.2f} |\n")
            parts.append("\n")
    return "".join(parts)


def plot(results: list[Timed], path: Path) -> None:
    """Time of every way at the full and the cheapest point, relative to ours at the full point."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    by = {(each.model, each.batch, each.way, each.case): each.median_s for each in results}
    models = list(dict.fromkeys(each.model for each in results))
    figure, axes = pyplot.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), sharey=True, squeeze=False)
    ways = [way for way in dict.fromkeys(each.way for each in results) if way != "peak"]
    for axis, model in zip(axes[0], models, strict=True):
        for offset, (batch, case) in enumerate((b, c) for b in BATCHES for c in (str(FULL), str(CHEAP))):
            known = [(i, by[key]) for i, way in enumerate(ways) if (key := (model, batch, way, case)) in by]
            reference = by[model, batch, "ours", str(FULL)]
            axis.barh(
                [i + 0.2 * (offset - 1.5) for i, _ in known],
                [seconds / reference for _, seconds in known],
                0.19,
                label=f"batch {batch}, {case}",
            )
        axis.axvline(1, color="grey", linewidth=0.6)
        axis.set_yticks(range(len(ways)), ways)
        axis.set_xlabel(f"time over ours at {FULL}")
        axis.set_title(model)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="Directory for json, md and png.")] = OUT,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    models: Annotated[list[str] | None, typer.Option("--model", help="tiny, S/32 or B/16; default all.")] = None,
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    with_torch: Annotated[bool, typer.Option("--torch/--no-torch")] = True,
    with_compile: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
) -> None:
    """Times the exported graph and its peers, interleaved."""
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    results: list[Timed] = []
    with Progress() as progress:
        for name in models or MODELS:
            with tempfile.TemporaryDirectory() as folder:
                subject = Subject(name, VARIANTS[MODELS[name]], Path(folder), threads)
                results += measure(subject, rounds, progress, with_torch=with_torch, with_compile=with_compile)
            gc.collect()
    machine = (
        f"{threads} threads, {cpu_model()}, float32, ONNX Runtime {ort.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {date.today().isoformat()}; medians of {rounds} interleaved rounds."
    )
    content = f"# Speed of the graph\n\n`make bench-model` wrote this page. {machine}\n\n{NOTES}\n{markdown(results)}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "model_speed.md").write_text(content.rstrip("\n") + "\n\n![Times of all ways](model_speed.png)\n")
    (out / "model_speed.json").write_text(
        json.dumps({"machine": machine, "results": [asdict(each) for each in results]}, indent=1) + "\n"
    )
    plot(results, out / "model_speed.png")


NOTES = """\
*without shortcut*: all tokens in the last block, too. *padded*: buffers for the batch's largest number of slots, with
batched MatMul; *masked*: every expert on every token; both without the shortcut. *dense*: the ViT of the same backbone.
torch: the model of this repository; on AMD its MKL takes another path than on Intel. *mixed*: half of the batch at
either end."""


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    typer.run(main)
