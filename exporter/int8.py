"""The large products of the graph in 8 bits: activations uint8 with one scale each, weights int8 with one per column.

    x ~ (q - zero_point) * scale        of an activation, from the range that `exporter.calibration` measured
    W ~ Q * column_scale                Q (in, out) within WEIGHT_MIN to WEIGHT_MAX, column_scale (out,)
    y = (q - zero_point) @ Q * (scale * column_scale) + b

Scales are constants of the graph, so an image's answer does not depend on its batch mates. (Dynamic quantisation takes
the scale from the batch: refused.) Written as QuantizeLinear, DequantizeLinear and Gemm, standard operators that ONNX
Runtime's CPU fuses into one kernel for each product, QGemm; other providers compute the same numbers in float32.

**Seven bits of weight.** Without VNNI that kernel multiplies by vpmaddubsw, which adds two products of uint8 and int8
in 16 bits and saturates. |Q| <= 64 keeps 2 * 255 * 64 = 32640 below 32767, so that every processor computes the same
sums.

Everything else stays float32: softmax, LayerNorm, attention's own two products, router, head, and what no range was
measured for.

Axes: N rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.products import Floats, Parameter, Products
from exporter.tape import Tape

WEIGHT_BITS: Final = 7
WEIGHT_MIN: Final = -(2 ** (WEIGHT_BITS - 1))
WEIGHT_MAX: Final = 2 ** (WEIGHT_BITS - 1) - 1
# Candidates for a column's scale, of the one that clips nothing: the least squared error wins. Chosen, not tuned: with
# 7 bits and bell-shaped columns the best is between 0.7 and 1.
_SHRINK: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_MAX_BIAS_STEPS: Final = 2**30  # a bias is int32 in units of scale * column_scale


@dataclass(frozen=True)
class Range:
    """What 0 to 255 stand for: `low` <= 0 <= `high`, not both 0."""

    low: float
    high: float

    @property
    def scale(self) -> np.float32:
        return np.float32((self.high - self.low) / 255)

    @property
    def zero_point(self) -> int:
        return min(max(round(-self.low / float(self.scale)), 0), 255)


class Int8Products(Products):
    """Writes the products of calibrated activations in 8 bits, all others in float32.

    Arguments:
        ranges: by the name that `Tape.operand` gets.
    """

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = ranges

    def operand(self, tape: Tape, rows: ir.Value, reads: str) -> ir.Value:
        if reads not in self._ranges:
            return rows
        return tape.op("QuantizeLinear", rows, *self._scale_of(tape, self._ranges[reads]))

    def affine(
        self, tape: Tape, operand: ir.Value, reads: str, weight: Parameter, bias: Parameter, factor: Floats | None
    ) -> ir.Value:
        if reads not in self._ranges:
            return super().affine(tape, operand, reads, weight, bias, factor)
        return self._gemm(tape, operand, self._ranges[reads], _scaled(weight, factor), _scaled(bias, factor))

    def of_pixels(self, tape: Tape, patches: ir.Value, scale: Floats, offset: Floats, name: str) -> ir.Value:
        """Pixels are 8 bits already: normalisation moves into weights and bias.

        pixel * scale + offset = (pixel - 128) * scale + (offset + 128 * scale), for every channel.
        """
        (weight_name, weight), bias = tape.linear_parameters(name)  # (in, out); channels are the last axis of `in`
        repeats = len(weight) // len(scale)
        scaled = weight * np.tile(scale, repeats)[:, None]
        shifted = np.asarray(bias[1] + np.tile(offset + 128 * scale, repeats) @ weight, np.float32)
        pixels = tape.reshape(patches, -1, len(weight))
        return self._gemm(tape, pixels, Range(-128.0, 127.0), (weight_name, scaled), (bias[0], shifted))

    def _gemm(self, tape: Tape, operand: ir.Value, values: Range, weight: Parameter, bias: Parameter) -> ir.Value:
        """The four nodes that the runtime fuses."""
        rows = tape.op("DequantizeLinear", operand, *self._scale_of(tape, values))
        column_scale = column_scales(weight[1], bias[1] / values.scale)
        quantised = tape.stored(weight[0], lambda: quantise(weight[1], column_scale), ir.DataType.INT8, weight[1].shape)
        # The zero points are the default, but without them the runtime does not fuse.
        zeros = tape.constant(np.zeros(len(column_scale)), np.int8)
        kernel = tape.op("DequantizeLinear", quantised, tape.constant(column_scale, np.float32), zeros, axis=1)
        steps = values.scale * column_scale
        counts, zeros = (tape.constant(values, np.int32) for values in (np.rint(bias[1] / steps), np.zeros(len(steps))))
        offsets = tape.op("DequantizeLinear", counts, tape.constant(steps, np.float32), zeros, axis=0)
        return tape.op("Gemm", rows, kernel, offsets)

    @staticmethod
    def _scale_of(tape: Tape, values: Range) -> tuple[ir.Value, ir.Value]:
        return tape.constant(values.scale, np.float32), tape.constant(values.zero_point, np.uint8)


def column_scales(weight: Floats, bias: Floats) -> Floats:
    """(out,) scales with the least squared error of the rounded weight (in, out).

    Arguments:
        bias: (out,) over the activation's scale, which has to fit into int32 in units of the result.
    """
    widest = np.abs(weight).max(axis=0) / WEIGHT_MAX
    widest = np.maximum(widest, np.abs(bias) / _MAX_BIAS_STEPS)
    widest = np.maximum(widest, np.finfo(np.float32).tiny).astype(np.float32)  # a column of zeros
    best: Floats = widest
    least = np.full(len(widest), np.inf, np.float32)
    for share in _SHRINK:
        scale = (widest * share).astype(np.float32)
        error = np.square(quantise(weight, scale) * scale - weight).sum(axis=0)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def quantise(weight: Floats, column_scale: Floats) -> npt.NDArray[np.int8]:
    """The nearest integers of every column, clipped."""
    quantised: npt.NDArray[np.int8] = np.clip(np.rint(weight / column_scale), WEIGHT_MIN, WEIGHT_MAX).astype(np.int8)
    return quantised


def _scaled(parameter: Parameter, factor: Floats | None) -> Parameter:
    name, values = parameter
    return name, values if factor is None else values * factor
