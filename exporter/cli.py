"""`python -m exporter`: a trained checkpoint becomes a bundle that the gateway and Triton serve."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import platform
import shlex
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from exporter.bundle import Bundle, Manifest, Parity, Point, Provenance, sha256, write_manifest
from exporter.graph import InputType, WeightType, build_graph
from exporter.parity import TOLERANCE, ParityError, check_parity
from exporter.plan import Plan, plan
from exporter.profiling import (
    BATCH_SIZES,
    ROUNDS,
    default_points,
    describe_machine,
    make_points,
    measure_accuracy,
    measure_latency,
    with_accuracy,
)
from exporter.repository import write_bundle
from exporter.session import open_session
from vmoe.architecture import Hints
from vmoe.checkpoint import Checkpoint
from vmoe.data import LabelledImages, check_classes, load_images
from vmoe.operating_point import parse_point
from vmoe.preprocess import Preprocessing, normalize
from vmoe.sources import find_source, load_source, parse_image_size, read_architecture

PARITY_IMAGES = 256  # chosen: half a minute for the shipped model; half of them seeded noise when there are real images
MAX_BATCH_SIZE = 32

app = typer.Typer(add_completion=False)
console = Console(stderr=True)


class DataType(StrEnum):
    """Storage of the weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class QueueOrder(StrEnum):
    """Order of an expert's queue."""

    bpr = "bpr"
    vanilla = "vanilla"


class RouterName(StrEnum):
    """Who chooses whom."""

    experts_per_item = "experts_per_item"
    items_per_expert = "items_per_expert"


class Positions(StrEnum):
    """Position embeddings that leave no parameters."""

    sincos2d = "sincos2d"
    none = "none"


class Input(StrEnum):
    """What the graph's `images` are."""

    uint8 = "uint8"
    float32 = "float32"


@app.command()
def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Directory written by `python -m vmoe train`; prefix of a google-research/vmoe checkpoint; Orbax "
            "folder; .npz; state dict (.safetensors, .pt)."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the bundle and of Triton's model.")] = "vmoe",
    out: Annotated[Path, typer.Option(help="Model repository.")] = Path("model_repository"),
    images: Annotated[
        Path | None, typer.Option(help="Labelled images (IDX directory or image folder) that give the accuracies.")
    ] = None,
    dtype: Annotated[DataType, typer.Option(help="Storage of the weights.")] = DataType.float32,
    input_type: Annotated[Input, typer.Option("--input", help="Pixels, or normalised floats.")] = Input.uint8,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Constructor arguments of the reference (JSON, bare or under `model`), instead of inference."
        ),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="H or HxW; learned positions are interpolated when it is not the model's own.")
    ] = None,
    num_selected_experts: Annotated[int | None, typer.Option(min=1, help="K of the full operating point.")] = None,
    capacity_factor: Annotated[float | None, typer.Option(help="C of the full operating point.")] = None,
    routing: Annotated[QueueOrder | None, typer.Option(help="Whom a full expert serves.")] = None,
    router: Annotated[RouterName | None, typer.Option(help="Who chooses; parameters do not tell.")] = None,
    positions: Annotated[Positions | None, typer.Option(help="Positions of a model without a table of them.")] = None,
    group_images: Annotated[int | None, typer.Option(min=1, help="Images per routing group.")] = 1,
    point: Annotated[
        list[str] | None, typer.Option(help="Operating point C,K; repeat for several. Default: a ladder.")
    ] = None,
    max_selected_experts: Annotated[int | None, typer.Option(min=1, help="Largest K of the graph.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names, one per line, instead of the checkpoint's.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of logits from PyTorch's.")] = TOLERANCE,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0 is all cores.")] = 0,
    rounds: Annotated[
        int, typer.Option(min=0, help="Timed runs per point and batch size; 0 measures no latency.")
    ] = ROUNDS,
    parity_images: Annotated[int, typer.Option(min=1, help="Images on which graph and model are compared.")] = (
        PARITY_IMAGES
    ),
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the parameters of CHECKPOINT or --config; export nothing."),
    ] = False,
    profile_only: Annotated[
        bool, typer.Option("--profile-only", help="Measure OUT/NAME again on this machine; export nothing.")
    ] = False,
) -> None:
    """Exports CHECKPOINT to OUT/NAME: ONNX graph, manifest with measured accuracy and latency, Triton config."""
    with _clear_errors():
        hints = Hints(
            image_size=None if image_size is None else parse_image_size(image_size),
            num_selected_experts=num_selected_experts,
            capacity_factor=capacity_factor,
            router=None if router is None else router.value,
            routing=None if routing is None else routing.value,
            position_embedding=None if positions is None else positions.value,
        )
        if dry_run:
            _print_plan(plan(read_architecture(checkpoint, hints, config_path=config), dtype.value))
            return
        if profile_only:
            if checkpoint is not None:
                raise typer.BadParameter("--profile-only measures OUT/NAME and takes no CHECKPOINT")
            manifest = _profile_existing(out / name, images, threads, rounds)
        else:
            if checkpoint is None:
                raise typer.BadParameter("CHECKPOINT is missing (only --profile-only goes without)")
            manifest = _export(
                _load(checkpoint, hints, config), checkpoint, name, out, images, dtype.value, input_type.value,
                group_images or 1, point or [], max_selected_experts, labels, tolerance, threads, rounds, parity_images,
            )  # fmt: skip
    _print_points(manifest)
    console.print(f"{out / name} is ready")


