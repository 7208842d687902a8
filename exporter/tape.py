"""Writing nodes and weights of an ONNX graph: what the transformer and its experts have in common.

Axes: N rows of a 2-D matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.bundle import WeightType
from exporter.products import Parameter, Products

LAYER_NORM_EPSILON = 1e-6

State = Mapping[str, npt.NDArray[np.float32]]
STORED_TYPES: dict[WeightType, tuple[npt.DTypeLike, ir.DataType]] = {
    "float32": (np.float32, ir.DataType.FLOAT),
    "float16": (np.float16, ir.DataType.FLOAT16),
    "bfloat16": (ml_dtypes.bfloat16, ir.DataType.BFLOAT16),
}


class Tape:
    """Nodes in the order in which they run, and initializers.

    Attributes:
        state: parameters under the names of `vmoe.model.VisionTransformer.state_dict`.
        weight_type: in which they are stored.
        products: writes the large products.
    """

    def __init__(self, state: State, weight_type: WeightType, products: Products) -> None:
        self.state, self.weight_type, self.products = state, weight_type, products
        self._tape = ir.tape.Tape()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def graph(self, inputs: list[ir.Value], outputs: list[ir.Value], opset: int) -> ir.Graph:
        """All that was written, as a graph."""
        tape = self._tape
        return ir.Graph(
            inputs,
            outputs,
            nodes=tape.nodes,
            initializers=tape.initializers,
            opset_imports={"": opset} | {node.domain: 1 for node in tape.nodes if node.domain},
            name="vmoe",
        )

    def op(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | float | str | list[int]
    ) -> ir.Value:
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def outputs(
        self, count: int, kind: str, *inputs: ir.Value, **attributes: int | float | str | list[int]
    ) -> tuple[ir.Value, ...]:
        """The values of a node that has several. A Split without sizes wants their number as an attribute, too."""
        return tuple(self._tape.op_multi_out(kind, inputs, attributes, num_outputs=count))

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """A small constant, stored once per value."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._tape.initializer(ir.tensor(array), name=f"constant_{len(self._constants)}")
        return self._constants[key]

    def weight(
        self,
        name: str,
        values: npt.NDArray[np.float32] | None = None,
        *,
        factor: npt.NDArray[np.float32] | None = None,
    ) -> ir.Value:
        """A parameter as float32, under the state's name.

        Arguments:
            values: replaces the state's; a rearrangement of them.
            factor: broadcast over the last axis. With storage of 16 bits it is multiplied after widening, which the
                runtime does once at load, so that the stored numbers are the rounded parameters themselves.
        """
        array = self.state[name] if values is None else values
        dtype, ir_type = STORED_TYPES[self.weight_type]
        scaled = factor if self.weight_type == "float32" else None

        def values_to_store() -> npt.NDArray[np.generic]:
            return np.asarray(array if scaled is None else array * scaled, dtype=dtype)

        stored = self.stored(name, values_to_store, ir_type, array.shape)
        if self.weight_type == "float32":
            return stored
        wide = self.op("Cast", stored, to=ir.DataType.FLOAT.value)
        return wide if factor is None else self.op("Mul", wide, self.constant(factor, np.float32))

    def stored(
        self, name: str, make: Callable[[], npt.NDArray[np.generic]], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """An initializer. Values are made when it is written: copies of all weights would double the memory."""

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(make()))

        return self._tape.initializer(ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name), name=name)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", value, self.constant(shape))

    def linear(self, rows: ir.Value, name: str) -> ir.Value:
        """(N, in) -> (N, out)."""
        return self.affine(self.operand(rows, name), name, *self.linear_parameters(name))

    def linear_parameters(self, name: str) -> tuple[Parameter, Parameter]:
        """Weight (in, out), which torch stores as (out, in), and bias (out,)."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        return (weight, self.state[weight].T), (bias, self.state[bias])

    def operand(self, rows: ir.Value, reads: str) -> ir.Value:
        """Rows (N, in) in the form in which `affine` takes them; moving rows about keeps that form.

        Arguments:
            reads: name of the activation. Products of the same activation share its operand.
        """
        return self.products.operand(self, rows, reads)

    def affine(
        self,
        operand: ir.Value,
        reads: str,
        weight: Parameter,
        bias: Parameter,
        factor: npt.NDArray[np.float32] | None = None,
    ) -> ir.Value:
        """(N, in) -> (N, out): operand @ weight + bias, both times `factor`, see `weight`.

        Arguments:
            operand: rows of the operand of the activation `reads`.
            weight: (in, out).
        """
        return self.products.affine(self, operand, reads, weight, bias, factor)

    def layer_norm(self, rows: ir.Value, name: str) -> ir.Value:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", rows, scale, bias, axis=-1, epsilon=LAYER_NORM_EPSILON)

    def first_rows(self, rows: ir.Value, every: int, width: int) -> ir.Value:
        """The first of every `every` rows: (B * every, width) -> (B, width)."""
        return self.op("Gather", self.reshape(rows, -1, every, width), self.constant(0), axis=1)
