"""From a bundle back to the checkpoint that it was exported from: the inverse of `exporter.graph`'s packing.

The graph keeps every parameter under its name in the state. What differs from the state:

    matrices             transposed; those of experts (E, in, out) and tables are not
    experts              a weight per expert, name.experts.E.part
    queries              multiplied by 1 / sqrt(head_dim) where weights are float32 (with qk-norm, the norm's scale is)
    last block's qkv     in two parts where the class token alone asks
    16-bit weights       the rounded parameters themselves

So everything comes back bit for bit, but for float32 queries: they are divided by the factor again, which may miss the
original by a rounding where sqrt(head_dim) is no power of two. Exported again, they give the same graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from exporter.bundle import MODEL_FILE, Bundle, BundleError, WeightType
from exporter.graph import query_factor
from exporter.tape import STORED_TYPES
from vmoe.checkpoint import Checkpoint
from vmoe.config import ModelConfig
from vmoe.model import VisionTransformer

Array = npt.NDArray[np.float32]


def recover(bundle: Bundle) -> Checkpoint:
    """The checkpoint behind a bundle, in float32. Groups of images and preprocessing are those of the export.

    Raises:
        BundleError: a parameter is missing from the graph, or has another shape or type than the manifest implies; the
            weights are in 8 bits, or arranged for a GPU.
    """
    manifest = bundle.manifest
    if MODEL_FILE not in manifest.files:
        raise BundleError(f"the manifest of {bundle.directory} has no hash of {MODEL_FILE}, so it cannot be trusted")
    if manifest.weights == "int8":
        raise BundleError(f"{bundle.directory} holds weights rounded to 8 bits; recover the float32 bundle")
    if manifest.target != "cpu":
        raise BundleError(f"{bundle.directory} was written for {manifest.target}; recover the bundle for CPUs")
    weights = _Weights(bundle, manifest.weights)
    config, state = manifest.architecture, {}
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in VisionTransformer(config).state_dict().items()}
    for name, shape in expected.items():
        array = weights.parameter(name, shape)
        if array.shape != shape:
            raise BundleError(f"{bundle.model_path}: parameter {name} has shape {array.shape}, expected {shape}")
        if manifest.weights == "float32":
            _unfold_query(name, array, config)
        state[name] = torch.from_numpy(array)
    return Checkpoint(config, state, manifest.preprocessing, manifest.labels)


class _Weights:
    """The initializers of a bundle's graph, by parameter."""

    def __init__(self, bundle: Bundle, weights: WeightType) -> None:
        self.path, self.stored_type = bundle.model_path, STORED_TYPES[weights][1]
        self.initializers = ir.load(self.path).graph.initializers

    def parameter(self, name: str, shape: tuple[int, ...]) -> Array:
        """A copy of a parameter as the state has it, with queries still scaled; `shape` is the one expected."""
        if ".experts." in name:
            layer, part = name.split(".experts.")
            return np.stack([self._read(f"{layer}.experts.{e}.{part}") for e in range(shape[0])])
        parts = [part for part in self._parts(name) if part in self.initializers] or [name]
        stored = np.concatenate([self._read(part) for part in parts], axis=-1)
        return np.ascontiguousarray(stored.T) if len(shape) == 2 else stored

    def _parts(self, name: str) -> Iterator[str]:
        if ".attention.qkv." in name:
            yield from (f"{name}.query", f"{name}.key")

    def _read(self, name: str) -> Array:
        value = self.initializers.get(name)
        if value is None or value.const_value is None:
            hint = ""
            if name.startswith("map_head."):
                hint = " (attention pooling lost its query in early versions of the exporter: export again)"
            raise BundleError(f"{self.path} holds no weight {name}{hint}")
        if value.const_value.dtype != self.stored_type:
            found = value.const_value.dtype.name
            raise BundleError(f"{self.path}: weight {name} is {found}, the manifest says {self.stored_type.name}")
        return value.const_value.numpy().astype(np.float32)


def _unfold_query(name: str, array: Array, config: ModelConfig) -> None:
    """Divides what produces the queries by `query_factor`, in place."""
    if config.qk_norm:
        if name.endswith(".attention.query_norm.weight"):
            array /= query_factor(config)
    elif ".attention.qkv." in name:
        array[: config.hidden_size] /= query_factor(config)
