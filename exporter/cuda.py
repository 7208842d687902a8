"""The form of the graph for a CUDA device: padded slots with batched products, in float16. Same semantics.

Axes: G routing groups, N tokens of a batch, D hidden, E experts, K choices per token, F slots that any group asks for.

On a CPU the ragged form of `exporter.moe_graph` is never slower. On a GPU every shape that depends on the routing costs
a wait for the device, E small products leave most of it idle, and float16 is what its matrix units are for. Here no
shape depends on the routing: the experts compute all slots of all groups, F per group, in one batched product, filled
or not, so that a batch of mixed points costs what its largest point does. F follows from the input alone.

Products read and write float16; the router, norms, softmax and the residual stay float32. Never measured on a GPU: see
docs/cuda.md.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.moe_graph import MoeLayers, Slots
from exporter.products import Floats, Parameter, Products
from exporter.tape import Tape

_HALF, _FULL = ir.DataType.FLOAT16.value, ir.DataType.FLOAT.value


class PaddedLayers(MoeLayers):
    """Experts compute all slots, whatever is in them."""

    def serve(self, normed: ir.Value, residual: ir.Value, weights: ir.Value, slots: Slots, name: str) -> ir.Value:
        tape, products, experts, size = self.tape, self.tape.products, self.moe.num_experts, self.config.hidden_size
        place, filled = (self.reshape(each, experts, -1) for each in (slots.place, slots.filled))  # (E, G * F)
        token = self.op("Div", place, self.constant(self.choices))
        rows = self.op("Gather", tape.operand(normed, f"{name}.experts.input"), token, axis=0)
        weight_in, bias_in, weight_out, bias_out = (
            (f"{name}.experts.{part}", tape.state[f"{name}.experts.{part}"])
            for part in ("weight_in", "bias_in", "weight_out", "bias_out")
        )
        hidden = products.batched(tape, rows, weight_in, bias_in)
        hidden = self.op("Gelu", hidden, approximate=self.config.gelu_approximation)
        operand = tape.operand(hidden, f"{name}.experts.hidden")
        answers = self.reshape(products.batched(tape, operand, weight_out, bias_out), -1, size)  # (E * G * F, D)
        blank = self.constant(np.zeros((1, size)), np.float32)
        slot = self._slot_of_place(place, filled, normed)
        placed = self.op("Gather", self.op("Concat", blank, answers, axis=0), slot, axis=0)
        return self.weigh(residual, weights, placed)

    def _slot_of_place(self, place: ir.Value, filled: ir.Value, rows: ir.Value) -> ir.Value:
        """Which of all slots serves a pair, counted from 1, and 0 for none: (E, G * F) twice -> (N * K,).

        Arguments:
            rows: (N, D).
        """
        experts, places = self.constant([self.moe.num_experts]), self._num_places(rows, 1)
        beyond = self.op("Concat", experts, self.op("Add", places, self.constant([1])), axis=0)
        zeros = self.op("Expand", self.constant(0), beyond)  # one place more, for slots that are not filled
        end = self.op("Add", self.op("Size", place), self.constant(1))
        numbers = self.op("Range", self.constant(1), end, self.constant(1))
        numbers = self.op("Where", filled, self.op("Reshape", numbers, self.op("Shape", place)), self.constant(0))
        place = self.op("Where", filled, place, places)
        numbers = self.op("ScatterElements", zeros, place, numbers, axis=1)
        of_pairs = self.op("Slice", numbers, self.constant([0]), places, self.constant([1]))
        return self.op("ReduceSum", of_pairs, self.constant([0]), keepdims=0)  # a pair is in one expert's slots


class HalfProducts(Products):
    """Writes the large products in float16."""

    def operand(self, tape: Tape, rows: ir.Value, reads: str) -> ir.Value:
        return tape.op("Cast", rows, to=_HALF)

    def affine(
        self, tape: Tape, operand: ir.Value, reads: str, weight: Parameter, bias: Parameter, factor: Floats | None
    ) -> ir.Value:
        parts = (_half(tape, name, values, factor) for name, values in (weight, bias))
        return tape.op("Cast", tape.op("Gemm", operand, *parts), to=_FULL)

    def batched(self, tape: Tape, operand: ir.Value, weight: Parameter, bias: Parameter) -> ir.Value:
        product = tape.op("MatMul", operand, _half(tape, *weight))
        return tape.op("Cast", tape.op("Add", product, _half(tape, bias[0], bias[1][:, None])), to=_FULL)


def _half(tape: Tape, name: str, values: Floats, factor: Floats | None = None) -> ir.Value:
    def rounded() -> npt.NDArray[np.float16]:
        return (values if factor is None else values * factor).astype(np.float16)

    return tape.stored(name, rounded, ir.DataType.FLOAT16, values.shape)
