"""The reference's fixtures in tests/data/upstream: cases, settings, inputs and golden outputs. See the README there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vmoe.checkpoint import Checkpoint
from vmoe.config import ModelConfig
from vmoe.flax import read_parameters
from vmoe.preprocess import Preprocessing
from vmoe.reference import config_from_reference, state_from_reference

DIRECTORY = Path(__file__).parents[1] / "data" / "upstream"
CASES = (
    "token_k2",
    "token_k2_sharded",
    "token_k2_unknown",
    "token_k2_unknown_trainstate",
    "gap_k1_prelogits",
    "map_head",
    "expert_choice",
    "dense_vit",
)


@dataclass(frozen=True)
class Setting:
    """One accepted setting of a case.

    Attributes:
        config: the case's model with the routing and the group of this setting.
        slots: slots per expert in each MoE layer, (L,).
        logits: (B, num_classes), golden.
        run: key prefix of the golden routing tables, None for a dense model.
    """

    name: str
    config: ModelConfig
    slots: tuple[int, ...]
    num_selected_experts: int
    logits: npt.NDArray[np.float32]
    run: str | None


class Case:
    """A checkpoint of the reference, read and converted.

    Attributes:
        inputs: (B, H, W, C) float32, normalised.
    """

    def __init__(self, name: str) -> None:
        self.directory = DIRECTORY / name
        self._json = self.load_json("config.json")
        size = self._json["image_size"]
        self.config = config_from_reference(self._json["model"], (size[0], size[1]))
        self.prefix = self.directory / self._json["checkpoint"]["prefix"]
        self.inputs: npt.NDArray[np.float32] = np.load(self.directory / "inputs.npy")

    def load_json(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    def routing_tables(self) -> dict[str, npt.NDArray[np.int64]]:
        """Golden tables of the MoE layers by `<run>/<block>/<name>`; empty for a dense model."""
        path = self.directory / "golden_routing.npz"
        return dict(np.load(path)) if path.exists() else {}

    def token_experts(self, setting: Setting, tables: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        """Golden tables as the graph's output of that name: (B, L, S, K), expert that served the k-th choice or -1."""
        assert setting.config.moe is not None
        layers = []
        for block, slots in zip(setting.config.moe.layers, setting.slots, strict=True):
            prefix = f"{setting.run}/encoderblock_{block}"
            if setting.config.moe.router == "items_per_expert":
                chosen = tables[f"{prefix}/token_index"]  # (G, E, slots)
                groups, experts, _ = chosen.shape
                served = np.full((groups, experts, setting.config.moe.group_images * self.config.tokens_per_image), -1)
                np.put_along_axis(served, chosen, np.arange(experts)[:, None], axis=2)
                served = served.transpose(0, 2, 1)
            else:
                positions = tables[f"{prefix}/buffer_index"]  # (G, T, K)
                served = np.where(positions < slots, tables[f"{prefix}/expert_index"], -1)
            layers.append(served.reshape(len(self.inputs), -1, served.shape[-1]))
        return np.stack(layers, axis=1)

    def checkpoint(self, config: ModelConfig | None = None) -> Checkpoint:
        config = config or self.config
        state = state_from_reference(read_parameters(self.prefix), config)
        return Checkpoint(
            config,
            {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()},
            Preprocessing(config.image_size, config.channels, (0.5,) * 3, (0.5,) * 3),
            tuple(map(str, range(config.num_classes))),
        )

    def settings(self) -> Iterator[Setting]:
        golden = np.load(self.directory / "golden_logits.npz")
        layers = 0 if self.config.moe is None else len(self.config.moe.layers)
        for entry in self.load_json("manifest.json")["settings"]:
            if entry["status"] != "ok":
                continue
            logits = golden[entry["id"]]
            if self.config.moe is None:
                yield Setting(entry["id"], self.config, (), 0, logits, None)
            elif entry["id"] == "as_configured":
                point = self.config.operating_point
                assert point is not None
                slots, selected = self.config.slots(point), point.num_selected_experts
                yield Setting(entry["id"], self.config, slots, selected, logits, None)
            else:
                moe = replace(
                    self.config.moe,
                    routing="bpr" if entry.get("batch_priority") else "vanilla",
                    group_images=len(self.inputs) if entry["group"] == "batch" else 1,
                )
                slots, selected = (entry["capacity"],) * layers, entry.get("num_selected_experts", 1)
                yield Setting(entry["id"], replace(self.config, moe=moe), slots, selected, logits, entry["run"])
