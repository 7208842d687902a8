"""Ranges of the activations that the graph's large products read, measured on images. Torch-free.

The float32 graph runs twice over all images at several operating points: once for the extremes of every activation,
once for a histogram between them. Experts read only the tokens that they serve, so only these count. Then the clipping
range with the least expected squared error is chosen for each, as `clip` says.

Axes: B images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from exporter.bundle import Point
from exporter.int8 import Range
from exporter.products import Products
from exporter.session import open_session, run
from exporter.tape import Tape

BINS: Final = 4096  # chosen: 16 to a step of 1 / 256 of the full range
_CANDIDATES: Final = 128  # clipping bounds that are tried at either end; chosen


class CalibrationError(ValueError):
    """Images that give no ranges; the message says what is wrong with them."""


class WatchedProducts(Products):
    """Writes float32 products and keeps what those of the blocks read: 8 bits are for them alone.

    Attributes:
        watched: values of the graph by the name of the activation; experts share one.
    """

    def __init__(self) -> None:
        self.watched: dict[str, list[ir.Value]] = {}

    def operand(self, tape: Tape, rows: ir.Value, reads: str) -> ir.Value:
        if reads.startswith("blocks."):  # not head, pooling and what feeds them
            self.watched.setdefault(reads, []).append(rows)
        return rows


def calibrate(
    graph: ir.Model,
    watched: Mapping[str, Sequence[ir.Value]],
    images: npt.NDArray[np.generic],
    points: Sequence[Point],
    *,
    batch_size: int,
    threads: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Range]:
    """Range of every watched activation.

    Arguments:
        graph: written with the `WatchedProducts` that `watched` is of; it gets further outputs.
        images: (B, H, W, channels) in the graph's input type.
        points: operating points to run at; empty for a dense model.
        batch_size: images of a run, whose watched activations are in memory together.
        advance: called with the number of images done, 2B for each point in all.

    Raises:
        CalibrationError: there are no images, or an activation is not finite or 0 on all of them.
    """
    if not len(images):
        raise CalibrationError("calibration needs images, got none")
    for read in watched.values():
        for value in read:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.graph.outputs.append(value)
    names = {name: [str(value.name) for value in read] for name, read in watched.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        ir.save(graph, path, external_data="watched.data")
        session = open_session(path, threads)

        def activations() -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
            return _activations(session, names, images, points, batch_size, advance)

        extremes = dict.fromkeys(names, (0.0, 0.0))
        for name, values in activations():
            low, high = extremes[name]
            ends = np.minimum(low, values.min(initial=0)), np.maximum(high, values.max(initial=0))  # keeps NaN
            extremes[name] = float(ends[0]), float(ends[1])
        for name, (low, high) in extremes.items():
            if not 0 < high - low < np.inf:
                raise CalibrationError(
                    f"activation {name} ranges from {low:g} to {high:g} on {len(images)} images, expected finite "
                    "values other than 0"
                )
        counts = {name: np.zeros(BINS, np.int64) for name in names}
        for name, values in activations():
            low, high = extremes[name]
            places = ((values.ravel() - low) * (BINS / (high - low))).astype(np.int32)
            counts[name] += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)
    return {name: clip(counts[name], *extremes[name]) for name in names}


def clip(counts: npt.NDArray[np.int64], low: float, high: float) -> Range:
    """The range with the least expected squared error of 8-bit values.

        error(a, b) = sum over x < a of (a - x)^2 + sum over x > b of (x - b)^2 + n * step^2 / 12,  step = (b - a) / 255

    for a <= 0 <= b; step^2 / 12 is the variance of rounding.

    Arguments:
        counts: (BINS,) of equal bins from `low` <= 0 to `high` >= 0.
    """
    centres = low + (np.arange(BINS) + 0.5) * ((high - low) / BINS)
    lows, highs = (np.linspace(bound, 0, _CANDIDATES, endpoint=False) for bound in (low, high))
    below = np.array([(counts * np.square(np.minimum(centres - a, 0))).sum() for a in lows])
    above = np.array([(counts * np.square(np.maximum(centres - b, 0))).sum() for b in highs])
    steps = (highs[None, :] - lows[:, None]) / 255
    error = below[:, None] + above[None, :] + counts.sum() * np.square(steps) / 12
    error[steps <= 0] = np.inf  # both bounds 0
    a, b = np.unravel_index(int(error.argmin()), error.shape)
    return Range(float(lows[a]), float(highs[b]))


def _activations(
    session: ort.InferenceSession,
    names: Mapping[str, Sequence[str]],
    images: npt.NDArray[np.generic],
    points: Sequence[Point],
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every watched activation of every batch at every point, under its name."""
    outputs = [(name, output) for name, several in names.items() for output in several]
    for point in points or (None,):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            found = run(session, batch, point, [output for _, output in outputs])
            for (name, _), values in zip(outputs, found, strict=True):
                yield name, np.asarray(values, np.float32)
            advance(len(batch))