def _load(path: Path, hints: Hints, config: Path | None) -> Checkpoint:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("read", total=None)
        return load_source(
            path,
            hints,
            config_path=config,
            progress=lambda read, total: bar.update(task, total=total, advance=read),
        )


def _export(
    loaded: Checkpoint,
    path: Path,
    name: str,
    out: Path,
    images: Path | None,
    dtype: WeightType,
    input_type: InputType,
    group_images: int,
    points: list[str],
    max_selected_experts: int | None,
    labels: Path | None,
    tolerance: float,
    threads: int,
    rounds: int,
    parity_images: int,
) -> Manifest:
    if labels is not None:
        loaded = loaded.with_labels(tuple(labels.read_text().splitlines()))
    loaded = loaded.with_group_images(group_images)
    if dtype != "float32":  # parity is checked against the model that is stored, not the one that was trained
        loaded = loaded.rounded_to(torch.float16 if dtype == "float16" else torch.bfloat16)
    config, preprocessing = loaded.config, loaded.preprocessing
    chosen = [parse_point(text) for text in points] or default_points(config)
    ladder = make_points(config, chosen) if config.moe is not None else ()
    most = 0 if config.moe is None else max(max_selected_experts or 0, *(p.num_selected_experts for p in ladder))
    data = None if images is None else _labelled(images, preprocessing, loaded.labels)
    state = {key: value.numpy() for key, value in loaded.state.items()}
    if config.position_embedding == "sincos2d":
        state["sincos2d"] = loaded.model().sincos2d.numpy()
    graph = build_graph(
        config, state, preprocessing, input_type=input_type, weight_type=dtype, max_selected_experts=most or None
    )

    def finish(model: Path) -> Manifest:
        parity = _parity(loaded, model, data, ladder, input_type, tolerance, threads, parity_images)
        manifest = Manifest(
            name=name,
            architecture=config,
            preprocessing=preprocessing,
            labels=loaded.labels,
            input=input_type,
            weights=dtype,
            max_selected_experts=most,
            max_batch_size=MAX_BATCH_SIZE * group_images,
            points=ladder,
            parity=parity,
            provenance=_provenance(path),
            files={},
        )
        return _profile(manifest, model, images, data, threads, rounds)

    return write_bundle(out / name, graph, finish)


def _profile_existing(directory: Path, images: Path | None, threads: int, rounds: int) -> Manifest:
    bundle = Bundle.load(directory)
    data = None if images is None else _labelled(images, bundle.manifest.preprocessing, bundle.manifest.labels)
    manifest = _profile(bundle.manifest, bundle.model_path, images, data, threads, rounds)
    write_manifest(directory, manifest)
    return manifest


