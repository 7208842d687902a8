"""Checkpoints on disk: a directory with `model.safetensors`, `config.json` and, while training, the optimiser's state.

Nothing here unpickles. A checkpoint is written into a temporary sibling, which then takes the old one's place: a reader
sees the old one or the new one. A run that is killed between the two renames leaves the old one as `.checkpoint.old.*`,
from where `--resume` takes it back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmoe.atomic_directory import replaced_directory
from vmoe.config import ConfigError, ModelConfig, load_config
from vmoe.errors import CheckpointError
from vmoe.model import VisionTransformer
from vmoe.preprocess import Preprocessing


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what is needed to feed it and to read its answers."""

    config: ModelConfig
    state: dict[str, Tensor]
    preprocessing: Preprocessing
    labels: tuple[str, ...]

    def model(self) -> VisionTransformer:
        """The model in evaluation mode, on the CPU.

        Raises:
            CheckpointError: a parameter is missing, superfluous or of the wrong shape.
        """
        with torch.device("meta"):
            model = VisionTransformer(self.config)
        check_parameters({name: tuple(p.shape) for name, p in model.state_dict().items()}, self.state)
        model.load_state_dict(self.state, assign=True)
        return model.eval()

    def with_labels(self, labels: tuple[str, ...]) -> Checkpoint:
        """The same model with other class names."""
        if len(labels) != self.config.num_classes:
            raise CheckpointError(f"{len(labels)} labels were given for a model of {self.config.num_classes} classes")
        return replace(self, labels=labels)

    def with_group_images(self, group_images: int) -> Checkpoint:
        """The same weights with `group_images` images per routing group; a dense model has no groups."""
        if self.config.moe is None:
            return self
        moe = replace(self.config.moe, group_images=group_images)
        return replace(self, config=replace(self.config, moe=moe))

    def round_to(self, dtype: torch.dtype) -> None:
        """Rounds the weights, in place, to what float16 or bfloat16 can hold; they stay float32.

        Raises:
            CheckpointError: a value is outside the type's range; nothing was rounded.
        """
        for name, value in self.state.items():
            if not torch.isfinite(value.to(dtype)).all():
                largest, limit = value.abs().max().item(), torch.finfo(dtype).max
                narrow = str(dtype).removeprefix("torch.")
                raise CheckpointError(f"parameter {name} reaches {largest:g}, {narrow} ends at {limit:g}: use float32")
        for value in self.state.values():
            value.copy_(value.to(dtype))


def check_parameters(expected: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> None:
    """Compares names and shapes.

    Raises:
        CheckpointError: names the first parameter that differs, the shape found and the shape expected.
    """
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"parameter {name} of shape {shape} is missing")
        if tuple(found[name].shape) != shape:
            raise CheckpointError(f"parameter {name} has shape {tuple(found[name].shape)}, expected {shape}")
    if superfluous := sorted(set(found) - set(expected)):
        raise CheckpointError(f"parameter {superfluous[0]} has no place in a model of this configuration")


def save_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    training_state: dict[str, Tensor] | None = None,
    progress: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint atomically, replacing what was there.

    Arguments:
        training_state: further tensors that an exact resume needs (weights being trained, optimiser).
        progress: JSON values that an exact resume needs.
    """
    with replaced_directory(directory) as temporary:
        save_file({k: v.contiguous() for k, v in checkpoint.state.items()}, temporary / "model.safetensors")
        (temporary / "config.json").write_text(checkpoint.config.to_json())
        (temporary / "preprocessing.json").write_text(json.dumps(asdict(checkpoint.preprocessing), indent=2))
        (temporary / "labels.txt").write_text("".join(f"{label}\n" for label in checkpoint.labels))
        if training_state is not None:
            save_file({k: v.contiguous() for k, v in training_state.items()}, temporary / "training.safetensors")
            (temporary / "training.json").write_text(json.dumps(progress))


def load_checkpoint(directory: Path) -> Checkpoint:
    """Reads what `save_checkpoint` wrote.

    Raises:
        CheckpointError: a file is missing or malformed.
    """
    try:
        config = load_config(directory / "config.json")
        preprocessing = Preprocessing(**json.loads((directory / "preprocessing.json").read_text()))
        labels = tuple((directory / "labels.txt").read_text().splitlines())
        state = load_file(directory / "model.safetensors")
    except (OSError, SafetensorError, ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory} is not a readable checkpoint: {error}") from error
    return Checkpoint(config, state, preprocessing, labels)


def load_training_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and progress for a resume.

    Raises:
        CheckpointError: the checkpoint holds no training state, or it is damaged.
    """
    try:
        return load_file(directory / "training.safetensors"), json.loads((directory / "training.json").read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{directory} holds no training state to resume from: {error}") from error
