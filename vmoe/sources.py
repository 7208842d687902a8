"""Where a model comes from: one function for every kind of checkpoint.

    directory with model.safetensors      written by `python -m vmoe train`
    PREFIX with PREFIX.index beside it    google-research/vmoe                     -> vmoe.flax
    Orbax folder                          google-research/vmoe since August 2023   -> vmoe.orbax
    FILE.npz                              big_vision, vision_transformer           -> vmoe.npz
    FILE.safetensors, .pt, .pth, .bin     state dict of our own model (needs its configuration) or of a timm ViT

The middle three become a parameter tree under the reference's names, whose architecture comes from `--config` or from
its shapes (`vmoe.architecture`). Nothing here unpickles objects.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vmoe.architecture import NO_HINTS, Hints, Release, find_release, infer_config, native_image_size
from vmoe.checkpoint import Checkpoint, check_parameters, load_checkpoint
from vmoe.config import ConfigError, ModelConfig
from vmoe.errors import CheckpointError
from vmoe.flax import read_parameters, tree_shapes
from vmoe.model import VisionTransformer
from vmoe.npz import Array, npz_shapes, read_npz
from vmoe.orbax import find_orbax, orbax_shapes, read_orbax
from vmoe.positions import resize_positions
from vmoe.reference import check_shapes, config_from_reference, state_from_reference
from vmoe.timm import MARK as TIMM_MARK
from vmoe.timm import from_timm

Kind = Literal["checkpoint", "reference", "orbax", "npz", "state_dict"]
Progress = Callable[[int, int], None]

_STATE_DICT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    Attributes:
        path: what the reader of this kind takes.
        files: everything that the model is read from, for provenance.
    """

    kind: Kind
    path: Path
    files: tuple[Path, ...]


def find_source(path: Path) -> Source:
    """Says what kind of checkpoint a path is.

    Raises:
        CheckpointError: none that we know.
    """
    if (path / "model.safetensors").is_file():
        files = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("training."))
        return Source("checkpoint", path, tuple(sorted(files)))
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    index = prefix.parent / f"{prefix.name}.index"
    if index.is_file():
        shards = sorted(p for p in prefix.parent.iterdir() if p.name.startswith(f"{prefix.name}.data-"))
        return Source("reference", prefix, (index, *shards))
    if path.is_dir() and (folder := find_orbax(path)) is not None:
        return Source("orbax", folder, tuple(sorted(p for p in folder.rglob("*") if p.is_file())))
    if path.is_file() and path.suffix == ".npz":
        return Source("npz", path, (path,))
    if path.is_file() and path.suffix in _STATE_DICT_SUFFIXES:
        return Source("state_dict", path, (path,))
    raise CheckpointError(
        f"{path} is no checkpoint: neither a directory of `python -m vmoe train`, nor a prefix with {index.name} "
        f"beside it, nor an Orbax folder, nor a file .npz or {', '.join(_STATE_DICT_SUFFIXES)}; of an exported bundle "
        "`python -m exporter recover` makes one"
    )


def load_source(
    path: Path,
    hints: Hints = NO_HINTS,
    *,
    config_path: Path | None = None,
    progress: Progress = lambda read, total: None,
) -> Checkpoint:
    """Reads a model of any kind.

    Arguments:
        hints: what the source cannot tell, and overrides of what it says. An image size other than the model's own
            interpolates learned positions.
        config_path: the reference's constructor arguments (bare or under `model`), or our own configuration, instead
            of inference.
        progress: called with the bytes read since the last call and the bytes in all.

    Raises:
        CheckpointError, ConfigError: names the file, and the parameter with the shape found and the shape expected.
    """
    source = find_source(path)
    if source.kind == "checkpoint":
        if config_path is not None:
            raise ConfigError(f"{path} brings its own configuration, {config_path} has no use")
        checkpoint = load_checkpoint(path)
        _check_finite(path, checkpoint.state)
    elif source.kind == "state_dict":
        checkpoint = _load_state_dict(source.path, hints, config_path)
    else:
        checkpoint = _load_tree(source, hints, config_path, progress)
    return _with_overrides(checkpoint, hints)


def read_architecture(path: Path | None, hints: Hints = NO_HINTS, *, config_path: Path | None = None) -> ModelConfig:
    """The configuration of a model, without its weights where the kind of the source allows it.

    Arguments:
        path: None takes the configuration file alone.

    Raises:
        CheckpointError, ConfigError: as `load_source`; or neither path nor configuration file are given.
    """
    if path is None:
        if config_path is None:
            raise ConfigError("a checkpoint or a configuration file is needed")
        return _override(_read_config(config_path, {}, hints.image_size), hints)
    source = find_source(path)
    if source.kind in ("checkpoint", "state_dict"):
        return load_source(path, hints, config_path=config_path).config
    return _override(_tree_config(_shapes(source), hints, config_path, find_release(source.path.name)), hints)