def _parity(
    loaded: Checkpoint,
    model: Path,
    data: LabelledImages | None,
    points: tuple[Point, ...],
    input_type: InputType,
    tolerance: float,
    threads: int,
    num_images: int,
) -> Parity:
    group = 1 if loaded.config.moe is None else loaded.config.moe.group_images
    samples = _samples(loaded.preprocessing, data, -(-num_images // group) * group)
    cases: list[Point | None] = [*points] or [None]
    with _progress() as bar:
        task = bar.add_task("parity", total=len(samples) * len(cases))
        return check_parity(
            loaded.model(),
            open_session(model, threads),
            samples,
            loaded.preprocessing,
            cases,
            normalized_input=input_type == "float32",
            tolerance=tolerance,
            advance=lambda count: bar.advance(task, count),
        )


def _profile(
    manifest: Manifest, model: Path, images: Path | None, data: LabelledImages | None, threads: int, rounds: int
) -> Manifest:
    """Accuracy when there are images, latency in any case; the manifest with both filled in."""
    session = open_session(model, threads)
    points, config = manifest.points, manifest.architecture
    group = 1 if config.moe is None else config.moe.group_images

    def prepare(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.generic]:
        return normalize(batch, manifest.preprocessing) if manifest.input == "float32" else batch

    profile = describe_machine(threads, None, 0)
    if manifest.profile is not None:  # accuracy does not depend on the machine: keep it unless it is measured again
        kept = {"images": manifest.profile.images, "num_images": manifest.profile.num_images}
        profile = profile.model_copy(update=kept)
    with _progress() as bar:
        if data is not None and points:
            task = bar.add_task("accuracy", total=len(data) * len(points))
            measured = measure_accuracy(
                session, data, prepare, points, batch_size=32 * group, advance=lambda n: bar.advance(task, n)
            )
            points = with_accuracy(config, points, measured)
            profile = profile.model_copy(update={"images": str(images), "num_images": len(data)})
        if rounds:
            batch_sizes = [size * group for size in BATCH_SIZES]
            task = bar.add_task("latency", total=rounds * len(points) * len(batch_sizes))
            samples = prepare(_samples(manifest.preprocessing, data, max(batch_sizes)))
            points = measure_latency(
                session, samples, points, batch_sizes=batch_sizes, rounds=rounds, advance=lambda n: bar.advance(task, n)
            )
    return manifest.model_copy(update={"points": points, "profile": profile})


def _labelled(path: Path, preprocessing: Preprocessing, labels: tuple[str, ...]) -> LabelledImages:
    data = load_images(path, preprocessing, train=False)
    check_classes(data, labels)
    return data


def _samples(preprocessing: Preprocessing, data: LabelledImages | None, count: int) -> npt.NDArray[np.uint8]:
    """Seeded noise, and real images for the first half when there are any: (count, H, W, channels)."""
    shape = (count, *preprocessing.image_size, preprocessing.channels)
    samples = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if data is not None:
        real = min(count // 2, len(data))
        samples[:real] = data.read(np.arange(real))[0]
    return samples


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


def _print_plan(planned: Plan) -> None:
    table = Table("part", "parameters", "MB", "experts", "MB per expert")
    for part in planned.parts:
        size_mb = part.num_parameters * planned.bytes_per_parameter / 1e6
        spread = ("-", "-") if part.copies == 1 else (str(part.copies), f"{size_mb / part.copies:,.1f}")
        table.add_row(part.name, f"{part.num_parameters:,}", f"{size_mb:,.1f}", *spread)
    table.add_section()
    table.add_row("all", f"{planned.num_parameters:,}", f"{planned.size_bytes / 1e6:,.1f}", "", "")
    console.print(table)


def _print_points(manifest: Manifest) -> None:
    table = Table("C", "K", "slots", "accuracy", "kept", "compute", "b1 ms", "b8 ms", title=manifest.name)
    for point in manifest.points:
        latency = {entry.batch_size: entry.median_s for entry in point.latency}
        table.add_row(
            f"{point.capacity_factor:g}",
            str(point.num_selected_experts),
            str(point.slots[0]),
            "-" if point.accuracy is None else f"{100 * point.accuracy:.2f} %",
            "-" if point.kept is None else f"{np.mean(point.kept):.2f}",
            f"{point.relative_compute:.2f}",
            *(f"{1000 * latency[size]:.2f}" if size in latency else "-" for size in (1, 8)),
            style="dim" if point.dominated else None,
        )
    console.print(table)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input ends with one line and exit code 1, not with a traceback."""
    try:
        yield
    except (ParityError, ValueError, OSError) as error:  # BundleError, CheckpointError, DataError are ValueErrors
        typer.echo(f"error: {error}", err=True)  # not through rich, which reads brackets as markup
        raise typer.Exit(1) from error
