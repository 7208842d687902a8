"""Other ways to run the experts of a V-MoE, for comparison with `exporter.moe_graph`: same routing, same answers.

Axes: B images, N tokens of a batch (B * S), D hidden, M width of the experts, E experts, F slots of a padded buffer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.moe_graph import MoeLayers


class MaskedLayers(MoeLayers):
    """Every expert computes every token; what is not kept is multiplied by 0. What exporting a naive model gives."""

    def serve(self, normed: ir.Value, residual: ir.Value, gates: ir.Value, kept: ir.Value, name: str) -> ir.Value:
        mask = self.op("Transpose", self.op("Cast", kept, to=ir.DataType.FLOAT.value), perm=[1, 0])
        weights = self.op("Mul", gates, mask)  # (N, E)
        for e in range(self.moe.num_experts):
            parts = [
                self.tape.weight(f"{name}.experts.{e}.{part}", self.tape.state[f"{name}.experts.{part}"][e])
                for part in ("weight_in", "bias_in", "weight_out", "bias_out")
            ]
            hidden = self.op("Gelu", self.op("Gemm", normed, *parts[:2]), approximate=self.config.gelu_approximation)
            weight = self.op("Gather", weights, self.constant([e]), axis=1)  # (N, 1)
            residual = self.op("Add", residual, self.op("Mul", self.op("Gemm", hidden, *parts[2:]), weight))
        return residual


class PaddedLayers(MoeLayers):
    """Buffers of one size for all experts, as in the reference: B times the largest slots of the batch, whatever is in
    them, and batched MatMuls."""

    def serve(self, normed: ir.Value, residual: ir.Value, gates: ir.Value, kept: ir.Value, name: str) -> ir.Value:
        layer = self.constant([len(self.kept) - 1])
        slots = self.op("Gather", self.slots, layer, axis=1)
        batch = self.op("Shape", slots, start=0, end=1)
        size = self.op("Mul", batch, self.op("ReduceMax", slots, keepdims=0))
        size = self.op("Min", self.op("Max", size, self.constant([1])), self.op("Shape", normed, start=0, end=1))
        mask = self.op("Cast", kept, to=ir.DataType.FLOAT.value)
        filled, token = self.outputs(2, "TopK", mask, size, axis=1)  # (E, F)
        gate = self.op("GatherElements", self.op("Transpose", gates, perm=[1, 0]), token, axis=1)
        weight = self.op("Unsqueeze", self.op("Mul", filled, gate), self.constant([2]))
        weight_in, bias_in, weight_out, bias_out = (
            self.tape.weight(f"{name}.experts.{part}", self.tape.state[f"{name}.experts.{part}"][:, None]
                             if part.startswith("bias") else self.tape.state[f"{name}.experts.{part}"])
            for part in ("weight_in", "bias_in", "weight_out", "bias_out")
        )  # fmt: skip
        rows = self.op("Gather", normed, token, axis=0)  # (E, F, D)
        hidden = self.op("Add", self.op("MatMul", rows, weight_in), bias_in)
        hidden = self.op("Gelu", hidden, approximate=self.config.gelu_approximation)
        output = self.op("Mul", self.op("Add", self.op("MatMul", hidden, weight_out), bias_out), weight)
        for e in range(self.moe.num_experts):  # one by one, as in `exporter.moe_graph`: tokens repeat between experts
            row, place = (self.op("Gather", value, self.constant(e), axis=0) for value in (output, token))
            place = self.op("Unsqueeze", place, self.constant([1]))
            residual = self.op("ScatterND", residual, place, row, reduction="add")
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