def _load_tree(source: Source, hints: Hints, config_path: Path | None, progress: Progress) -> Checkpoint:
    """A parameter tree under the reference's names."""
    release = find_release(source.path.name)
    shapes = _shapes(source)  # they alone tell whether the model fits: refuse before gigabytes are read
    config = _tree_config(shapes, hints, config_path, release)
    check_shapes(shapes, config)
    if source.kind == "reference":
        total_bytes = sum(array.size_bytes for array in tree_shapes(source.path).values())
        parameters = read_parameters(source.path, advance=lambda read: progress(read, total_bytes))
    else:
        parameters = (read_orbax if source.kind == "orbax" else read_npz)(source.path, progress=progress)
    return _checkpoint(config, _tensors(parameters, config), release)


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a tree, by the reference's name."""
    if source.kind == "reference":
        return {name: array.shape for name, array in tree_shapes(source.path).items()}
    return (orbax_shapes if source.kind == "orbax" else npz_shapes)(source.path)


def _tree_config(
    shapes: dict[str, tuple[int, ...]], hints: Hints, config_path: Path | None, release: Release
) -> ModelConfig:
    if config_path is None:
        return infer_config(shapes, hints.or_else(release.hints))
    return _read_config(config_path, shapes, hints.image_size)


def _read_config(path: Path, shapes: dict[str, tuple[int, ...]], image_size: tuple[int, int] | None) -> ModelConfig:
    """The configuration in a file: ours, or the reference's constructor arguments bare or under `model`.

    The reference's arguments do not say the image size. It is that of the file's `image_size`, else that of the table
    of positions, else the one given.
    """
    try:
        values: Any = json.loads(path.read_text())
        model = values.get("model", values)
        if "encoder" not in model:
            return ModelConfig.from_json(json.dumps(model))
        if "image_size" in values:
            height, width = map(int, values["image_size"])
            return config_from_reference(_without(model, "image_size"), (height, width))
        patch_size = (int(model["patch_size"][0]), int(model["patch_size"][1]))
        native = native_image_size(shapes, patch_size, model.get("classifier", "token")) or image_size
        if native is None:
            raise ConfigError(f"{path} does not tell the image size, nor do the parameters: give the image size")
        return config_from_reference(model, native)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a model configuration: {error!r}") from error


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _load_state_dict(path: Path, hints: Hints, config_path: Path | None) -> Checkpoint:
    """A flat map of names to tensors: of our own model, or of a timm ViT."""
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is not a readable state dict: {str(error).splitlines()[0]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()):
        raise CheckpointError(f"{path} holds no state dict, which maps names to tensors")
    _check_finite(path, state)
    state = {name: value.float().contiguous() for name, value in state.items()}
    if TIMM_MARK in state:
        config, state = from_timm(state, hints)
    else:
        config_path = config_path or path.parent / "config.json"
        if not config_path.is_file():
            raise ConfigError(f"{path} does not tell its architecture, and there is no {config_path}: give --config")
        config = _read_config(config_path, {}, hints.image_size)
    with torch.device("meta"):
        expected = VisionTransformer(config).state_dict()
    check_parameters({name: tuple(p.shape) for name, p in expected.items()}, state)
    return _checkpoint(config, state, find_release(path.name))


def _check_finite(path: Path, state: dict[str, Tensor]) -> None:
    for name, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: parameter {name} should be floating-point numbers, found {value.dtype}")
        if not (finite := value.isfinite()).all():
            count = int((~finite).sum())
            raise CheckpointError(f"{path}: parameter {name} should be finite, found {count} values that are not")


def _tensors(parameters: dict[str, Array], config: ModelConfig) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in state_from_reference(parameters, config).items()}


def _checkpoint(config: ModelConfig, state: dict[str, Tensor], release: Release) -> Checkpoint:
    """With the reference's preprocessing, and numbers for labels until somebody names the classes."""
    labels = tuple(str(number) for number in range(config.num_classes))
    return Checkpoint(config, state, release.preprocessing(config.image_size, config.channels), labels)


def _with_overrides(checkpoint: Checkpoint, hints: Hints) -> Checkpoint:
    """The model with what the hints say otherwise."""
    config, state = _override(checkpoint.config, hints), checkpoint.state
    if config.position_embedding == "learned" and config.grid != checkpoint.config.grid:
        table = resize_positions(state["position_embedding"].numpy(), checkpoint.config.grid, config.grid)
        state = state | {"position_embedding": torch.from_numpy(table)}
    preprocessing = replace(checkpoint.preprocessing, image_size=config.image_size)
    return replace(checkpoint, config=config, state=state, preprocessing=preprocessing)


def _override(config: ModelConfig, hints: Hints) -> ModelConfig:
    if config.moe is not None and (overrides := hints.moe_overrides()):
        config = replace(config, moe=replace(config.moe, **overrides))  # type: ignore[arg-type]
    return config if hints.image_size is None else replace(config, image_size=hints.image_size)
