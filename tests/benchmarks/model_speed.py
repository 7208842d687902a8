"""How near the machine's limit the graph runs: `make bench-model`, or `python -m tests.benchmarks.model_speed`.

For the shipped model, S/32 and B/16 (these with random weights), at batch 1 and 8, in interleaved rounds of one run:

    ours        the exported graph at seven operating points and with no slots at all
    peers       the same without the class-token shortcut, the first graph that was shipped, every expert on every
                token, padded buffers, the dense ViT of the same backbone, PyTorch eager and compiled
    peak        one MatMul with a constant (packed) weight, as large as the model's largest, and one of a single row
                with a weight that no cache holds

All figures are medians over the rounds, and ratios of them. FLOPs are counted for what each run really computed (a
multiplication and an addition are two), so that a ratio of times can be held against the ratio of FLOPs, its bound
where arithmetic is all that costs. An expert with few rows takes at least as long as its weights take to be read: the
other bound. An entry that has been timed for `ENTRY_S` leaves the rounds, so that the whole
takes a quarter of an hour of two undisturbed cores. Writes model_speed.json, .md and .png.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
import typer
from rich.progress import Progress

from exporter.cuda import PaddedLayers
from exporter.machine import processor
from exporter.moe_graph import MoeLayers
from tests.benchmarks.interleaved import times_s
from tests.benchmarks.model_speed_page import MATMUL, READ, Findings, Timed, page, plot
from tests.benchmarks.model_subjects import (
    CASES,
    CHEAP,
    FULL,
    MIXED,
    MODELS,
    Subject,
    dense_gflop,
    expert_rows,
    feeds_of,
    fetch,
    open_session,
    pair_gflop,
)
from tests.benchmarks.operator_profile import Profile, profile
from tests.benchmarks.peer_graphs import MaskedLayers, packed_matmul
from tests.benchmarks.torch_compiled import BATCHES, compile_within, compiled, run, torch_inputs

OUT = Path("docs/bench")
PEAK_ROWS = 1568  # B/16 at batch 8: enough that the weights' way through the caches is no part of it
READ_BYTES = 256 << 20
ENTRY_S = 6.0  # chosen, not tuned: two samples of B/16 at batch 8

Entry = tuple[str, str, float | None, tuple[int, ...], Callable[[], object]]  # way, case, gflop, expert rows, run


def open_sessions(subject: Subject) -> dict[str, ort.InferenceSession]:
    """The graph in every form, by way."""
    sessions = {"ours": subject.session("ours", MoeLayers, shortcut=True)}
    if subject.shortcut:
        sessions["without shortcut"] = subject.session("full", MoeLayers, shortcut=False)
    if subject.first is not None:
        sessions["first graph"] = open_session(subject.first.model_path, subject.threads)
    sessions["padded"] = subject.session("padded", PaddedLayers, shortcut=True)
    sessions["masked"] = subject.session("masked", MaskedLayers, shortcut=False)
    sessions["dense"] = subject.session("dense", MoeLayers, shortcut=True, dense=True)
    gc.collect()
    return sessions


def onnx_entries(subject: Subject, batch: int, sessions: Mapping[str, ort.InferenceSession]) -> Iterator[Entry]:
    """Every way and case that runs in ONNX Runtime."""
    config = subject.config
    assert config.moe is not None
    mixed = (MIXED,) if batch > 1 else ()
    for way, session in sessions.items():
        cases = {
            "ours": (*CASES, *mixed),
            "padded": (str(FULL), str(CHEAP), *mixed),
            "masked": (str(CHEAP),),
            "dense": (str(FULL),),
        }.get(way, (str(FULL), str(CHEAP)))
        for case in cases:
            dense = replace(config, moe=None)
            feeds = feeds_of(dense if way == "dense" else config, batch, case)
            shortcut = subject.shortcut and way != "without shortcut"
            gflop, rows = None, ()
            if way == "dense":
                gflop = dense_gflop(dense, batch, shortcut=shortcut)
            elif way in ("ours", "without shortcut"):
                (experts,) = session.run(["token_experts"], feeds)
                rows = expert_rows(config, experts, shortcut=shortcut)
                gflop = dense_gflop(config, batch, shortcut=shortcut) + pair_gflop(config) * sum(rows)
            yield way, case, gflop, rows, fetch(session, feeds)


def torch_entries(subject: Subject, batch: int, calls: Mapping[str, Callable[..., object]]) -> Iterator[Entry]:
    for case in (str(FULL), str(CHEAP)):
        inputs = torch_inputs(subject, batch, case)
        for way, call in calls.items():
            yield way, case, None, (), lambda call=call, inputs=inputs: run(call, inputs)


def alone_or_in_a_batch(subject: Subject, session: ort.InferenceSession) -> float:
    """Largest difference in any probability between an image alone and in a batch of the largest size, mixed points."""
    feeds = feeds_of(subject.config, max(BATCHES), MIXED)
    together = _probabilities(fetch(session, feeds)()[0])
    alone = [
        _probabilities(fetch(session, {name: value[i : i + 1] for name, value in feeds.items()})()[0])
        for i in range(max(BATCHES))
    ]
    return float(np.abs(np.concatenate(alone) - together).max())


def _probabilities(logits: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def measure(
    subject: Subject, rounds: int, progress: Progress, *, with_torch: bool, compile_limit_s: float
) -> tuple[list[Timed], list[Profile], float, str | None]:
    """Times of all ways, profiles of ours, `alone_or_in_a_batch`, and why torch.compile is not among the ways."""
    missing = "not asked for"
    calls: dict[str, Callable[..., object]] = {}
    if with_torch:
        calls["torch eager"] = subject.torch_model()
        if compile_limit_s:
            missing = compile_within(subject.name, subject.threads, compile_limit_s)
            if missing is None:
                calls["torch.compile"] = compiled(subject.torch_model())
    sessions = open_sessions(subject)
    size, width = subject.config.hidden_size, subject.config.mlp_dim
    entries: list[tuple[int, Entry]] = []
    for case, rows, columns in ((MATMUL, PEAK_ROWS, width), (READ, 1, READ_BYTES // (4 * size))):
        peak = open_session(ir.to_proto(packed_matmul(rows, size, columns)).SerializeToString(), subject.threads)
        x = np.random.default_rng(0).standard_normal((rows, size)).astype(np.float32)
        entries.append((0, ("peak", case, 2 * rows * size * columns / 1e9, (), partial(peak.run, None, {"x": x}))))
    for batch in BATCHES:
        entries += [(batch, entry) for entry in onnx_entries(subject, batch, sessions)]
        entries += [(batch, entry) for entry in torch_entries(subject, batch, calls)]
    task = progress.add_task(subject.name, total=(rounds + 1) * len(entries))
    calls_of_entries = [call for _, (*_, call) in entries]
    samples = times_s(calls_of_entries, rounds, lambda: progress.advance(task), call_s=ENTRY_S)
    timed = [
        Timed(subject.name, batch, way, case, statistics.median(times), len(times), gflop, rows)
        for (batch, (way, case, gflop, rows, _)), times in zip(entries, samples, strict=True)
    ]
    profiles = [
        profile(subject, batch, str(point), feeds_of(subject.config, batch, str(point)))
        for batch in BATCHES
        for point in (FULL, CHEAP)
    ]
    return timed, profiles, alone_or_in_a_batch(subject, sessions["ours"]), missing


def main(
    out: Annotated[Path, typer.Option(help="Directory for json, md and png.")] = OUT,
    rounds: Annotated[int, typer.Option(min=1, help="At most; long runs get fewer.")] = 25,
    only: Annotated[str, typer.Option(help="Models: some of tiny, s32, b16, by commas.")] = "tiny,s32,b16",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    with_torch: Annotated[bool, typer.Option("--torch/--no-torch")] = True,
    compile_limit_s: Annotated[float, typer.Option(help="Of torch.compile, per model; 0 leaves it out.")] = 60.0,
) -> None:
    """Times the exported graph and its peers, interleaved."""
    names = {name.lower().replace("/", ""): name for name in MODELS}
    wanted = only.lower().split(",")
    if unknown := set(wanted) - set(names):
        raise typer.BadParameter(f"--only has {', '.join(sorted(unknown))}; models are {', '.join(names)}")
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    findings = Findings([], [], {}, {}, {}, {})
    with Progress() as progress:
        for name in (names[each] for each in wanted):
            with tempfile.TemporaryDirectory() as folder:
                subject = Subject.named(name, Path(folder), threads)
                timed, profiles, difference, missing = measure(
                    subject, rounds, progress, with_torch=with_torch, compile_limit_s=compile_limit_s
                )
            findings.timed.extend(timed)
            findings.profiles.extend(profiles)
            findings.difference[name] = difference
            findings.shortcut[name] = subject.shortcut
            findings.pair_gflop[name] = pair_gflop(subject.config)
            if missing is not None:
                findings.without_compile[name] = missing
            gc.collect()
    machine = (
        f"{threads} threads, {processor()}, float32, ONNX Runtime {ort.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {date.today().isoformat()}; medians of up to {rounds} interleaved rounds."
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "model_speed.md").write_text(page(findings, machine))
    (out / "model_speed.json").write_text(json.dumps({"machine": machine, **asdict(findings)}, indent=1) + "\n")
    plot(findings.timed, out / "model_speed.png")


if __name__ == "__main__":
    typer.run(main)
