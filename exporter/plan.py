"""What a model will cost, from its configuration alone: parameters, bytes and where the experts are. No weights.

The model is built on PyTorch's meta device, which keeps shapes and no storage: a V-MoE of 15 billion parameters is
planned in a second on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from exporter.bundle import StorageType
from exporter.tape import STORED_TYPES
from vmoe.config import ModelConfig
from vmoe.model import VisionTransformer


@dataclass(frozen=True)
class Part:
    """Some parameters of a model.

    Attributes:
        name: what they are.
        num_parameters: of all copies.
        copies: experts that they are spread over; 1 where there are none.
    """

    name: str
    num_parameters: int
    copies: int = 1


@dataclass(frozen=True)
class Plan:
    """Attributes:
    parts: dense parts first, then the experts of every MoE layer.
    bytes_per_parameter: as the graph stores them; in int8 the few that stay float32 are counted as one byte, too.
    """

    parts: tuple[Part, ...]
    bytes_per_parameter: int

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def size_bytes(self) -> int:
        return self.num_parameters * self.bytes_per_parameter


def plan(config: ModelConfig, weights: StorageType) -> Plan:
    """Counts the parameters of a model."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    counts = {"embedding and head": 0, "attention and norms": 0, "dense MLPs": 0, "routers": 0}
    experts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if ".experts." in name:
            block = f"experts of block {path[1]}"
            experts[block] = experts.get(block, 0) + parameter.numel()
        elif path[0] != "blocks":
            counts["embedding and head"] += parameter.numel()
        elif ".router." in name:
            counts["routers"] += parameter.numel()
        else:
            counts["dense MLPs" if path[2] == "mlp" else "attention and norms"] += parameter.numel()
    copies = 1 if config.moe is None else config.moe.num_experts
    parts = [Part(name, count) for name, count in counts.items() if count]
    parts += [Part(name, count, copies) for name, count in experts.items()]
    stored = ir.DataType.INT8 if weights == "int8" else STORED_TYPES[weights][1]
    return Plan(tuple(parts), stored.bitwidth // 8)
