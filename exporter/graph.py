"""The ONNX graph of a V-MoE. How C and K enter it is known to `exporter.moe_graph` alone.

Axes: B images, S tokens per image, N = B * S, D hidden, H heads, Q queries, d head width.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import onnx_ir as ir

from exporter.bundle import InputType, WeightType
from exporter.moe_graph import MoeLayers
from exporter.products import Products
from exporter.tape import LAYER_NORM_EPSILON, State, Tape
from vmoe.config import ModelConfig
from vmoe.preprocess import Preprocessing, scale_and_offset

OPSET, IR_VERSION = 20, 10  # Gelu needs opset 20; IR 10 is the newest that the oldest supported Triton image reads
RUNTIME_DOMAIN = "com.microsoft"  # operators of ONNX Runtime that are not standard
IMAGE_TYPES = {"uint8": ir.DataType.UINT8, "float32": ir.DataType.FLOAT}


def build_graph(
    config: ModelConfig,
    state: State,
    preprocessing: Preprocessing,
    *,
    input_type: InputType = "uint8",
    weight_type: WeightType = "float32",
    max_selected_experts: int | None = None,
    class_token_shortcut: bool = True,
    moe_layers: type[MoeLayers] = MoeLayers,
    products: Products | None = None,
) -> ir.Model:
    """The graph of a model, see `exporter.bundle` for its inputs and outputs.

    Arguments:
        state: parameters under the names of `vmoe.model.VisionTransformer.state_dict`.
        input_type: `uint8` pixels, normalised inside, or `float32` that is normalised already.
        weight_type: `float16` and `bfloat16` halve the file; a Cast at load widens the weights, arithmetic
            stays float32.
        max_selected_experts: largest K that the graph accepts; None takes the configured K.
        class_token_shortcut: leave out what nobody reads where the head looks at the class token alone: in the last
            block the MLP or the experts' work of all other tokens and, if that block is dense, their queries. Routing
            stays as it is. False is for comparison.
        moe_layers: writes the experts.
        products: writes the large products; None in float32.
    """
    shortcut = class_token_shortcut and config.classifier == "token"
    return _Builder(
        config,
        state,
        preprocessing,
        input_type,
        weight_type,
        max_selected_experts,
        shortcut,
        moe_layers,
        products or Products(),
    ).model()


def query_factor(config: ModelConfig) -> np.float32:
    """1 / sqrt(head_dim), folded into what produces the queries of the blocks; `exporter.recover` takes it out."""
    return np.float32(1 / math.sqrt(config.hidden_size // config.num_heads))


class _Builder(Tape):
    """Writes the transformer around the experts. Methods take and return values whose shapes their docstrings give."""

    def __init__(
        self,
        config: ModelConfig,
        state: State,
        preprocessing: Preprocessing,
        input_type: InputType,
        weight_type: WeightType,
        max_selected_experts: int | None,
        shortcut: bool,
        moe_layers: type[MoeLayers],
        products: Products,
    ) -> None:
        super().__init__(state, weight_type, products)
        self.config, self.preprocessing, self.input_type = config, preprocessing, input_type
        self.max_selected_experts, self.shortcut, self.moe_layers = max_selected_experts, shortcut, moe_layers

    def model(self) -> ir.Model:
        config, moe = self.config, self.config.moe
        images = ir.val("images", IMAGE_TYPES[self.input_type], ["batch", *config.image_size, config.channels])
        inputs, layers = [images], None
        if moe is not None:
            inputs.append(ir.val("slots", ir.DataType.INT64, ["batch", len(moe.layers)]))
            inputs.append(ir.val("num_selected_experts", ir.DataType.INT64, ["batch", 1]))
            layers = self.moe_layers(self, config, moe, inputs[1], inputs[2], self.max_selected_experts)
        tokens = self._embed(images)
        for index in range(config.num_layers):
            name, sparse = f"blocks.{index}", layers is not None and index in layers.blocks
            only_class = self.shortcut and index == config.num_layers - 1
            normed = self.layer_norm(tokens, f"{name}.attention_norm")
            if only_class and not sparse:
                tokens = self.op("Add", self._class_rows(tokens), self._attention_of_class(normed, f"{name}.attention"))
            else:  # a router ranks all tokens
                tokens = self.op("Add", tokens, self._attention(normed, f"{name}.attention"))
            normed = self.layer_norm(tokens, f"{name}.mlp_norm")
            if layers is not None and sparse:
                tokens = layers.write(normed, tokens, f"{name}.mlp", only_class=only_class)
            else:
                tokens = self.op("Add", tokens, self._mlp(normed, f"{name}.mlp"))
        outputs = [self._output("logits", self._head(tokens), ir.DataType.FLOAT, ["batch", config.num_classes])]
        if layers is not None:
            for name, value, dtype, shape in layers.records():
                outputs.append(self._output(name, value, dtype, ["batch", *shape]))
        return ir.Model(self.graph(inputs, outputs, OPSET), ir_version=IR_VERSION, producer_name="vmoe-serving")

    def _output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        return value

    def _mlp(self, rows: ir.Value, name: str) -> ir.Value:
        """(N, D) -> (N, D)."""
        hidden = self.op("Gelu", self.linear(rows, f"{name}.linear_in"), approximate=self.config.gelu_approximation)
        return self.linear(hidden, f"{name}.linear_out")

    def _embed(self, images: ir.Value) -> ir.Value:
        """(B, H, W, channels) -> (N, D)."""
        config = self.config
        (rows, columns), (height, width), channels = config.grid, config.patch_size, config.channels
        patches = self.reshape(images, -1, rows, height, columns, width, channels)
        patches = self.op("Transpose", patches, perm=[0, 1, 3, 2, 4, 5])  # before the Cast: a quarter of the bytes
        if self.input_type == "uint8":
            scale, offset = scale_and_offset(self.preprocessing)
            tokens = self.products.of_pixels(self, patches, scale, offset, "embedding")
        else:
            tokens = self.linear(self.reshape(patches, -1, height * width * channels), "embedding")
        size = config.hidden_size
        tokens = self.reshape(tokens, -1, rows * columns, size)
        if config.position_embedding == "sincos2d":
            tokens = self.op("Add", tokens, self.weight("sincos2d"))
        if config.classifier == "token":
            batch = self.op("Shape", images, start=0, end=1)
            shape = self.op("Concat", batch, self.constant([1, size]), axis=0)
            class_token = self.op("Expand", self.weight("class_token"), shape)
            tokens = self.op("Concat", class_token, tokens, axis=1)
        if config.position_embedding == "learned":
            tokens = self.op("Add", tokens, self.weight("position_embedding"))
        return self.reshape(tokens, -1, size)

    def _attention(self, rows: ir.Value, name: str) -> ir.Value:
        """(N, D) -> (N, D). The query's 1 / sqrt(head_dim) is folded into the weights that produce it."""
        if type(self.products) is Products and not self.config.qk_norm:
            return self._fused_attention(rows, name)
        operand = self.operand(rows, f"{name}.qkv")
        query, key, value = self._project(operand, name, "query", "key", "value")
        return self._attend(query, key, value, name)

    def _fused_attention(self, rows: ir.Value, name: str) -> ir.Value:
        """(N, D) -> (N, D): one operator of ONNX Runtime from the projection to the mixed values, for ten nodes.

        The same numbers to the bit. The shipped model is 4 to 7 % faster by it, S/32 and B/16 neither
        faster nor slower (one thread, AMD EPYC, onnxruntime 1.32.0, 2026-11-28).
        """
        size, heads = self.config.hidden_size, self.config.num_heads
        factor = np.repeat(np.array([query_factor(self.config), 1, 1], np.float32), size)
        weight, bias = (self.weight(*each, factor=factor) for each in self.linear_parameters(f"{name}.qkv"))
        tokens = self.reshape(rows, -1, self.config.tokens_per_image, size)
        mixed = self.op("Attention", tokens, weight, bias, domain=RUNTIME_DOMAIN, num_heads=heads, scale=1.0)
        return self.linear(self.reshape(mixed, -1, size), f"{name}.out")

    def _attention_of_class(self, rows: ir.Value, name: str) -> ir.Value:
        """(N, D) -> (B, D): what the class token of every image reads from all its tokens."""
        operand = self.operand(rows, f"{name}.qkv")
        (query,) = self._project(self._class_rows(operand), name, "query")
        key, value = self._project(operand, name, "key", "value")
        return self._attend(query, key, value, name)

    def _project(self, operand: ir.Value, name: str, *parts: Literal["query", "key", "value"]) -> tuple[ir.Value, ...]:
        """(B * T, D) -> (B, H, T, d) for each of some neighbouring parts; T is S, or 1 for the query alone."""
        size, count = self.config.hidden_size, len(parts)
        start = ("query", "key", "value").index(parts[0])
        columns = slice(start * size, (start + count) * size)
        factor = None
        if parts[0] == "query" and not self.config.qk_norm:
            factor = np.repeat(np.array([query_factor(self.config), 1, 1][:count], np.float32), size)
        kernel, bias = (f"{name}.qkv.{kind}" for kind in ("weight", "bias"))
        part_of = "" if count == 3 else f".{parts[0]}"
        product = self.affine(
            operand,
            f"{name}.qkv",
            (kernel + part_of, self.state[kernel][columns].T),
            (bias + part_of, self.state[bias][columns]),
            factor,
        )
        tokens = self.config.tokens_per_image if count > 1 else 1
        return self._by_head(product, tokens, count)

    def _by_head(self, product: ir.Value, tokens: int, count: int) -> tuple[ir.Value, ...]:
        """(B * T, count * D) -> count times (B, H, T, d)."""
        size, heads = self.config.hidden_size, self.config.num_heads
        product = self.reshape(product, -1, tokens, count * heads, size // heads)
        product = self.op("Transpose", product, perm=[0, 2, 1, 3])
        return (product,) if count == 1 else self.outputs(count, "Split", product, axis=1, num_outputs=count)

    def _attend(self, query: ir.Value, key: ir.Value, value: ir.Value, name: str) -> ir.Value:
        """Query (B, H, T, d), key and value (B, H, S, d) -> (B * T, D)."""
        if self.config.qk_norm:
            factor = np.full(self.config.hidden_size // self.config.num_heads, query_factor(self.config))
            query_scale = self.weight(f"{name}.query_norm.weight", factor=factor)
            query = self.op("LayerNormalization", query, query_scale, axis=-1, epsilon=LAYER_NORM_EPSILON)
            key_scale = self.weight(f"{name}.key_norm.weight")
            key = self.op("LayerNormalization", key, key_scale, axis=-1, epsilon=LAYER_NORM_EPSILON)
        return self.linear(self._mix(query, key, value), f"{name}.out")

    def _class_rows(self, rows: ir.Value) -> ir.Value:
        """(N, D) -> (B, D)."""
        return self.first_rows(rows, self.config.tokens_per_image, self.config.hidden_size)

    def _mix(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """Scaled query (B, H, Q, d), key and value (B, H, S, d) -> (B * Q, D)."""
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        return self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), -1, self.config.hidden_size)

    def _head(self, tokens: ir.Value) -> ir.Value:
        """(N, D), or with the shortcut (B, D) of the class tokens -> (B, num_classes)."""
        config = self.config
        shape = (-1, config.tokens_per_image, config.hidden_size)
        if config.classifier == "token":
            # LayerNorm works token by token, so picking the class token first is exact and saves the others' share.
            pooled = self.layer_norm(tokens if self.shortcut else self._class_rows(tokens), "norm")
        elif config.classifier == "gap":
            normed = self.reshape(self.layer_norm(tokens, "norm"), *shape)
            pooled = self.op("ReduceMean", normed, self.constant([1]), keepdims=0)
        else:
            pooled = self._map_head(self.layer_norm(tokens, "norm"))
        if config.representation_size is not None:
            pooled = self.op("Tanh", self.linear(pooled, "pre_logits"))
        return self.linear(pooled, "head")

    def _map_head(self, tokens: ir.Value) -> ir.Value:
        """Attention pooling: (N, D) -> (B, D). The probe's query depends on no image; it is computed at load."""
        config = self.config
        size, heads = config.hidden_size, config.num_heads
        probe = self.reshape(self.weight("map_head.probe"), 1, size)
        kernel, bias = self.linear_parameters("map_head.query")
        query = self.op(
            "Gemm", probe, self.weight(*kernel), self.weight(*bias)
        )  # float32 whatever the other products are
        query = self.reshape(query, 1, heads, 1, size // heads)
        if config.qk_norm:
            query_scale = self.weight("map_head.query_norm.weight")
            query = self.op("LayerNormalization", query, query_scale, axis=-1, epsilon=LAYER_NORM_EPSILON)
        query = self.op("Mul", query, self.constant(query_factor(config), np.float32))
        key, value = self._by_head(self.linear(tokens, "map_head.key_value"), config.tokens_per_image, 2)
        if config.qk_norm:
            key_scale = self.weight("map_head.key_norm.weight")
            key = self.op("LayerNormalization", key, key_scale, axis=-1, epsilon=LAYER_NORM_EPSILON)
        mixed = self._mix(query, key, value)
        pooled = self.linear(mixed, "map_head.out")
        return self.op("Add", pooled, self._mlp(self.layer_norm(pooled, "map_head.norm"), "map_head.mlp"))
