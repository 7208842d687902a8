"""Names, types and shapes of a graph's inputs and outputs, as the manifest implies them. Torch-free.

The docstring of `exporter.bundle` says what the tensors mean. Triton's configuration is written from this, and whoever
loads a graph or talks to a server checks against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exporter.bundle import Manifest

TensorType = Literal["uint8", "float32", "int64"]


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph.

    Attributes:
        dims: shape without the batch axis, which comes first.
    """

    name: str
    dtype: TensorType
    dims: tuple[int, ...]


def graph_inputs(manifest: Manifest) -> tuple[Tensor, ...]:
    """In the order of the graph."""
    preprocessing = manifest.preprocessing
    images = Tensor("images", manifest.input, (*preprocessing.image_size, preprocessing.channels))
    if manifest.architecture.moe is None:
        return (images,)
    return (
        images,
        Tensor("slots", "int64", (manifest.num_moe_layers,)),
        Tensor("num_selected_experts", "int64", (1,)),
    )


def graph_outputs(manifest: Manifest) -> tuple[Tensor, ...]:
    """In the order of the graph."""
    architecture, layers = manifest.architecture, manifest.num_moe_layers
    logits = Tensor("logits", "float32", (architecture.num_classes,))
    if architecture.moe is None:
        return (logits,)
    return (
        logits,
        Tensor("kept", "float32", (layers,)),
        Tensor("expert_load", "int64", (layers, architecture.moe.num_experts)),
        Tensor("token_experts", "int64", (layers, architecture.tokens_per_image, manifest.choices_per_token)),
    )
