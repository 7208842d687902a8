"""From a checkpoint to a bundle: read, build the graph, compare it with PyTorch, measure it, write all or nothing."""

from __future__ import annotations

import datetime
import hashlib
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from exporter.bundle import InputType, Manifest, Parity, Point, Provenance, WeightType, sha256
from exporter.graph import build_graph
from exporter.measure import count_progress, labelled_images, measure, sample_images
from exporter.parity import check_parity
from exporter.plan import Plan, plan
from exporter.profiling import default_points, make_points
from exporter.repository import write_bundle
from exporter.session import open_session
from exporter.triton_config import TritonOptions
from vmoe.architecture import Hints
from vmoe.checkpoint import Checkpoint
from vmoe.data import LabelledImages
from vmoe.operating_point import OperatingPoint
from vmoe.sources import find_source, load_source, read_architecture

MAX_BATCH_SIZE = 32


@dataclass(frozen=True)
class ExportOptions:
    """What becomes of a checkpoint; see the command line's help for each.

    Attributes:
        checkpoint: any kind that `vmoe.sources` reads.
        config: constructor arguments of the reference, None to infer them.
        hints: what the checkpoint cannot tell, and overrides.
        points: operating points of the manifest; empty for the default ladder.
        max_selected_experts: largest K of the graph, None for the ladder's.
        triton: how Triton shall run the model.
    """

    checkpoint: Path
    config: Path | None
    hints: Hints
    dtype: WeightType
    input_type: InputType
    group_images: int
    points: tuple[OperatingPoint, ...]
    max_selected_experts: int | None
    labels: Path | None
    images: Path | None
    tolerance: float
    parity_images: int
    threads: int
    rounds: int
    triton: TritonOptions


def plan_export(checkpoint: Path | None, hints: Hints, config: Path | None, dtype: WeightType) -> Plan:
    """What an export would store, without reading a weight."""
    return plan(read_architecture(checkpoint, hints, config_path=config), dtype)


def export_checkpoint(directory: Path, options: ExportOptions, console: Console) -> Manifest:
    """Writes the bundle `directory`.

    Raises:
        ValueError, OSError: bad input, named in the message; nothing was written.
        ParityError: the graph answers differently from PyTorch; nothing was written.
    """
    loaded = _load(options, console)
    config, preprocessing = loaded.config, loaded.preprocessing
    ladder = make_points(config, options.points or default_points(config)) if config.moe is not None else ()
    most = 0
    if config.moe is not None:
        most = max(options.max_selected_experts or 0, *(point.num_selected_experts for point in ladder))
    data = None if options.images is None else labelled_images(options.images, preprocessing, loaded.labels)
    state = {key: value.numpy() for key, value in loaded.state.items()}
    if config.position_embedding == "sincos2d":
        state["sincos2d"] = loaded.model().sincos2d.numpy()
    graph = build_graph(
        config,
        state,
        preprocessing,
        input_type=options.input_type,
        weight_type=options.dtype,
        max_selected_experts=most or None,
    )

    def finish(model: Path) -> Manifest:
        manifest = Manifest(
            name=directory.name,
            architecture=config,
            preprocessing=preprocessing,
            labels=loaded.labels,
            input=options.input_type,
            weights=options.dtype,
            max_selected_experts=most,
            max_batch_size=MAX_BATCH_SIZE * options.group_images,
            points=ladder,
            parity=_parity(loaded, model, data, ladder, options, console),
            provenance=_provenance(options.checkpoint),
            files={},
        )
        return measure(manifest, model, options.images, data, options.threads, options.rounds, console)

    return write_bundle(directory, graph, finish, options.triton)


def _load(options: ExportOptions, console: Console) -> Checkpoint:
    """The model that is stored: with the labels, the groups and the precision asked for."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("read", total=None)
        loaded = load_source(
            options.checkpoint,
            options.hints,
            config_path=options.config,
            progress=lambda read, total: bar.update(task, total=total, advance=read),
        )
    if options.labels is not None:
        loaded = loaded.with_labels(tuple(options.labels.read_text().splitlines()))
    loaded = loaded.with_group_images(options.group_images)
    if options.dtype != "float32":  # parity is checked against the model that is stored, not the one that was trained
        loaded = loaded.rounded_to(torch.float16 if options.dtype == "float16" else torch.bfloat16)
    return loaded


def _parity(
    loaded: Checkpoint,
    model: Path,
    data: LabelledImages | None,
    points: tuple[Point, ...],
    options: ExportOptions,
    console: Console,
) -> Parity:
    group = options.group_images
    samples = sample_images(loaded.preprocessing, data, -(-options.parity_images // group) * group)
    cases: list[Point | None] = [*points] or [None]
    with count_progress(console) as bar:
        task = bar.add_task("parity", total=len(samples) * len(cases))
        return check_parity(
            loaded.model(),
            open_session(model, options.threads),
            samples,
            loaded.preprocessing,
            cases,
            normalized_input=options.input_type == "float32",
            tolerance=options.tolerance,
            advance=lambda count: bar.advance(task, count),
        )


def _provenance(checkpoint: Path) -> Provenance:
    source = find_source(checkpoint)
    digest = hashlib.sha256()
    for path in source.files:
        digest.update(path.name.encode() + bytes.fromhex(sha256(path)))
    return Provenance(
        checkpoint=source.path.name,
        checkpoint_sha256=digest.hexdigest(),
        command=shlex.join(["python", "-m", "exporter", *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    )
