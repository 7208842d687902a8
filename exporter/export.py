"""From a checkpoint to a bundle: read, build the graph, compare it with PyTorch, measure it, write all or nothing."""

from __future__ import annotations

import datetime
import hashlib
import platform
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from exporter.bundle import InputType, Manifest, Parity, Provenance, StorageType, Target, sha256
from exporter.cuda import HalfProducts, PaddedLayers
from exporter.graph import build_graph
from exporter.measure import count_progress, labelled_images, measure, sample_images
from exporter.moe_graph import MoeLayers
from exporter.parity import Answers, check_parity, model_answers
from exporter.plan import Plan, plan
from exporter.products import Products
from exporter.profiling import default_effort, default_points, make_points
from exporter.quantise import pick_images, quantised_products
from exporter.repository import write_bundle
from exporter.session import has_cuda, open_session
from exporter.triton_config import TritonOptions
from vmoe.architecture import Hints
from vmoe.checkpoint import Checkpoint
from vmoe.class_names import IMAGENET_1K, IMAGENET_1K_CLASSES, read_class_names
from vmoe.data import LabelledImages, load_images
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Fit, normalize
from vmoe.sources import find_source, load_source, read_architecture

MAX_BATCH_SIZE = 32
# Of `Parity.max_abs_error`: the two runtimes agree to about 1e-5 on trained models.
TOLERANCE = 1e-4
# Of `Parity.relative_error`, chosen: five times what the shipped model shows (docs/quantisation.md).
INT8_TOLERANCE = 0.1
# Of the same, chosen: float16 products of a small random model stay well below it (tests/exporter/test_cuda.py).
CUDA_TOLERANCE = 0.02


@dataclass(frozen=True)
class ExportOptions:
    """What becomes of a checkpoint; see the command line's help for each.

    Attributes:
        checkpoint: any kind that `vmoe.sources` reads.
        config: constructor arguments of the reference, None to infer them.
        hints: what the checkpoint cannot tell, and overrides.
        points: operating points of the manifest; empty for the default ladder.
        max_selected_experts: largest K of the graph, None for the ladder's.
        mean, std, fit, crop_fraction: None keeps the checkpoint's preprocessing.
        calibration_images: with int8 alone, which needs them: a data set, or its training split where it has one.
        target: what runs the graph; with cuda the dtype is float16.
        tolerance: None is that of dtype and target, see TOLERANCE, INT8_TOLERANCE and CUDA_TOLERANCE.
        min_agreement: with int8 or cuda, the smallest share of images with the model's best class.
        labels: a file with a name per line, or `imagenet-1k`; None keeps the checkpoint's.
        parity_images, rounds: None chooses them by the model's size, see `exporter.profiling.default_effort`.
        triton: how Triton shall run the model.
    """

    checkpoint: Path
    config: Path | None
    hints: Hints
    dtype: StorageType
    target: Target
    input_type: InputType
    group_images: int
    points: tuple[OperatingPoint, ...]
    max_selected_experts: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    fit: Fit | None
    crop_fraction: float | None
    labels: str | None
    images: Path | None
    calibration_images: Path | None
    tolerance: float | None
    min_agreement: float
    parity_images: int | None
    threads: int
    rounds: int | None
    triton: TritonOptions


def plan_export(checkpoint: Path | None, hints: Hints, config: Path | None, dtype: StorageType) -> Plan:
    """What an export would store, without reading a weight."""
    return plan(read_architecture(checkpoint, hints, config_path=config), dtype)


@dataclass(frozen=True)
class _Prepared:
    """What remains of a model when its parameters lie in a graph.

    Attributes:
        manifest: without parity, measurements and hashes.
        samples: (B, H, W, channels), the images that `answers` are about.
        data: the accuracy images.
    """

    manifest: Manifest
    graph: ir.Model
    samples: npt.NDArray[np.uint8]
    answers: tuple[Answers, ...]
    data: LabelledImages | None


def export_checkpoint(directory: Path, options: ExportOptions, console: Console) -> Manifest:
    """Writes the bundle `directory`.

    PyTorch answers before the graph is written, ONNX Runtime after that and when PyTorch's weights are gone: the two
    never hold the weights together.

    Raises:
        ValueError, OSError: bad input, named in the message; nothing was written. Among them CalibrationError.
        ParityError: the graph answers differently from PyTorch; nothing was written.
    """
    prepared = _prepare(directory.name, options, console)
    rounds = options.rounds
    if options.target == "cuda" and not has_cuda():
        rounds = 0
        console.print("No CUDA device: latency is not measured. --profile-only does it where there is one.")

    def finish(model: Path) -> Manifest:
        # One session for both: what a closed one gave back is in pieces, and a second raised the peak of B/16 with
        # float16 weights by 0.15 and 0.46 GB in two comparisons.
        session = open_session(model, options.threads, options.target)
        parity = _compare(session, prepared, options, console)
        manifest = prepared.manifest.model_copy(update={"parity": parity})
        return measure(manifest, session, options.images, prepared.data, options.threads, rounds, console)

    return write_bundle(directory, prepared.graph, finish, options.triton)


