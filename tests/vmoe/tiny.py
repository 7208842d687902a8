"""Small models and data sets for the tests beside this file: 8 x 8 pixels, 4 patches, 4 experts, 3 classes."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vmoe.config import ModelConfig, MoeConfig
from vmoe.data import IdxImages
from vmoe.model import VisionTransformer
from vmoe.preprocess import Preprocessing

MOE = MoeConfig(num_experts=4, layers=(0, 1), num_selected_experts=2, capacity_factor=1.0)
CONFIG = ModelConfig(
    (8, 8), (4, 4), 3, 8, 2, 16, 2, channels=1, classifier="gap", position_embedding="sincos2d", moe=MOE
)
DENSE = replace(CONFIG, moe=None)
PREPROCESSING = Preprocessing((8, 8), 1, (0.5,), (0.5,))


def model_of(config: ModelConfig = CONFIG, seed: int = 0) -> VisionTransformer:
    """Seeded weights in evaluation mode; head and biases random too, since zeros would hide what they are fed with."""
    torch.manual_seed(seed)
    model = VisionTransformer(config)
    nn.init.normal_(model.head.weight)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images_of(config: ModelConfig, count: int, seed: int = 0) -> Tensor:
    """(count, H, W, C), standard normal."""
    return torch.randn(count, *config.image_size, config.channels, generator=torch.Generator().manual_seed(seed))


def data_of(count: int = 24, seed: int = 0) -> IdxImages:
    """Three classes in turn that differ in brightness, around 40, 128 and 216 with noise of up to 20."""
    targets = np.arange(count) % 3
    noise = np.random.default_rng(seed).integers(-20, 21, (count, 8, 8, 1))
    images = 40 + 88 * targets[:, None, None, None] + noise
    return IdxImages(images.astype(np.uint8), targets.astype(np.int64), ("dark", "grey", "bright"))


def idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    """The IDX format: two zeros, type 8 (uint8), number of dimensions, big-endian sizes, data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(directory: Path, split: str, data: IdxImages, *, gz: bool = False) -> None:
    """Both files of a split, as `vmoe.data.load_idx` expects them."""
    directory.mkdir(exist_ok=True)
    for name, array in (
        (f"{split}-images-idx3-ubyte", data.images[..., 0]),
        (f"{split}-labels-idx1-ubyte", data.targets.astype(np.uint8)),
    ):
        raw = idx_bytes(array)
        (directory / f"{name}.gz" if gz else directory / name).write_bytes(gzip.compress(raw) if gz else raw)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, dtype included."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
