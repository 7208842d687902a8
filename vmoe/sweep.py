"""Accuracy against the capacity factor: for both queue orders, several K, and routing groups of one or more images.

The figure of section 4 of the paper for any checkpoint. Queue order and group size are properties of inference, so one
set of weights is swept under all of them. In groups of several images an answer depends on who shares the group: there
the images are shuffled by several seeds.

Intervals are percentiles of the bootstrap over images, with the same resamples for every point, so that differences
between points are differences on the same images.

Axes: P operating points, N images, R resamples, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from vmoe.checkpoint import Checkpoint
from vmoe.config import ModelConfig, Routing
from vmoe.data import LabelledImages
from vmoe.evaluate import forward_passes
from vmoe.operating_point import OperatingPoint

CAPACITY_FACTORS = (0.05, 0.1, 0.15, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)  # denser where curves bend
CONFIDENCE = 0.95


@dataclass(frozen=True)
class SweepSettings:
    """What to measure.

    Attributes:
        seeds: shufflings of the images for groups of several.
        limit: only the first images; whole groups of every size are taken, so that all points see the same images.
        resamples: R of the bootstrap.
    """

    capacity_factors: tuple[float, ...] = CAPACITY_FACTORS
    selected_experts: tuple[int, ...] = (1, 2, 3, 4)
    routings: tuple[Routing, ...] = ("bpr", "vanilla")
    group_images: tuple[int, ...] = (1, 16)
    seeds: int = 2
    limit: int | None = None
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name in ("seeds", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.group_images) < 1:
            raise ValueError(f"group_images must be at least 1, got {min(self.group_images)}")

    def points(self, config: ModelConfig) -> list[OperatingPoint]:
        """Every C with every K that a sparse model has experts for: (P,).

        Raises:
            ValueError: the experts choose the tokens, so there is neither K nor a queue; or no K is possible.
        """
        assert config.moe is not None
        if config.moe.router != "experts_per_item":
            raise ValueError(f"a sweep is over K and queue orders, which a model with router {config.moe.router} lacks")
        possible = [k for k in self.selected_experts if k <= config.moe.num_experts]
        if not possible:
            raise ValueError(f"K must be at most {config.moe.num_experts}, got {list(self.selected_experts)}")
        return [OperatingPoint(c, k) for k in possible for c in self.capacity_factors]

    def num_images(self, available: int) -> int:
        """N, a multiple of every group size.

        Raises:
            ValueError: nothing is left.
        """
        multiple = math.lcm(*self.group_images)
        total = available if self.limit is None else min(self.limit, available)
        if total < multiple:
            raise ValueError(f"groups of {list(self.group_images)} need at least {multiple} images, got {total}")
        return total - total % multiple


@dataclass(frozen=True)
class Interval:
    """A mean over images and its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class SweepPoint:
    """One point of one curve.

    Attributes:
        routing, point: None for a dense model.
        slots: per expert and group; 0 for a dense model.
        kept: mean share of assignments processed, per MoE layer: (L,).
        accuracy: top-1, mean over the shufflings.
        minus_full: accuracy minus that of the model as it was configured, in groups of one image.
    """

    routing: Routing | None
    group_images: int
    point: OperatingPoint | None
    slots: int
    kept: tuple[float, ...]
    accuracy: Interval
    minus_full: Interval
    num_images: int


class Bootstrap:
    """Seeded resamples of N images."""

    def __init__(self, num_images: int, resamples: int) -> None:
        draws = np.random.default_rng(0).multinomial(num_images, np.full(num_images, 1 / num_images), size=resamples)
        self._weights = draws.astype(np.float32) / num_images  # (R, N)

    def interval(self, values: npt.NDArray[np.float32]) -> Interval:
        """Of the mean of `values` (N,)."""
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self._weights @ values, (tail, 1 - tail))
        return Interval(float(values.mean(dtype=np.float64)), float(low), float(high))


def sweep(
    loaded: Checkpoint,
    data: LabelledImages,
    settings: SweepSettings,
    *,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[SweepPoint]:
    """All curves of one model; a dense model is a single point.

    Arguments:
        data: numbered as the model numbers its classes.
        advance: called with the number of images done, `num_passes` times N in all.

    Raises:
        ValueError: see `SweepSettings`.
    """
    total = settings.num_images(len(data))
    bootstrap = Bootstrap(total, settings.resamples)
    in_order = [np.arange(total)]
    one = _with_moe(loaded, group_images=1)
    full_point = loaded.config.operating_point
    full, _ = _measure(one, data, [full_point], in_order, device, advance)
    if loaded.config.moe is None:
        unchanged = Interval(0.0, 0.0, 0.0)
        return [SweepPoint(None, 1, None, 0, (), bootstrap.interval(full[0]), unchanged, total)]
    found = []
    points = settings.points(loaded.config)
    for group in settings.group_images:
        orders = [np.random.default_rng([group, seed]).permutation(total) for seed in range(settings.seeds)]
        for routing in settings.routings:
            variant = _with_moe(loaded, group_images=group, routing=routing)
            # Neighbouring C often buy the same slots, and then the same answers.
            distinct = {_key(variant.config, point): point for point in points}
            measured = _measure(
                variant, data, list(distinct.values()), orders if group > 1 else in_order, device, advance
            )
            by_key = dict(zip(distinct, zip(*measured, strict=True), strict=True))
            for point in points:
                correct, kept = by_key[_key(variant.config, point)]
                accuracy, minus_full = bootstrap.interval(correct), bootstrap.interval(correct - full[0])
                slots = variant.config.slots(point)[0]
                found.append(
                    SweepPoint(routing, group, point, slots, tuple(kept.tolist()), accuracy, minus_full, total)
                )
    return found


def num_passes(config: ModelConfig, settings: SweepSettings) -> int:
    """Forward passes per image, for a progress bar."""
    if config.moe is None:
        return 1
    passes = 1
    for group in settings.group_images:
        grouped = replace(config, moe=replace(config.moe, group_images=group))
        distinct = {_key(grouped, point) for point in settings.points(config)}
        passes += len(distinct) * len(settings.routings) * (1 if group == 1 else settings.seeds)
    return passes


def _key(config: ModelConfig, point: OperatingPoint) -> tuple[int, int]:
    return point.num_selected_experts, config.slots(point)[0]


def _with_moe(loaded: Checkpoint, *, group_images: int, routing: Routing | None = None) -> Checkpoint:
    moe = loaded.config.moe
    if moe is None:
        return loaded
    changed = replace(moe, group_images=group_images, routing=routing or moe.routing)
    return replace(loaded, config=replace(loaded.config, moe=changed))


def _measure(
    loaded: Checkpoint,
    data: LabelledImages,
    points: Sequence[OperatingPoint | None],
    orders: Sequence[npt.NDArray[np.int64]],
    device: torch.device | None,
    advance: Callable[[int], None],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Share of the orders in which each image was classified rightly (P, N), and share of assignments kept (P, L)."""
    model = loaded.model().to(device)
    correct = np.zeros((len(points), len(orders[0])), dtype=np.float32)
    num_layers = 0 if loaded.config.moe is None else len(loaded.config.moe.layers)
    kept = np.zeros((len(points), num_layers))
    for order in orders:
        for done in forward_passes(model, data, loaded.preprocessing, points, order, advance=advance):
            correct[done.point, done.indices] += done.correct
            if done.output.statistics is not None:
                kept[done.point] += done.output.statistics.kept.double().sum(0).cpu().numpy()
    return correct / np.float32(len(orders)), kept / (len(orders) * len(orders[0]))
