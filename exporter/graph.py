"""The ONNX graph of a V-MoE: the only module that knows how C and K enter a graph.

Axes: B images, S tokens per image, N = B * S, D hidden, H heads, G routing groups of T tokens, L MoE layers, E experts,
K the largest number of selected experts, P kept (token, expert) pairs.

The dispatch is ragged: of every MoE layer only the kept pairs are computed, so cost follows their sum and one batch may
mix operating points. Per layer:

    key[t, e]   choice * T + rank of token t if it chose expert e, else NO_CHOICE. Keys of an expert are unique, their
                order is the expert's queue: all first choices before all second ones, then the rank. Where experts
                choose their tokens it is the token's rank in the expert's order.
    limit[e]    the key in the last slot: the slots-th smallest of key[:, e]
    kept        key <= limit, as a mask (E, N)
    rows        NonZero lists the kept pairs by expert, then token; one Gather, one Split with run-time sizes
    expert      Gemm, Gelu, Gemm on a 2-D matrix with constant weights, which the runtime pre-packs (a batched 3-D
                MatMul would not be)
    combine     gate * output is added to the residual by one ScatterND per expert, chained. Within an expert tokens are
                unique; a single ScatterND over all experts would have duplicate indices, and with reduction=add that is
                a data race in ONNX Runtime's CPU kernel.

Slots are an input: computed inside the graph in float32, ceil would go wrong (200 * 0.3 / 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.bundle import InputType, WeightType
from vmoe.config import ModelConfig, MoeConfig
from vmoe.preprocess import Preprocessing, scale_and_offset

OPSET, IR_VERSION = 20, 10  # Gelu needs opset 20; IR 10 is the newest that the oldest supported Triton image reads
LAYER_NORM_EPSILON = 1e-6
NO_CHOICE = np.iinfo(np.int64).max

State = Mapping[str, npt.NDArray[np.float32]]
STORED_TYPES: dict[WeightType, tuple[npt.DTypeLike, ir.DataType]] = {
    "float32": (np.float32, ir.DataType.FLOAT),
    "float16": (np.float16, ir.DataType.FLOAT16),
    "bfloat16": (ml_dtypes.bfloat16, ir.DataType.BFLOAT16),
}
IMAGE_TYPES = {"uint8": ir.DataType.UINT8, "float32": ir.DataType.FLOAT}


def build_graph(
    config: ModelConfig,
    state: State,
    preprocessing: Preprocessing,
    *,
    input_type: InputType = "uint8",
    weight_type: WeightType = "float32",
    max_selected_experts: int | None = None,
) -> ir.Model:
    """The graph of a model, see `exporter.bundle` for its inputs and outputs.

    Arguments:
        state: parameters under the names of `vmoe.model.VisionTransformer.state_dict`.
        input_type: `uint8` pixels, normalised inside, or `float32` that is normalised already.
        weight_type: `float16` and `bfloat16` halve the file; a Cast at load widens the weights, arithmetic
            stays float32.
        max_selected_experts: largest K that the graph accepts; None takes the configured K.
    """
    return _Builder(config, state, preprocessing, input_type, weight_type, max_selected_experts).model()


class _Builder:
    """Writes nodes onto a tape. Methods take and return values whose shapes their docstrings give."""

    def __init__(
        self,
        config: ModelConfig,
        state: State,
        preprocessing: Preprocessing,
        input_type: InputType,
        weight_type: WeightType,
        max_selected_experts: int | None,
    ) -> None:
        self.config, self.state, self.preprocessing = config, state, preprocessing
        self.input_type, self.weight_type = input_type, weight_type
        self.max_selected = max_selected_experts or (0 if config.moe is None else config.moe.num_selected_experts)
        self.choices = 0 if config.moe is None else config.moe.choices_per_token(self.max_selected)
        self.tape = ir.tape.Tape()
        self.constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.kept: list[ir.Value] = []
        self.expert_load: list[ir.Value] = []
        self.token_experts: list[ir.Value] = []

    def model(self) -> ir.Model:
        config, moe = self.config, self.config.moe
        images = ir.val("images", IMAGE_TYPES[self.input_type], ["batch", *config.image_size, config.channels])
        inputs = [images]
        if moe is not None:
            inputs.append(ir.val("slots", ir.DataType.INT64, ["batch", len(moe.layers)]))
            inputs.append(ir.val("num_selected_experts", ir.DataType.INT64, ["batch", 1]))
        tokens = self._embed(images)
        for index in range(config.num_layers):
            name = f"blocks.{index}"
            normed = self._layer_norm(tokens, f"{name}.attention_norm")
            tokens = self.op("Add", tokens, self._attention(normed, f"{name}.attention"))
            normed = self._layer_norm(tokens, f"{name}.mlp_norm")
            if moe is not None and index in moe.layers:
                tokens = self._moe(normed, tokens, inputs[1], inputs[2], moe, f"{name}.mlp")
            else:
                tokens = self.op("Add", tokens, self._mlp(normed, f"{name}.mlp"))
        outputs = [self._output("logits", self._head(tokens), ir.DataType.FLOAT, ["batch", config.num_classes])]
        if moe is not None:
            layers, per_image = len(moe.layers), config.tokens_per_image
            for name, values, dtype, shape in (
                ("kept", self.kept, ir.DataType.FLOAT, [layers]),
                ("expert_load", self.expert_load, ir.DataType.INT64, [layers, moe.num_experts]),
                ("token_experts", self.token_experts, ir.DataType.INT64, [layers, per_image, self.choices]),
            ):
                outputs.append(self._output(name, self.op("Concat", *values, axis=1), dtype, ["batch", *shape]))
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": OPSET},
            name="vmoe",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="vmoe-serving")

    # Building blocks

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: int | float | str | list[int]) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """A small constant, stored once per value."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self.tape.initializer(ir.tensor(array), name=f"constant_{len(self.constants)}")
        return self.constants[key]

    def weight(
        self,
        name: str,
        values: npt.NDArray[np.float32] | None = None,
        *,
        factor: npt.NDArray[np.float32] | None = None,
    ) -> ir.Value:
        """A parameter as float32, under the state's name.

        Arguments:
            values: replaces the state's; a rearrangement of them.
            factor: broadcast over the last axis. With storage of 16 bits it is multiplied after widening, which the
                runtime does once at load, so that the stored numbers are the rounded parameters themselves.
        """
        array = self.state[name] if values is None else values
        dtype, ir_type = STORED_TYPES[self.weight_type]
        scaled = factor if self.weight_type == "float32" else None

        def stored_tensor() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(array if scaled is None else array * scaled, dtype=dtype))

        # Made when it is written: transposed copies of all weights at once would double the memory.
        tensor = ir.LazyTensor(stored_tensor, dtype=ir_type, shape=ir.Shape(array.shape), name=name)
        stored = self.tape.initializer(tensor, name=name)
        if self.weight_type == "float32":
            return stored
        wide = self.op("Cast", stored, to=ir.DataType.FLOAT.value)
        return wide if factor is None else self.op("Mul", wide, self.constant(factor, np.float32))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", value, self.constant(shape))

    def _output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        return value

    def _linear(self, rows: ir.Value, name: str) -> ir.Value:
        """(N, in) -> (N, out); the weight is (out, in) as torch stores it."""
        weight = self.weight(f"{name}.weight", self.state[f"{name}.weight"].T)
        return self.op("Gemm", rows, weight, self.weight(f"{name}.bias"))

    def _layer_norm(self, rows: ir.Value, name: str) -> ir.Value:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", rows, scale, bias, axis=-1, epsilon=LAYER_NORM_EPSILON)

    def _mlp(self, rows: ir.Value, name: str) -> ir.Value:
        """(N, D) -> (N, D)."""
        hidden = self.op("Gelu", self._linear(rows, f"{name}.linear_in"), approximate=self.config.gelu_approximation)
        return self._linear(hidden, f"{name}.linear_out")

    # The transformer around the experts

    def _embed(self, images: ir.Value) -> ir.Value:
        """(B, H, W, channels) -> (N, D)."""
        config = self.config
        (rows, columns), (height, width), channels = config.grid, config.patch_size, config.channels
        patches = self.reshape(images, -1, rows, height, columns, width, channels)
        patches = self.op("Transpose", patches, perm=[0, 1, 3, 2, 4, 5])  # before the Cast: a quarter of the bytes
        if self.input_type == "uint8":
            scale, offset = scale_and_offset(self.preprocessing)
            pixels = self.op("Cast", patches, to=ir.DataType.FLOAT.value)
            pixels = self.op("Mul", pixels, self.constant(scale, np.float32))
            patches = self.op("Add", pixels, self.constant(offset, np.float32))
        tokens = self._linear(self.reshape(patches, -1, height * width * channels), "embedding")
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
        config = self.config
        size, heads = config.hidden_size, config.num_heads
        head_dim = size // heads
        scale = np.float32(1 / math.sqrt(head_dim))
        factor = None if config.qk_norm else np.repeat([scale, 1, 1], size).astype(np.float32)
        weights = (
            self.weight(f"{name}.qkv.weight", self.state[f"{name}.qkv.weight"].T, factor=factor),
            self.weight(f"{name}.qkv.bias", factor=factor),
        )
        qkv = self.reshape(self.op("Gemm", rows, *weights), -1, config.tokens_per_image, 3, heads, head_dim)
        query, key, value = (
            self.reshape(part, -1, config.tokens_per_image, heads, head_dim)
            for part in self.tape.op_multi_out("Split", [qkv], {"axis": 2, "num_outputs": 3}, num_outputs=3)
        )
        if config.qk_norm:
            query_scale = self.weight(f"{name}.query_norm.weight", factor=np.full(head_dim, scale))
            query = self.op("LayerNormalization", query, query_scale, axis=-1, epsilon=LAYER_NORM_EPSILON)
            key_scale = self.weight(f"{name}.key_norm.weight")
            key = self.op("LayerNormalization", key, key_scale, axis=-1, epsilon=LAYER_NORM_EPSILON)
        query = self.op("Transpose", query, perm=[0, 2, 1, 3])
        return self._linear(self._mix(query, key, value), f"{name}.out")

    def _mix(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """Scaled query (B, H, Q, d), key and value (B, S, H, d) -> (B * Q, D)."""
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 2, 3, 1]))
        weights = self.op("Softmax", scores, axis=-1)
        mixed = self.op("MatMul", weights, self.op("Transpose", value, perm=[0, 2, 1, 3]))
        return self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), -1, self.config.hidden_size)

    def _head(self, tokens: ir.Value) -> ir.Value:
        """(N, D) -> (B, num_classes)."""
        config = self.config
        shape = (-1, config.tokens_per_image, config.hidden_size)
        if config.classifier == "token":
            # LayerNorm works token by token, so picking the class token first is exact and saves the others' share.
            pooled = self.op("Gather", self.reshape(tokens, *shape), self.constant(0), axis=1)
            pooled = self._layer_norm(pooled, "norm")
        elif config.classifier == "gap":
            normed = self.reshape(self._layer_norm(tokens, "norm"), *shape)
            pooled = self.op("ReduceMean", normed, self.constant([1]), keepdims=0)
        else:
            pooled = self._map_head(self._layer_norm(tokens, "norm"))
        if config.representation_size is not None:
            pooled = self.op("Tanh", self._linear(pooled, "pre_logits"))
        return self._linear(pooled, "head")

    def _map_head(self, tokens: ir.Value) -> ir.Value:
        """Attention pooling: (N, D) -> (B, D). The probe's query does not depend on the image: it is a constant."""
        config, state = self.config, self.state
        size, heads = config.hidden_size, config.num_heads
        query = state["map_head.probe"][0] @ state["map_head.query.weight"].T + state["map_head.query.bias"]
        query = query.reshape(1, heads, 1, -1)
        if config.qk_norm:
            centred = query - query.mean(-1, keepdims=True)
            query = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
            query = query * state["map_head.query_norm.weight"]
        query = query / math.sqrt(size // heads)
        key_value = self._linear(tokens, "map_head.key_value")
        key_value = self.reshape(key_value, -1, config.tokens_per_image, 2, heads, size // heads)
        key, value = (
            self.reshape(part, -1, config.tokens_per_image, heads, size // heads)
            for part in self.tape.op_multi_out("Split", [key_value], {"axis": 2, "num_outputs": 2}, num_outputs=2)
        )
        if config.qk_norm:
            key_scale = self.weight("map_head.key_norm.weight")
            key = self.op("LayerNormalization", key, key_scale, axis=-1, epsilon=LAYER_NORM_EPSILON)
        mixed = self._mix(self.constant(query, np.float32), key, value)
        pooled = self._linear(mixed, "map_head.out")
        return self.op("Add", pooled, self._mlp(self._layer_norm(pooled, "map_head.norm"), "map_head.mlp"))

    # The experts

    def _moe(
        self, normed: ir.Value, residual: ir.Value, slots: ir.Value, selected: ir.Value, moe: MoeConfig, name: str
    ) -> ir.Value:
        """(N, D) after LayerNorm and the residual (N, D) -> the residual with the experts' work added.

        Arguments:
            slots: (B, L), the graph's input.
            selected: (B, 1), the graph's input.
        """
        group = moe.group_images
        layer = self.constant([len(self.kept)])
        slots = self.op("Gather", slots, layer, axis=1)  # (B, 1)
        if group > 1:  # one value per group: its first image's
            window = self.constant([0]), self.constant([NO_CHOICE]), self.constant([0]), self.constant([group])
            slots, selected_by_group = self.op("Slice", slots, *window), self.op("Slice", selected, *window)
        else:
            selected_by_group = selected
        router = self.weight(f"{name}.router.weight", self.state[f"{name}.router.weight"].T)
        gates = self.op("Softmax", self.op("MatMul", normed, router), axis=-1)  # (N, E)
        if moe.router == "items_per_expert":
            keys, experts = self._keys_of_choosing_experts(gates, moe)
        else:
            keys, experts = self._keys(gates, selected_by_group, moe)
        kept = self._fill(keys, slots)  # (G, E, T)
        self._record(kept, experts, selected, moe)
        by_expert = self.reshape(self.op("Transpose", kept, perm=[1, 0, 2]), moe.num_experts, -1)  # (E, N)
        return self._serve(normed, residual, gates, by_expert, moe, name)

    def _keys(self, gates: ir.Value, selected: ir.Value, moe: MoeConfig) -> tuple[ir.Value, ir.Value]:
        """Queue keys (G, E, T) and chosen experts (G, T, K) from gates (N, E) and K of each group (G, 1)."""
        tokens = self.config.tokens_per_image * moe.group_images
        grouped = self.reshape(gates, -1, tokens, moe.num_experts)
        # TopK breaks ties by the lower index, as the reference does.
        top, experts = self.tape.op_multi_out(
            "TopK", [grouped, self.constant([self.max_selected])], {"axis": -1}, num_outputs=2
        )
        choice = self.constant(np.arange(self.max_selected))
        if moe.routing == "bpr":
            first = self.op("Gather", top, self.constant(0), axis=2)  # (G, T)
            rank = self.reshape(self._rank(first, tokens), -1, tokens, 1)
        else:
            rank = self.constant(np.arange(tokens)[:, None])
        key = self.op("Add", rank, self.constant(np.arange(self.max_selected) * tokens))  # (G, T, K)
        chosen = self.op("Less", choice, self.op("Unsqueeze", selected, self.constant([1])))  # (G, 1, K)
        no_choice = self.constant(NO_CHOICE)
        key = self.op("Where", chosen, key, no_choice)
        empty = self.op("Expand", no_choice, self.op("Shape", grouped))
        keys = self.op("ScatterElements", empty, experts, key, axis=2)
        return self.op("Transpose", keys, perm=[0, 2, 1]), experts

    def _keys_of_choosing_experts(self, gates: ir.Value, moe: MoeConfig) -> tuple[ir.Value, ir.Value]:
        """Ranks of the tokens for every expert (G, E, T), and experts (G, T, E) of which choice e is e."""
        tokens = self.config.tokens_per_image * moe.group_images
        grouped = self.reshape(gates, -1, tokens, moe.num_experts)
        keys = self._rank(self.op("Transpose", grouped, perm=[0, 2, 1]), tokens)
        return keys, self.op("Expand", self.constant(np.arange(moe.num_experts)), self.op("Shape", grouped))

    def _rank(self, scores: ir.Value, tokens: int) -> ir.Value:
        """Rank of every score along the last axis of size `tokens`, 0 for the largest; ties by the lower index."""
        count = self.constant([tokens])
        _, order = self.tape.op_multi_out("TopK", [scores, count], num_outputs=2)
        _, rank = self.tape.op_multi_out("TopK", [order, count], {"largest": 0}, num_outputs=2)  # its inverse
        return rank

    def _fill(self, keys: ir.Value, slots: ir.Value) -> ir.Value:
        """Which tokens get a slot: keys (G, E, T), slots (G, 1) -> mask (G, E, T)."""
        assert self.config.moe is not None
        tokens = self.config.tokens_per_image * self.config.moe.group_images
        most = self.op("ReduceMax", slots, keepdims=0)
        most = self.op("Min", self.op("Max", most, self.constant(1)), self.constant(tokens))
        smallest, _ = self.tape.op_multi_out(
            "TopK", [keys, self.reshape(most, 1)], {"axis": -1, "largest": 0}, num_outputs=2
        )  # (G, E, most), ascending
        slots = self.op("Unsqueeze", slots, self.constant([2]))  # (G, 1, 1)
        last = self.op("Sub", self.op("Max", self.op("Min", slots, most), self.constant(1)), self.constant(1))
        shape = self.op("Concat", self.op("Shape", keys, start=0, end=2), self.constant([1]), axis=0)
        limit = self.op("GatherElements", smallest, self.op("Expand", last, shape), axis=2)  # (G, E, 1)
        limit = self.op("Min", limit, self.constant(NO_CHOICE - 1))
        limit = self.op("Where", self.op("Greater", slots, self.constant(0)), limit, self.constant(-1))
        return self.op("LessOrEqual", keys, limit)

    def _record(self, kept: ir.Value, experts: ir.Value, selected: ir.Value, moe: MoeConfig) -> None:
        """Adds this layer to the outputs; kept (G, E, T), experts (G, T, choices), selected (B, 1)."""
        per_image = self.config.tokens_per_image
        if moe.group_images > 1:
            kept = self.reshape(kept, -1, moe.num_experts, moe.group_images, per_image)
            kept = self.op("Transpose", kept, perm=[0, 2, 1, 3])
            kept = self.reshape(kept, -1, moe.num_experts, per_image)
            experts = self.reshape(experts, -1, per_image, self.choices)
        load = self.op("ReduceSum", self.op("Cast", kept, to=ir.DataType.INT64.value), self.constant([2]), keepdims=0)
        float32 = ir.DataType.FLOAT.value
        served = self.op("Cast", self.op("ReduceSum", load, self.constant([1])), to=float32)
        asked = self.op("Cast", self.op("Mul", selected, self.constant(per_image)), to=float32)
        served_by = self.op(
            "Where",
            self.op("GatherElements", self.op("Transpose", kept, perm=[0, 2, 1]), experts, axis=2),
            experts,
            self.constant(-1),
        )
        self.kept.append(self.op("Div", served, asked))  # (B, 1)
        self.expert_load.append(self.op("Unsqueeze", load, self.constant([1])))  # (B, 1, E)
        self.token_experts.append(self.op("Unsqueeze", served_by, self.constant([1])))  # (B, 1, S, K)

    def _serve(
        self, normed: ir.Value, residual: ir.Value, gates: ir.Value, kept: ir.Value, moe: MoeConfig, name: str
    ) -> ir.Value:
        """Serves the kept pairs: normed and residual (N, D), gates (N, E), kept (E, N) -> (N, D)."""
        sizes = self.op("ReduceSum", self.op("Cast", kept, to=ir.DataType.INT64.value), self.constant([1]), keepdims=0)
        pairs = self.op("NonZero", kept)  # (2, P): expert, token
        token = self.op("Gather", pairs, self.constant(1), axis=0)  # (P,)
        gate = self.op("Compress", self.op("Transpose", gates, perm=[1, 0]), self.reshape(kept, -1))  # (P,), same order

        def split(value: ir.Value) -> tuple[ir.Value, ...]:
            outputs = self.tape.op_multi_out("Split", [value, sizes], {"axis": 0}, num_outputs=moe.num_experts)
            return tuple(outputs)

        rows = split(self.op("Gather", normed, token, axis=0))
        tokens, weights = split(self.reshape(token, -1, 1)), split(self.reshape(gate, -1, 1))
        for e in range(moe.num_experts):
            parts = [
                self.weight(f"{name}.experts.{e}.{part}", self.state[f"{name}.experts.{part}"][e])
                for part in ("weight_in", "bias_in", "weight_out", "bias_out")
            ]
            hidden = self.op(
                "Gelu", self.op("Gemm", rows[e], parts[0], parts[1]), approximate=self.config.gelu_approximation
            )
            output = self.op("Mul", self.op("Gemm", hidden, parts[2], parts[3]), weights[e])
            residual = self.op("ScatterND", residual, tokens[e], output, reduction="add")
        return residual
