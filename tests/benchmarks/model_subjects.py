"""Models of the speed benchmark: weights, graphs of every form, inputs, and how many operations a run takes."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch

from exporter.bundle import Bundle
from exporter.graph import build_graph
from exporter.moe_graph import MoeLayers
from exporter.products import Products
from exporter.recover import recover
from exporter.session import session_options
from vmoe.config import VARIANTS, ModelConfig
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing

MODELS = {"tiny": "vmoe_fashion_mnist", "S/32": "vmoe_s32_last2_e8", "B/16": "vmoe_b16_every2_e8"}
FULL, CHEAP = OperatingPoint(1.05, 2), OperatingPoint(0.25, 1)
POINTS = (FULL, *(OperatingPoint(c, k) for c, k in ((0.5, 2), (0.25, 2), (1, 1), (0.5, 1))), CHEAP)
NO_SLOTS = "no slots"
MIXED = "mixed"  # half of the batch at the full point, half at the cheapest
CASES = (*map(str, POINTS), NO_SLOTS)
RANDOM_SCALES = {"router": 1.0, "position_embedding": 0.5, "head.weight": 0.02}  # chosen, not tuned
# The commit that shipped the first bundle, whose graph is the one to beat, and whose weights the tiny model takes.
FIRST_BUNDLE = "dfb48be", "model_repository/vmoe-fashion-mnist"


def random_state(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """Weights as initialised, routers that decide, and a head that says something."""
    generator = torch.Generator().manual_seed(0)
    state = dict(model.state_dict())
    for name, value in state.items():
        scale = next((scale for part, scale in RANDOM_SCALES.items() if part in name), None)
        if scale is not None:
            state[name] = torch.randn(value.shape, generator=generator) * scale
    return state


def feeds_of(config: ModelConfig, batch: int, case: str) -> dict[str, npt.NDArray[Any]]:
    images = np.random.default_rng(batch).integers(0, 256, (batch, *config.image_size, config.channels), np.uint8)
    if config.moe is None:
        return {"images": images}
    points = {str(point): point for point in POINTS}
    names = [CASES[0], str(CHEAP)] * (batch // 2) if case == MIXED else [case] * batch
    layers = len(config.moe.layers)
    slots = [(0,) * layers if name == NO_SLOTS else config.slots(points[name]) for name in names]
    selected = [[1 if name == NO_SLOTS else points[name].num_selected_experts] for name in names]
    return {"images": images, "slots": np.array(slots), "num_selected_experts": np.array(selected)}


def dense_gflop(config: ModelConfig, batch: int, *, shortcut: bool) -> float:
    """All but the experts' work; multiplications of matrices alone."""
    tokens, size, width = config.tokens_per_image, config.hidden_size, config.mlp_dim
    sparse = () if config.moe is None else config.moe.layers
    patch = config.patch_size[0] * config.patch_size[1] * config.channels
    total = 2 * config.grid[0] * config.grid[1] * patch * size + 2 * size * config.num_classes
    for index in range(config.num_layers):
        rows = queries = tokens
        if shortcut and index == config.num_layers - 1:
            rows, queries = 1, tokens if index in sparse else 1
        total += 2 * size * size * (2 * queries + 2 * tokens) + 4 * queries * tokens * size
        if index in sparse:
            assert config.moe is not None
            total += 2 * tokens * size * config.moe.num_experts
        else:
            total += 4 * rows * size * width
    return batch * total / 1e9


def pair_gflop(config: ModelConfig) -> float:
    """One token's way through one expert."""
    return 4 * config.hidden_size * config.mlp_dim / 1e9


def expert_rows(config: ModelConfig, experts: npt.NDArray[np.int64], *, shortcut: bool) -> tuple[int, ...]:
    """Kept pairs that each expert of each layer computes, without those that have none.

    Arguments:
        experts: (B, L, S, K), -1 where nobody served.
    """
    assert config.moe is not None
    computed = experts.copy()
    if shortcut and config.moe.layers[-1] == config.num_layers - 1:
        computed[:, -1, 1:] = -1
    by_layer = (layer[layer >= 0] for layer in computed.swapaxes(0, 1))
    return tuple(int(rows) for chosen in by_layer for rows in np.bincount(chosen.ravel()) if rows)


def first_bundle(folder: Path) -> Bundle | None:
    """The first bundle that was shipped, out of the history; None without one."""
    commit, path = FIRST_BUNDLE
    archive = subprocess.run(["git", "archive", commit, path], cwd=Path(__file__).parents[2], capture_output=True)
    if archive.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return Bundle.load(folder / path)


@dataclass(frozen=True)
class Subject:
    """A model of the benchmark, and graphs of it on disk.

    Attributes:
        first: a bundle of the same model with trained weights and an earlier graph; without one, weights are random.
    """

    name: str
    config: ModelConfig
    folder: Path
    threads: int
    first: Bundle | None

    @classmethod
    def named(cls, name: str, folder: Path, threads: int) -> Subject:
        first = first_bundle(folder) if name == "tiny" else None
        return cls(name, VARIANTS[MODELS[name]], folder, threads, first)

    @property
    def shortcut(self) -> bool:
        """The head reads the class token alone, so that the shortcut applies."""
        return self.config.classifier == "token"

    @property
    def preprocessing(self) -> Preprocessing:
        if self.first is not None:
            return self.first.manifest.preprocessing
        config = self.config
        return Preprocessing(config.image_size, config.channels, (0.5,) * config.channels, (0.5,) * config.channels)

    def torch_model(self, config: ModelConfig | None = None) -> VisionTransformer:
        torch.manual_seed(0)
        model = VisionTransformer(config or self.config).eval()
        model.load_state_dict(random_state(model) if self.first is None or config else recover(self.first).state)
        return model

    def session(
        self,
        way: str,
        layers: type[MoeLayers],
        *,
        shortcut: bool = True,
        dense: bool = False,
        products: Products | None = None,
        profile: Path | None = None,
        device: str = "CPU",
    ) -> ort.InferenceSession:
        """Writes a graph, unless it is there already, and opens it.

        Arguments:
            way: names the graph.
            products: None in float32.
            profile: prefix of the file into which the runtime writes what every operator took.
            device: `CPU` or `CUDA`, which falls back to the CPU operator by operator.
        """
        path = self.folder / f"{way}.onnx"
        if not path.exists():
            config = replace(self.config, moe=None) if dense else self.config
            model = self.torch_model(config if dense else None)
            state = {name: value.numpy() for name, value in model.state_dict().items()}
            if config.position_embedding == "sincos2d":
                state["sincos2d"] = model.sincos2d.numpy()
            graph = build_graph(
                config,
                state,
                self.preprocessing,
                max_selected_experts=None if dense else FULL.num_selected_experts,
                class_token_shortcut=shortcut,
                moe_layers=layers,
                products=products,
            )
            ir.save(graph, path, external_data=f"{way}.data")
        return open_session(path, self.threads, profile, device)


def open_session(
    model: Path | bytes, threads: int, profile: Path | None = None, device: str = "CPU"
) -> ort.InferenceSession:
    options = session_options(threads, alone=False)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers = dict.fromkeys(f"{each}ExecutionProvider" for each in (device, "CPU"))
    return ort.InferenceSession(model, options, providers=list(providers))


def fetch(
    session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]]
) -> Callable[[], list[npt.NDArray[np.generic]]]:
    """Runs a graph for what the gateway asks of it, logits first."""
    wanted = [value.name for value in session.get_outputs() if value.name != "token_experts"]
    return lambda: session.run(wanted, feeds)
