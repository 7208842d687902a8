"""The large matrix products of the graph: what the transformer's products have in common, in float32.

`exporter.int8` writes the same products in 8 bits, `exporter.calibration` watches what they read.

Axes: N rows of a 2-D matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

if TYPE_CHECKING:
    from exporter.tape import Tape

Floats = npt.NDArray[np.float32]
Parameter = tuple[str, Floats]  # under the state's name, possibly rearranged


class Products:
    """Writes products onto a tape; see `Tape.operand` and `Tape.affine`."""

    def operand(self, tape: Tape, rows: ir.Value, reads: str) -> ir.Value:
        """Rows (N, in) as `affine` takes them."""
        return rows

    def affine(
        self, tape: Tape, operand: ir.Value, reads: str, weight: Parameter, bias: Parameter, factor: Floats | None
    ) -> ir.Value:
        """(N, in) -> (N, out)."""
        return tape.op("Gemm", operand, tape.weight(*weight, factor=factor), tape.weight(*bias, factor=factor))

    def batched(self, tape: Tape, operand: ir.Value, weight: Parameter, bias: Parameter) -> ir.Value:
        """(E, n, in) -> (E, n, out), with weights (E, in, out) and biases (E, out)."""
        product = tape.op("MatMul", operand, tape.weight(*weight))
        return tape.op("Add", product, tape.weight(bias[0], bias[1][:, None]))

    def of_pixels(self, tape: Tape, patches: ir.Value, scale: Floats, offset: Floats, name: str) -> ir.Value:
        """The linear layer `name` of normalised pixels: (..., channels) uint8 -> (N, out).

        Arguments:
            patches: whose last axes, from the second patch axis on, make up `in` numbers.
            scale, offset: (channels,), of the normalisation.
        """
        pixels = tape.op("Cast", patches, to=ir.DataType.FLOAT.value)
        pixels = tape.op("Mul", pixels, tape.constant(scale, np.float32))
        pixels = tape.op("Add", pixels, tape.constant(offset, np.float32))
        return tape.linear(tape.reshape(pixels, -1, tape.state[f"{name}.weight"].shape[1]), name)
