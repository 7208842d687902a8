"""Fills a manifest with what a machine shows: accuracy when there are images, latency in any case. Torch-free.

The exporter measures what it has just written; `--profile-only` measures a bundle again where it is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exporter.bundle import Bundle, Manifest, write_manifest
from exporter.profiling import (
    BATCH_SIZES,
    Timed,
    default_effort,
    describe_machine,
    images_per_batch,
    measure_accuracy,
    measure_latency,
    with_accuracy,
)
from exporter.session import open_session
from vmoe.class_subset import match_classes
from vmoe.data import LabelledImages, load_images
from vmoe.preprocess import Preprocessing, normalize


def measure_bundle(
    directory: Path, images: Path | None, threads: int, rounds: int | None, console: Console
) -> Manifest:
    """Measures a bundle again and replaces its manifest; accuracies stay where no images are given."""
    bundle = Bundle.load(directory)
    data = None if images is None else labelled_images(images, bundle.manifest.preprocessing, bundle.manifest.labels)
    session = open_session(bundle.model_path, threads, bundle.manifest.target)
    manifest = measure(bundle.manifest, session, images, data, threads, rounds, console)
    write_manifest(directory, manifest)
    return manifest


def time_together(directories: Sequence[Path], threads: int, rounds: int | None, console: Console) -> None:
    """Times several bundles of one model in one interleaved run, so that their points can be compared, and replaces
    their manifests; accuracies stay.

    Arguments:
        rounds: see `measure`; above 0.
    """
    bundles = [Bundle.load(directory) for directory in directories]
    first = bundles[0].manifest
    effort = default_effort(first.architecture, first.points)
    moe = first.architecture.moe
    group = 1 if moe is None else moe.group_images
    batch_sizes = [size * group for size in (effort.batch_sizes if rounds is None else BATCH_SIZES)]
    rounds = rounds or effort.rounds
    graphs = []
    for bundle in bundles:
        manifest = bundle.manifest
        images = sample_images(manifest.preprocessing, None, max(batch_sizes))
        inputs = normalize(images, manifest.preprocessing) if manifest.input == "float32" else images
        session = open_session(bundle.model_path, threads, manifest.target, alone=len(bundles) == 1)
        graphs.append(Timed(session, inputs, manifest.points))
    with count_progress(console) as bar:
        num_points = sum(len(graph.points) for graph in graphs)
        task = bar.add_task("latency", total=rounds * num_points * len(batch_sizes))
        timed = measure_latency(
            graphs, batch_sizes=batch_sizes, rounds=rounds, advance=lambda count: bar.advance(task, count)
        )
    for bundle, points in zip(bundles, timed, strict=True):
        before = bundle.manifest.profile
        profile = describe_machine(threads, rounds=rounds)
        if before is not None:
            profile = profile.model_copy(update={"images": before.images, "num_images": before.num_images})
        write_manifest(bundle.directory, bundle.manifest.model_copy(update={"points": points, "profile": profile}))


def measure(
    manifest: Manifest,
    session: ort.InferenceSession,
    images: Path | None,
    data: LabelledImages | None,
    threads: int,
    rounds: int | None,
    console: Console,
) -> Manifest:
    """The manifest with accuracy (where there are images) and latency (where `rounds` is not 0) filled in.

    Arguments:
        session: the graph's.
        images: where `data` came from, for the record.
        threads: of the session; 0 is all cores.
        rounds: timed runs per point and batch size; None chooses them, and the batch sizes, by the model's size.
    """
    points, config = manifest.points, manifest.architecture
    group = 1 if config.moe is None else config.moe.group_images

    def prepare(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.generic]:
        return normalize(batch, manifest.preprocessing) if manifest.input == "float32" else batch

    effort = default_effort(config, points)
    batch_sizes = [size * group for size in (effort.batch_sizes if rounds is None else BATCH_SIZES)]
    rounds = effort.rounds if rounds is None else rounds
    profile = manifest.profile
    if profile is None:
        profile = describe_machine(threads, rounds=rounds)
    elif rounds:  # accuracy does not depend on the machine: keep it unless it is measured again
        profile = describe_machine(threads, images=profile.images, num_images=profile.num_images, rounds=rounds)
    with count_progress(console) as bar:
        if data is not None and points:
            task = bar.add_task("accuracy", total=len(data) * len(points))
            measured = measure_accuracy(
                session,
                data,
                prepare,
                points,
                batch_size=images_per_batch(config),
                advance=lambda n: bar.advance(task, n),
            )
            points = with_accuracy(config, points, measured)
            profile = profile.model_copy(update={"images": str(images), "num_images": len(data)})
        if rounds:
            task = bar.add_task("latency", total=rounds * len(points) * len(batch_sizes))
            samples = prepare(sample_images(manifest.preprocessing, data, max(batch_sizes)))
            (points,) = measure_latency(
                [Timed(session, samples, points)],
                batch_sizes=batch_sizes,
                rounds=rounds,
                advance=lambda n: bar.advance(task, n),
            )
    return manifest.model_copy(update={"points": points, "profile": profile})


def labelled_images(path: Path, preprocessing: Preprocessing, labels: tuple[str, ...]) -> LabelledImages:
    """Test images of a model with these classes."""
    return match_classes(load_images(path, preprocessing, train=False), labels)


def sample_images(preprocessing: Preprocessing, data: LabelledImages | None, count: int) -> npt.NDArray[np.uint8]:
    """Seeded noise, and real images for the first half when there are any: (count, H, W, channels)."""
    shape = (count, *preprocessing.image_size, preprocessing.channels)
    samples = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if data is not None:
        real = min(count // 2, len(data))
        samples[:real] = data.read(np.arange(real))[0]
    return samples


def count_progress(console: Console) -> Progress:
    """A bar that counts."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
