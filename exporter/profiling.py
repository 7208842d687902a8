"""Accuracy, compute and latency of every operating point of a graph, on this machine. Torch-free.

Latency is interleaved: every round runs each (point, batch size) once in a shuffled order, so that a slow spell of the
machine falls on all of them alike.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from exporter.bundle import Latency, Point, Profile, dominates
from exporter.machine import processor
from exporter.session import run
from vmoe.config import ModelConfig
from vmoe.operating_point import OperatingPoint

# Chosen, not tuned: 100 rounds are the fewest in which a 99th percentile is an observation and not the maximum.
ROUNDS = 100
BATCH_SIZES: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
PARITY_IMAGES = 256  # chosen: half a minute for the shipped model; half of them seeded noise when there are real images

# Multiply-accumulates of a default export, chosen: 2 cores of an AMD EPYC with AVX-512 do some 1e11 a second (B/16, one
# image): two minutes for parity and three for the profile. S/32 at 224 pixels is the first that feels it.
PARITY_MACS, LATENCY_MACS = 1e13, 2e13
FEWEST_PARITY_IMAGES, FEWEST_ROUNDS = 4, 5  # chosen: a minute more is better than a comparison of nothing

# Of a batch whose size is free, so that activations stay small beside the weights: those of 64 images of B/16 at 384
# pixels would be four times the weights. Chosen; the shipped model reaches the 64 images.
ACTIVATION_BYTES, MOST_IMAGES_PER_BATCH = 2**26, 64
# Capacity factors of the default ladder below the configured one: halves and quarters, down to an eighth.
LADDER = (0.125, 0.25, 0.5, 0.75)


class LabelledImages(Protocol):
    """The part of `vmoe.data.LabelledImages` that is needed here, which imports torch."""

    def __len__(self) -> int: ...

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]: ...


@dataclass(frozen=True)
class Effort:
    """How closely a bundle is looked at.

    Attributes:
        parity_images: images on which graph and model are compared at every point.
        rounds: timed runs per point and batch size.
        batch_sizes: that are timed, in routing groups.
    """

    parity_images: int
    rounds: int
    batch_sizes: tuple[int, ...] = BATCH_SIZES


@dataclass(frozen=True)
class Measured:
    """Attributes:
    accuracy: top-1 over the images.
    kept: mean share of assignments processed, per MoE layer.
    """

    accuracy: float
    kept: tuple[float, ...]


def default_points(config: ModelConfig) -> tuple[OperatingPoint, ...]:
    """Every K up to the configured one with the ladder of capacity factors; the configured point last."""
    full = config.operating_point
    if full is None:
        return ()
    factors = [c for c in LADDER if c < full.capacity_factor] + [full.capacity_factor]
    return tuple(OperatingPoint(c, k) for k in range(1, full.num_selected_experts + 1) for c in factors)


def default_effort(config: ModelConfig, points: Sequence[Point]) -> Effort:
    """What a default export can afford: minutes on two cores, whatever the size of the model.

    With M the multiply-accumulates of one image at all points:

        parity images    as many as PARITY_MACS pay for in both runtimes: PARITY_MACS / 2M, from FEWEST_PARITY_IMAGES to
                         PARITY_IMAGES
        rounds           LATENCY_MACS / (M * sum of the batch sizes), less one for the warm-up, at most ROUNDS
        batch sizes      all; while that leaves fewer than FEWEST_ROUNDS, the largest is dropped. One image is always
                         timed, FEWEST_ROUNDS times.
    """
    group = 1 if config.moe is None else config.moe.group_images
    macs = sum(macs_per_image(config, _assignments(config, point)) for point in points) or macs_per_image(config, ())
    images = max(FEWEST_PARITY_IMAGES, min(PARITY_IMAGES, int(PARITY_MACS / (2 * macs))))
    batch_sizes = BATCH_SIZES
    while (rounds := int(LATENCY_MACS / (macs * group * sum(batch_sizes))) - 1) < FEWEST_ROUNDS:
        if len(batch_sizes) == 1:
            rounds = FEWEST_ROUNDS
            break
        batch_sizes = batch_sizes[:-1]
    return Effort(images, min(ROUNDS, rounds), batch_sizes)


def images_per_batch(config: ModelConfig) -> int:
    """Images of a batch that need not have a certain size, in whole routing groups; see ACTIVATION_BYTES.

    The activations of a token that live at once are taken to be 6 D (residual, norm, queries, keys, values, output),
    4 F (both sides of GELU for two experts) and 2 H S (scores and attention weights) floats.
    """
    group = 1 if config.moe is None else config.moe.group_images
    tokens = config.tokens_per_image
    floats = 6 * config.hidden_size + 4 * config.mlp_dim + 2 * config.num_heads * tokens
    images = min(MOST_IMAGES_PER_BATCH, ACTIVATION_BYTES // (4 * tokens * floats))
    return max(1, images // group) * group


def macs_per_image(config: ModelConfig, kept_assignments: Sequence[float]) -> float:
    """Multiply-accumulates of one forward pass.

    Arguments:
        kept_assignments: processed (token, expert) pairs of each MoE layer.
    """
    tokens, size, mlp = config.tokens_per_image, config.hidden_size, config.mlp_dim
    patches = config.grid[0] * config.grid[1]
    embedding = patches * config.patch_size[0] * config.patch_size[1] * config.channels * size
    attention = 4 * tokens * size**2 + 2 * tokens**2 * size
    num_moe = 0 if config.moe is None else len(config.moe.layers)
    dense = (config.num_layers - num_moe) * 2 * tokens * size * mlp
    router = 0 if config.moe is None else num_moe * tokens * size * config.moe.num_experts
    experts = sum(kept_assignments) * 2 * size * mlp
    head = size * config.num_classes
    if config.representation_size is not None:
        head = size * config.representation_size + config.representation_size * config.num_classes
    if config.classifier == "map":
        head += 2 * tokens * size**2 + 2 * tokens * size + 2 * size**2 + 2 * size * mlp
    return embedding + config.num_layers * attention + dense + router + experts + head


def make_points(config: ModelConfig, points: Sequence[OperatingPoint]) -> tuple[Point, ...]:
    """Manifest entries without measurements, cheapest first; points with the same K and slots are merged.

    Relative compute is the bound that assumes all slots filled, until accuracy images tell the kept share.
    """
    unique: dict[tuple[int, tuple[int, ...]], Point] = {}
    for point in points:
        slots = config.slots(point)
        unique.setdefault(
            (point.num_selected_experts, slots),
            Point(
                capacity_factor=point.capacity_factor,
                num_selected_experts=point.num_selected_experts,
                slots=slots,
                relative_compute=1.0,
            ),
        )
    return _with_compute(config, list(unique.values()))


def measure_accuracy(
    session: ort.InferenceSession,
    data: LabelledImages,
    prepare: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.generic]],
    points: Sequence[Point | None],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Measured]:
    """Top-1 accuracy and kept share of each point over a data set.

    Arguments:
        prepare: uint8 images to the graph's input type.
        batch_size: whole routing groups; a rest that fills no batch is left out only if it fills no group.
        advance: called with the number of images done.
    """
    correct = np.zeros(len(points), np.int64)
    kept = [np.zeros(0) for _ in points]
    for start in range(0, len(data), batch_size):
        images, targets = data.read(np.arange(start, min(start + batch_size, len(data))))
        inputs = prepare(images)
        for index, point in enumerate(points):
            logits, *shares = run(session, inputs, point, ["logits"] if point is None else ["logits", "kept"])
            correct[index] += int((logits.argmax(-1) == targets).sum())
            if shares:
                total = np.asarray(shares[0], np.float64).sum(0)
                kept[index] = total if start == 0 else kept[index] + total
            advance(len(images))
    return [
        Measured(int(right) / len(data), tuple((share / len(data)).tolist()))
        for right, share in zip(correct, kept, strict=True)
    ]


def with_accuracy(config: ModelConfig, points: Sequence[Point], measured: Sequence[Measured]) -> tuple[Point, ...]:
    """Fills in accuracy, kept share and the compute that follows from it, and marks dominated points."""
    filled = [
        point.model_copy(update={"accuracy": found.accuracy, "kept": found.kept})
        for point, found in zip(points, measured, strict=True)
    ]
    ordered = _with_compute(config, filled)
    return tuple(
        point.model_copy(update={"dominated": point is not ordered[-1] and any(dominates(q, point) for q in ordered)})
        for point in ordered
    )


@dataclass(frozen=True, eq=False)
class Timed:
    """A graph to be timed.

    Attributes:
        images: at least as many as the largest batch, in the graph's input type.
        points: operating points to time it at.
    """

    session: ort.InferenceSession
    images: npt.NDArray[np.generic]
    points: Sequence[Point]


def measure_latency(
    graphs: Sequence[Timed],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = ROUNDS,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[Point, ...]]:
    """The points of every graph with the median and the 99th percentile of the inference time per batch size.

    Arguments:
        graphs: a round runs all of them, so that their times can be compared.
        advance: called with the number of runs done.
    """
    cases = [(graph, index, batch) for graph in graphs for index in range(len(graph.points)) for batch in batch_sizes]
    times: list[list[float]] = [[] for _ in cases]
    generator = np.random.default_rng(seed)
    for graph, index, batch in cases:  # warm-up: memory arenas grow to their size
        run(graph.session, graph.images[:batch], graph.points[index], ["logits"])
    for _ in range(rounds):
        for position in generator.permutation(len(cases)):
            graph, index, batch = cases[position]
            start = time.perf_counter()
            run(graph.session, graph.images[:batch], graph.points[index], ["logits"])
            times[position].append(time.perf_counter() - start)
            advance(1)
    found = iter(zip(cases, times, strict=True))
    return [
        tuple(
            point.model_copy(update={"latency": tuple(_latency(*next(found)) for _ in batch_sizes)})
            for point in graph.points
        )
        for graph in graphs
    ]


def _latency(case: tuple[Timed, int, int], seconds: Sequence[float]) -> Latency:
    median_s, p99_s = float(np.median(seconds)), float(np.quantile(seconds, 0.99))
    return Latency(batch_size=case[2], median_s=median_s, p99_s=p99_s)


def describe_machine(threads: int, *, images: str | None = None, num_images: int = 0, rounds: int = 0) -> Profile:
    """Where and how a profile was taken."""
    return Profile(
        machine=f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        runtime=f"onnxruntime {ort.__version__}",
        threads=threads or (os.cpu_count() or 1),
        date=datetime.date.today().isoformat(),
        images=images,
        num_images=num_images,
        rounds=rounds,
    )


def _with_compute(config: ModelConfig, points: Sequence[Point]) -> tuple[Point, ...]:
    """Sets relative compute and sorts by it; the configured point, or else the most expensive, is the unit."""
    macs = [macs_per_image(config, _assignments(config, point)) for point in points]
    full = max(macs)
    filled = [p.model_copy(update={"relative_compute": cost / full}) for p, cost in zip(points, macs, strict=True)]
    return tuple(sorted(filled, key=lambda p: (p.relative_compute, p.num_selected_experts)))


def _assignments(config: ModelConfig, point: Point) -> list[float]:
    assert config.moe is not None
    group = config.moe.group_images
    asked = config.tokens_per_image * point.num_selected_experts
    if point.kept is not None:
        return [share * asked for share in point.kept]
    filled = [slots * config.moe.num_experts / group for slots in point.slots]
    return filled if config.moe.router == "items_per_expert" else [min(pairs, asked) for pairs in filled]