def _compare(
    session: onnxruntime.InferenceSession, prepared: _Prepared, options: ExportOptions, console: Console
) -> Parity:
    """The graph's answers with PyTorch's; raises ParityError."""
    rounded = options.dtype == "int8" or options.target == "cuda"
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = CUDA_TOLERANCE if options.target == "cuda" else INT8_TOLERANCE if rounded else TOLERANCE
    manifest = prepared.manifest
    with count_progress(console) as bar:
        task = bar.add_task("parity, graph", total=len(prepared.samples) * len(prepared.answers))
        return check_parity(
            session,
            manifest.architecture,
            prepared.samples,
            manifest.preprocessing,
            prepared.answers,
            normalized_input=manifest.input == "float32",
            tolerance=tolerance,
            min_agreement=options.min_agreement if rounded else None,
            advance=lambda count: bar.advance(task, count),
        )


def _prepare(name: str, options: ExportOptions, console: Console) -> _Prepared:
    """Reads the checkpoint and lets PyTorch answer; when this returns, the graph alone holds the parameters."""
    loaded = _load(options, console)
    config, preprocessing = loaded.config, loaded.preprocessing
    ladder = make_points(config, options.points or default_points(config)) if config.moe is not None else ()
    most = 0
    if config.moe is not None:
        most = max(options.max_selected_experts or 0, *(point.num_selected_experts for point in ladder))
    data = None if options.images is None else labelled_images(options.images, preprocessing, loaded.labels)
    model = loaded.model()
    state = {key: value.numpy() for key, value in loaded.state.items()}
    if config.position_embedding == "sincos2d":
        state["sincos2d"] = model.sincos2d.numpy()

    def build(products: Products | None = None) -> ir.Model:
        return build_graph(
            config,
            state,
            preprocessing,
            input_type=options.input_type,
            weight_type="float32" if options.dtype == "int8" else options.dtype,
            max_selected_experts=most or None,
            moe_layers=PaddedLayers if options.target == "cuda" else MoeLayers,
            products=products,
        )

    parity_images = options.parity_images or default_effort(config, ladder).parity_images
    parity_images = -(-parity_images // options.group_images) * options.group_images
    products: Products | None = HalfProducts() if options.target == "cuda" else None
    quantisation = None
    if options.calibration_images is None:
        samples = sample_images(preprocessing, data, parity_images)
    else:
        path = options.calibration_images
        pictures = load_images(path, preprocessing, train=True)
        chosen, samples = pick_images(pictures, data, path, parity_images, options.group_images)
        inputs = normalize(chosen, preprocessing) if options.input_type == "float32" else chosen
        products, quantisation = quantised_products(build, config, ladder, inputs, path, options.threads, console)
    manifest = Manifest(
        name=name,
        architecture=config,
        preprocessing=preprocessing,
        labels=loaded.labels,
        input=options.input_type,
        weights=options.dtype,
        target=options.target,
        max_selected_experts=most,
        max_batch_size=MAX_BATCH_SIZE * options.group_images,
        points=ladder,
        quantisation=quantisation,
        provenance=_provenance(options.checkpoint),
        files={},
    )
    graph = build(products)
    with count_progress(console) as bar:
        task = bar.add_task("parity, model", total=len(samples) * max(1, len(ladder)))
        answers = model_answers(
            model,
            samples,
            preprocessing,
            ladder,
            max_selected_experts=most,
            advance=lambda count: bar.advance(task, count),
        )
    return _Prepared(manifest, graph, samples, answers, data)


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
        loaded = loaded.with_labels(read_class_names(options.labels))
    elif len(loaded.labels) == IMAGENET_1K_CLASSES and all(map(str.isdecimal, loaded.labels)):
        console.print(f"The classes are numbered. If they are ImageNet's, --labels {IMAGENET_1K} names them.")
    preprocessing = loaded.preprocessing.overridden(
        mean=options.mean, std=options.std, fit=options.fit, crop_fraction=options.crop_fraction
    )
    loaded = replace(loaded.with_group_images(options.group_images), preprocessing=preprocessing)
    if options.dtype in (
        "float16",
        "bfloat16",
    ):  # parity is checked against the model that is stored, not the one that was trained
        loaded.round_to(torch.float16 if options.dtype == "float16" else torch.bfloat16)
    return loaded


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
