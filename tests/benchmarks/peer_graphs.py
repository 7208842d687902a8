"""Other ways to run the experts of a V-MoE, for comparison with `exporter.moe_graph`: same routing, same answers.

Axes: N tokens of a batch, E experts, K choices per token.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.moe_graph import MoeLayers, Slots


class MaskedLayers(MoeLayers):
    """Every expert computes every token; what is not kept is multiplied by 0. What exporting a naive model gives."""

    def serve(self, normed: ir.Value, residual: ir.Value, weights: ir.Value, slots: Slots, name: str) -> ir.Value:
        experts = self.moe.num_experts
        place, filled = (self.reshape(each, experts, -1) for each in (slots.place, slots.filled))
        shape = self.op("Concat", self.constant([experts]), self._num_places(normed, 1), axis=0)
        blank = self.op("ConstantOfShape", shape)
        filled = self.op("Cast", filled, to=ir.DataType.FLOAT.value)
        mask = self.op("ScatterElements", blank, place, filled, axis=1, reduction="add")
        mask = self.op("Mul", mask, self.reshape(weights, 1, -1))  # (E, N * K)
        by_expert = self.op("ReduceSum", self.reshape(mask, experts, -1, self.choices), self.constant([2]))  # (E, N, 1)
        operand = self._operand(normed, name)
        for e in range(experts):
            weight = self.op("Gather", by_expert, self.constant(e), axis=0)
            residual = self.op("Add", residual, self.op("Mul", self._expert(operand, e, name), weight))
        return residual


def packed_matmul(rows: int, inner: int, columns: int) -> ir.Model:
    """`x (rows, inner) @ constant`: the rate of the runtime's best matrix product, weights packed beforehand."""
    x = ir.val("x", ir.DataType.FLOAT, [rows, inner])
    tape = ir.tape.Tape()
    weight = np.random.default_rng(0).standard_normal((inner, columns)).astype(np.float32)
    y = tape.op("MatMul", [x, tape.initializer(ir.tensor(weight), name="weight")])
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, columns])
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 20}, name="matmul")
    return ir.Model(graph, ir_version=10)
