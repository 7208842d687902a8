"""From images to the products of an 8-bit graph: which images and operating points, and the record of both. Torch-free.

Axes: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from rich.console import Console

from exporter.bundle import Point, Quantisation
from exporter.calibration import CalibrationError, WatchedProducts, calibrate
from exporter.int8 import WEIGHT_BITS, Int8Products
from exporter.measure import count_progress
from exporter.products import Products
from exporter.profiling import images_per_batch
from vmoe.config import ModelConfig
from vmoe.data import LabelledImages

# To calibrate on, where there are as many. Chosen: large models are compared on as few as 4, too few for a range.
FEWEST_IMAGES: Final = 64


def pick_images(
    pictures: LabelledImages, test: LabelledImages | None, path: Path, count: int, group: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images to calibrate on, and images to compare answers on: whole routing groups, a seeded choice.

    Noise has no best class to agree on, and what was calibrated on proves little: the comparison takes `test`, or else
    pictures that the calibration leaves.

    Arguments:
        path: of the pictures, for the message.
        count: to compare on, at most; to calibrate on, too, but FEWEST_IMAGES where it is fewer.

    Raises:
        CalibrationError: there are too few pictures.
    """
    available = len(pictures) if test is not None else len(pictures) // 2
    taken = min(max(count, FEWEST_IMAGES), available) // group * group
    if not taken:
        needed = group if test is not None else 2 * group
        raise CalibrationError(f"{path} holds {len(pictures)} images, int8 needs {needed} at least")
    order = np.random.default_rng(0).permutation(len(pictures))
    rest, others = (pictures, order[taken:]) if test is None else (test, np.arange(len(test)))
    others = np.random.default_rng(1).permutation(others)[: min(count, len(others)) // group * group]
    return pictures.read(order[:taken])[0], rest.read(others)[0]


def quantised_products(
    build: Callable[[Products], ir.Model],
    config: ModelConfig,
    points: Sequence[Point],
    images: npt.NDArray[np.generic],
    path: Path,
    threads: int,
    console: Console,
) -> tuple[Int8Products, Quantisation]:
    """Measures ranges with the float32 graph.

    Arguments:
        build: the graph with other products.
        points: of the bundle; see `calibration_points`.
        images: (B, H, W, channels) in the graph's input type, of the data set `path`.
        threads: of the runtime; 0 is all cores.

    Raises:
        CalibrationError: the images give no ranges.
    """
    points = calibration_points(points)
    group = 1 if config.moe is None else config.moe.group_images
    watching = WatchedProducts()
    graph = build(watching)
    # The activations of all layers are kept until the end of a run, not those of one layer at a time.
    batch_size = max(1, images_per_batch(config) // config.num_layers // group) * group
    with count_progress(console) as bar:
        task = bar.add_task("calibration", total=2 * len(images) * max(1, len(points)))
        ranges = calibrate(
            graph,
            watching.watched,
            images,
            points,
            batch_size=batch_size,
            threads=threads,
            advance=lambda count: bar.advance(task, count),
        )
    names = tuple(str(point.operating_point) for point in points)
    return Int8Products(ranges), Quantisation(
        images=str(path), num_images=len(images), points=names, weight_bits=WEIGHT_BITS
    )


def calibration_points(points: Sequence[Point]) -> tuple[Point, ...]:
    """The cheapest, the one in the middle and the full one: what experts read depends on whom they serve."""
    places = sorted({0, len(points) // 2, len(points) - 1}) if points else []
    return tuple(points[place] for place in places)
