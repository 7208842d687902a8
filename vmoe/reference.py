"""Checkpoints and configurations of google-research/vmoe in our terms. Torch-free.

The reference keeps Dense kernels as (in, out), attention kernels with a separate head axis, and experts stacked on the
first axis; we keep (out, in) as torch does, one fused query-key-value matrix, and experts stacked in the same way.

Axes: D hidden, F MLP width, E experts, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vmoe.config import Classifier, ConfigError, ModelConfig, MoeConfig, PositionEmbedding, RouterKind

Array = npt.NDArray[np.float32]
REFERENCE_CAPACITY_MULTIPLE = 4  # default of `get_top_experts_per_item_dispatcher` in the reference's vmoe/moe.py

# Constructor arguments of the reference's VisionTransformerMoe and its parts; those that only matter in training, or
# only for speed, are read over.
_KNOWN_KEYS = {
    "model": {
        *("name", "num_classes", "patch_size", "hidden_size", "encoder", "classifier", "representation_size"),
        *("deterministic", "head_bias_init", "head_kernel_zero_init"),
    },
    "encoder": {
        *("num_layers", "mlp_dim", "num_heads", "dropout_rate", "attention_dropout_rate", "attention_qk_norm"),
        *("moe", "deterministic", "dtype", "position_emb"),
    },
    "position_emb": {"name", "temperature"},
    "moe": {
        *("layers", "num_experts", "group_size", "dropout_rate", "deterministic", "router", "dtype", "split_rngs"),
        "mlp_dim",
    },
    "router": {
        *("name", "num_selected_experts", "noise_std", "gshard_loss_weight", "importance_loss_weight"),
        *("load_loss_weight", "dispatcher", "deterministic", "dtype"),
    },
    "dispatcher": {
        *("name", "bfloat16", "capacity", "capacity_factor", "capacity_ceil_or_round", "capacity_multiple_of"),
        *("batch_priority", "partition_spec", "einsum_precision"),
    },
}

_ROUTERS: dict[str, RouterKind] = {
    "NoisyTopExpertsPerItemRouter": "experts_per_item",
    "NoisyTopItemsPerExpertRouter": "items_per_expert",
}


def state_from_reference(parameters: MutableMapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    """Parameters of the reference under our names: as `VisionTransformer.state_dict` has them.

    Arguments:
        parameters: by path, for example `Encoder/encoderblock_0/Mlp/Dense_0/kernel`. What is converted is removed, so
            that the peak of memory is the parameters and the largest of them.

    Raises:
        ConfigError: a parameter is missing or superfluous, or has the wrong shape; names it with both shapes.
    """
    check_shapes({name: value.shape for name, value in parameters.items()}, config)
    reader = _Reader(parameters, config)
    return {name: np.ascontiguousarray(value) for name, value in reader.model()}


def reference_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that a model of this configuration has in the reference, by path."""
    recorder = _Recorder({}, config)
    for _ in recorder.model():
        pass
    return recorder.shapes


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Compares a parameter tree with a configuration before any parameter is read.

    Raises:
        ConfigError: names the first parameter that differs, the shape found and the shape expected.
    """
    expected = reference_shapes(config)
    for name, shape in expected.items():
        _check_shape(name, shapes.get(name), shape)
    if superfluous := sorted(set(shapes) - set(expected)):
        name = superfluous[0]
        raise ConfigError(f"parameter {name} of shape {shapes[name]} has no place in a model of this configuration")


def _check_shape(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    if found is None:
        raise ConfigError(f"parameter {name} of shape {expected} is missing")
    if found != expected:
        raise ConfigError(f"parameter {name} has shape {found}, expected {expected}")


class _Reader:
    """Takes parameters out one by one and checks each shape."""

    def __init__(self, parameters: MutableMapping[str, Array], config: ModelConfig) -> None:
        self.parameters, self.config = parameters, config

    def take(self, name: str, *shape: int) -> Array:
        _check_shape(name, self.parameters[name].shape if name in self.parameters else None, shape)
        return self.parameters.pop(name)

    def model(self) -> Iterator[tuple[str, Array]]:
        config, size = self.config, self.config.hidden_size
        (height, width), channels = config.patch_size, config.channels
        kernel = self.take("embedding/kernel", height, width, channels, size)
        yield "embedding.weight", kernel.reshape(-1, size).T
        yield "embedding.bias", self.take("embedding/bias", size)
        if config.classifier == "token":
            yield "class_token", self.take("cls", 1, 1, size)
        if config.position_embedding == "learned":
            name = "Encoder/posembed_input/pos_embedding"
            yield "position_embedding", self.take(name, 1, config.tokens_per_image, size)
        for index in range(config.num_layers):
            yield from self.block(index)
        yield from self.norm("Encoder/encoder_norm", "norm")
        if config.classifier == "map":
            yield from self.map_head()
        width = size
        if config.representation_size is not None:
            width = config.representation_size
            yield from self.dense("pre_logits", "pre_logits", size, width)
        yield from self.dense("head", "head", width, config.num_classes)

    def block(self, index: int) -> Iterator[tuple[str, Array]]:
        config, theirs, ours = self.config, f"Encoder/encoderblock_{index}", f"blocks.{index}"
        size, mlp_dim = config.hidden_size, config.mlp_dim
        yield from self.norm(f"{theirs}/LayerNorm_0", f"{ours}.attention_norm")
        yield from self.norm(f"{theirs}/LayerNorm_1", f"{ours}.mlp_norm")
        yield from self.projection(f"{theirs}/SelfAttention", f"{ours}.attention.qkv", ("query", "key", "value"))
        yield from self.attention_output(f"{theirs}/SelfAttention", f"{ours}.attention")
        if config.moe is None or index not in config.moe.layers:
            yield from self.mlp(f"{theirs}/Mlp", f"{ours}.mlp")
            return
        experts = config.moe.num_experts
        yield f"{ours}.mlp.router.weight", self.take(f"{theirs}/Moe/Router/dense/kernel", size, experts).T
        for name, part, inputs, outputs in (("Dense_0", "in", size, mlp_dim), ("Dense_1", "out", mlp_dim, size)):
            kernel = self.take(f"{theirs}/Moe/Mlp/{name}/kernel", experts, inputs, outputs)
            yield f"{ours}.mlp.experts.weight_{part}", kernel
            yield f"{ours}.mlp.experts.bias_{part}", self.take(f"{theirs}/Moe/Mlp/{name}/bias", experts, outputs)

    def map_head(self) -> Iterator[tuple[str, Array]]:
        attention = "MapHead/MultiHeadDotProductAttention"
        yield "map_head.probe", self.take("MapHead/probe", 1, 1, self.config.hidden_size)
        yield from self.projection(attention, "map_head.query", ("query",))
        yield from self.projection(attention, "map_head.key_value", ("key", "value"))
        yield from self.attention_output(attention, "map_head")
        yield from self.norm("MapHead/LayerNorm", "map_head.norm")
        yield from self.mlp("MapHead/Mlp", "map_head.mlp")

    def projection(self, theirs: str, ours: str, parts: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
        """Kernels (D, H, d) side by side, as one matrix (parts * D, D)."""
        size, heads = self.config.hidden_size, self.config.num_heads
        shape = (heads, size // heads)
        kernels = [self.take(f"{theirs}/{part}/kernel", size, *shape).reshape(size, size) for part in parts]
        yield f"{ours}.weight", np.concatenate(kernels, axis=1).T
        yield f"{ours}.bias", np.concatenate([self.take(f"{theirs}/{part}/bias", *shape).ravel() for part in parts])

    def attention_output(self, theirs: str, ours: str) -> Iterator[tuple[str, Array]]:
        size, heads = self.config.hidden_size, self.config.num_heads
        kernel = self.take(f"{theirs}/out/kernel", heads, size // heads, size)
        yield f"{ours}.out.weight", kernel.reshape(size, size).T
        yield f"{ours}.out.bias", self.take(f"{theirs}/out/bias", size)
        if self.config.qk_norm:
            for part in ("query", "key"):
                yield f"{ours}.{part}_norm.weight", self.take(f"{theirs}/{part}_ln/scale", size // heads)

    def mlp(self, theirs: str, ours: str) -> Iterator[tuple[str, Array]]:
        size, mlp_dim = self.config.hidden_size, self.config.mlp_dim
        yield from self.dense(f"{theirs}/Dense_0", f"{ours}.linear_in", size, mlp_dim)
        yield from self.dense(f"{theirs}/Dense_1", f"{ours}.linear_out", mlp_dim, size)

    def dense(self, theirs: str, ours: str, inputs: int, outputs: int) -> Iterator[tuple[str, Array]]:
        yield f"{ours}.weight", self.take(f"{theirs}/kernel", inputs, outputs).T
        yield f"{ours}.bias", self.take(f"{theirs}/bias", outputs)

    def norm(self, theirs: str, ours: str) -> Iterator[tuple[str, Array]]:
        yield f"{ours}.weight", self.take(f"{theirs}/scale", self.config.hidden_size)
        yield f"{ours}.bias", self.take(f"{theirs}/bias", self.config.hidden_size)


class _Recorder(_Reader):
    """Notes what is asked for, and hands out zeros that take no memory."""

    def __init__(self, parameters: MutableMapping[str, Array], config: ModelConfig) -> None:
        super().__init__(parameters, config)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, *shape: int) -> Array:
        self.shapes[name] = shape
        return np.broadcast_to(np.float32(0), shape)


def config_from_reference(model: Mapping[str, Any], image_size: tuple[int, int]) -> ModelConfig:
    """Our configuration from the constructor arguments of the reference's `VisionTransformerMoe`.

    Arguments:
        model: `num_classes`, `patch_size`, `hidden_size`, `classifier`, `encoder` and so on.
        image_size: (height, width); the reference takes it from the input.

    Raises:
        ConfigError: an argument is missing or has a value that we do not support.
    """
    try:
        _check_keys(model)
        encoder = model["encoder"]
        moe, positions = encoder.get("moe") or {}, encoder.get("position_emb") or {}
        if moe.get("mlp_dim", encoder["mlp_dim"]) != encoder["mlp_dim"]:
            raise ConfigError(f"moe.mlp_dim {moe['mlp_dim']} must equal encoder.mlp_dim {encoder['mlp_dim']}")
        tokens = (image_size[0] // model["patch_size"][0]) * (image_size[1] // model["patch_size"][1])
        tokens += model["classifier"] == "token"
        return ModelConfig(
            image_size=image_size,
            patch_size=(model["patch_size"][0], model["patch_size"][1]),
            num_classes=model["num_classes"],
            hidden_size=model["hidden_size"],
            num_layers=encoder["num_layers"],
            mlp_dim=encoder["mlp_dim"],
            num_heads=encoder["num_heads"],
            classifier=_classifier(model["classifier"]),
            position_embedding=_position_embedding(positions.get("name", "learned")),
            position_temperature=float(positions.get("temperature", 10_000.0)),
            representation_size=model.get("representation_size"),
            qk_norm=encoder.get("attention_qk_norm", False),
            moe=_moe_from_reference(moe, tokens) if moe.get("layers") else None,
        )
    except KeyError as error:
        raise ConfigError(f"the reference's configuration lacks {error.args[0]!r}") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"the reference's configuration has a value of the wrong type: {error}") from error


def _check_keys(model: Mapping[str, Any]) -> None:
    """Refuses an argument that we do not know: it may change what the model computes."""
    encoder = model["encoder"]
    moe = encoder.get("moe") or {}
    router = moe.get("router") or {}
    for where, values in (
        ("model", model),
        ("encoder", encoder),
        ("position_emb", encoder.get("position_emb") or {}),
        ("moe", moe),
        ("router", router),
        ("dispatcher", router.get("dispatcher") or {}),
    ):
        if unknown := sorted(set(values) - _KNOWN_KEYS[where]):
            raise ConfigError(
                f"unknown key {unknown[0]!r} in {where}; known are {', '.join(sorted(_KNOWN_KEYS[where]))}"
            )


def _position_embedding(name: str) -> PositionEmbedding:
    known: tuple[PositionEmbedding, ...] = ("learned", "sincos2d", "none")
    for kind in known:
        if name == kind:
            return kind
    raise ConfigError(f"position_emb {name!r} is not supported; known are {', '.join(known)}")


def _classifier(name: str) -> Classifier:
    known: tuple[Classifier, ...] = ("token", "gap", "map")
    for classifier in known:
        if name == classifier:
            return classifier
    raise ConfigError(f"classifier {name!r} is not supported; known are {', '.join(known)}")


def _moe_from_reference(moe: Mapping[str, Any], tokens_per_image: int) -> MoeConfig:
    router = moe.get("router") or {}
    name = router.get("name", "NoisyTopExpertsPerItemRouter")
    if name not in _ROUTERS:
        raise ConfigError(f"router {name!r} is not supported; known are {', '.join(_ROUTERS)}")
    if router.get("deterministic", True) is not True:
        raise ConfigError(
            "router.deterministic is false: such a router draws noise at inference, its logits are random"
        )
    dispatcher = router.get("dispatcher") or {}
    if dispatcher.get("capacity") is not None:
        raise ConfigError(
            f"dispatcher.capacity = {dispatcher['capacity']} fixes the slots and leaves no capacity factor to choose "
            "at run time; replace it with the capacity_factor that gives as many slots"
        )
    group_size = moe.get("group_size", tokens_per_image)
    if group_size % tokens_per_image:
        raise ConfigError(
            f"group_size {group_size} must be a multiple of the {tokens_per_image} tokens of an image: "
            "a routing group holds whole images"
        )
    return MoeConfig(
        num_experts=moe["num_experts"],
        layers=tuple(moe["layers"]),
        num_selected_experts=router.get("num_selected_experts", 1),
        capacity_factor=dispatcher.get("capacity_factor", 1.0),
        router=_ROUTERS[name],
        routing="bpr" if dispatcher.get("batch_priority", False) else "vanilla",
        noise_std=router.get("noise_std", 1.0),
        importance_loss_weight=router.get("importance_loss_weight", 1.0),
        load_loss_weight=router.get("load_loss_weight", 1.0),
        capacity_rounding=dispatcher.get("capacity_ceil_or_round", "ceil"),
        capacity_multiple=dispatcher.get("capacity_multiple_of", REFERENCE_CAPACITY_MULTIPLE) or 1,
        group_images=group_size // tokens_per_image,
    )
