"""Small random models and their graphs, as the exporter's tests need them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch

from exporter.bundle import WeightType
from exporter.graph import build_graph
from exporter.products import Products
from vmoe.checkpoint import Checkpoint
from vmoe.config import ModelConfig, MoeConfig
from vmoe.model import VisionTransformer
from vmoe.preprocess import Preprocessing

MOE = MoeConfig(num_experts=4, layers=(1, 2), capacity_factor=1.0)
SMALL = ModelConfig((12, 8), (4, 4), 5, 16, 3, 24, 2, channels=3, moe=MOE)  # a 3 x 2 grid and the class token: S = 7


def with_moe(**changes: object) -> ModelConfig:
    return replace(SMALL, moe=replace(MOE, **changes))  # type: ignore[arg-type]


def random_checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    """Weights that use every part: no zero head, biases and norms away from their start, routers that decide."""
    torch.manual_seed(seed)
    model = VisionTransformer(config)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape)
        state[name] = value + (3.0 * noise if "router" in name else 0.2 * noise)
    size = (config.image_size, config.channels)
    preprocessing = Preprocessing(*size, (0.5,) * config.channels, (0.25,) * config.channels)
    return Checkpoint(config, state, preprocessing, tuple(f"class {i}" for i in range(config.num_classes)))


def graph_of(
    checkpoint: Checkpoint,
    max_selected_experts: int | None = None,
    *,
    products: Products | None = None,
    **options: str,
) -> ir.Model:
    state = {name: value.numpy() for name, value in checkpoint.state.items()}
    if checkpoint.config.position_embedding == "sincos2d":
        state["sincos2d"] = checkpoint.model().sincos2d.numpy()
    weight_type: WeightType = "float16" if options.get("weight_type") == "float16" else "float32"
    return build_graph(
        checkpoint.config,
        state,
        checkpoint.preprocessing,
        input_type="float32" if options.get("input_type") == "float32" else "uint8",
        weight_type=weight_type,
        max_selected_experts=max_selected_experts,
        class_token_shortcut=options.get("class_token_shortcut") != "no",
        products=products,
    )


def session_of(graph: ir.Model, path: Path, threads: int = 1) -> ort.InferenceSession:
    ir.save(graph, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pixels(config: ModelConfig, batch: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    shape = (batch, *config.image_size, config.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
