"""The MoE layers of the graph: the only module that knows how C and K enter a graph.

Axes: B images, S tokens per image, N = B * S, D hidden, G routing groups of T tokens, L MoE layers, E experts, K
choices per token, F slots that any group asks for, P kept (token, expert) pairs.

The dispatch is ragged: of every MoE layer only the kept pairs are computed, so cost follows their sum and one batch may
mix operating points. A pair is known by its *place* n * K + k: choice k of token n. Per layer:

    key[t, k]   place in the queue, the largest first, 0 for a choice that is not the image's to make. Queues are served
                by choice, then by the token's first gate: key = gate * 2^(-c k), exact in float32, where 2^-c is less
                than any first gate (at least 1 / E). Vanilla: the tokens' numbers, backwards. Where experts choose
                their tokens: their gates.
    queue[e]    the keys of expert e, 0 for all other pairs: (E, G, T * K)
    slots       TopK(queue, F), whose indices are the places; ties go to the lower place, which is the earlier token.
                A slot is filled where its key is positive and its number below the group's slots.
    rows        Compress lists the filled slots by expert; one Gather, one Split with run-time sizes
    expert      Gemm, Gelu, Gemm on a 2-D matrix with constant weights, which the runtime pre-packs (a batched 3-D
                MatMul would not be, and is slower from 2 rows per expert on)
    combine     ScatterND writes every row to its place in (N * K, D), then a MatMul of gates (1, K) and rows (K, D) per
                token. No two rows have the same place. Adding them to the residual directly has duplicate indices, and
                with reduction=add that is a data race in ONNX Runtime's CPU kernel; one ScatterND per expert has none,
                but takes two nodes per expert.

Slots are an input: computed inside the graph in float32, ceil would go wrong (200 * 0.3 / 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.tape import Tape
from vmoe.config import ModelConfig, MoeConfig

SMALLEST_EXPONENT = -126  # of normal float32


@dataclass(frozen=True)
class Slots:
    """Slots of the experts.

    Attributes:
        place: (E, G, F), the pair in each slot, and some pair where the slot is not filled.
        filled: (E, G, F), whether the pair is to be served.
    """

    place: ir.Value
    filled: ir.Value


class MoeLayers:
    """Writes one MoE layer after the other onto a tape.

    Attributes:
        blocks: numbers of the blocks that have experts.
    """

    def __init__(
        self,
        tape: Tape,
        config: ModelConfig,
        moe: MoeConfig,
        slots: ir.Value,
        selected: ir.Value,
        max_selected_experts: int | None,
    ) -> None:
        """Arguments:
        slots: (B, L), the graph's input.
        selected: (B, 1), the graph's input `num_selected_experts`.
        max_selected_experts: None takes the configured K.
        """
        self.tape, self.config, self.moe, self.selected = tape, config, moe, selected
        self.op, self.outputs, self.constant, self.reshape = tape.op, tape.outputs, tape.constant, tape.reshape
        self.blocks = moe.layers
        self.max_selected = max_selected_experts or moe.num_selected_experts
        self.choices = moe.choices_per_token(self.max_selected)
        self._group_tokens = config.tokens_per_image * moe.group_images
        self._group_places = self._group_tokens * self.choices
        self._loads: list[ir.Value] = []
        self._served: list[ir.Value] = []
        if moe.group_images > 1:  # one value per group: its first image's
            every = self.constant([0]), self.constant([np.iinfo(np.int64).max]), self.constant([0])
            slots, selected = (
                self.op("Slice", each, *every, self.constant([moe.group_images])) for each in (slots, selected)
            )
        self._read_points(slots, selected)

    def _read_points(self, slots: ir.Value, selected: ir.Value) -> None:
        """What the layers need of slots (G, L) and K (G, 1), for all layers at once."""
        layers, tokens = len(self.blocks), self._group_tokens
        most = self.op("ReduceMax", slots, self.constant([0]), keepdims=0)
        most = self.op("Min", self.op("Max", most, self.constant(1)), self.constant(tokens))
        self._most = self.outputs(layers, "Split", most, axis=0, num_outputs=layers)  # (1,) each
        granted = self.op("Less", self.constant(np.arange(tokens)), self.op("Unsqueeze", slots, self.constant([2])))
        # (G, L, T), what the key in each slot must exceed
        self._floors = self.op("Where", granted, self.constant(0, np.float32), self.constant(np.inf, np.float32))
        if self.moe.router == "experts_per_item":
            selected = self.op("Unsqueeze", selected, self.constant([1]))  # (G, 1, 1)
            chosen = self.op("Less", self.constant(np.arange(self.max_selected)), selected)
            self._chosen = self.op("Cast", chosen, to=ir.DataType.FLOAT.value)  # (G, 1, K)
            if self.moe.routing == "bpr":
                self._scale = self.op("Mul", self._chosen, self.constant(self._choice_scale(), np.float32))
        groups = self.op("Squeeze", self.op("Shape", slots, start=0, end=1))
        end = self.op("Mul", groups, self.constant(self._group_places))
        first = self.op("Range", self.constant(0), end, self.constant(self._group_places))
        self._first_place = self.reshape(first, 1, -1, 1)  # (1, G, 1)

    def _choice_scale(self) -> list[float]:
        """Powers of 2, so that a first gate times its choice's is exact and less than any of the choice before."""
        experts, choices = self.moe.num_experts, self.max_selected
        bits = (experts - 1).bit_length() + 1  # one more than 1 / E needs, for a softmax that rounds
        if choices * bits > -SMALLEST_EXPONENT:
            most = -SMALLEST_EXPONENT // bits
            raise ValueError(f"K is up to {choices} of {experts} experts; priorities are told apart for K up to {most}")
        return [2.0 ** (-bits * choice) for choice in range(choices)]

    def write(self, normed: ir.Value, residual: ir.Value, name: str, *, only_class: bool = False) -> ir.Value:
        """The next layer: (N, D) after LayerNorm and the residual (N, D) -> the residual with the experts' work added.

        Arguments:
            name: of the layer in the state.
            only_class: route all tokens, serve the first one of every image, and return (B, D) of these.
        """
        router = self.tape.weight(f"{name}.router.weight", self.tape.state[f"{name}.router.weight"].T)
        gates = self.op("Softmax", self.op("MatMul", normed, router), axis=-1)  # (N, E)
        gates = self.reshape(gates, -1, self._group_tokens, self.moe.num_experts)
        key, experts, weights = self._choose(gates)
        slots = self._fill(key, experts)
        self._record(slots, experts)
        if only_class:
            tokens, size = self.config.tokens_per_image, self.config.hidden_size
            normed, residual = (self.tape.first_rows(rows, tokens, size) for rows in (normed, residual))
            weights = self.tape.first_rows(weights, tokens, self.choices)
            slots = self._of_class_tokens(slots)
        return self.serve(normed, residual, self.reshape(weights, -1, 1, self.choices), slots, name)

    def _choose(self, gates: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Gates (G, T, E) -> keys, experts and weights of all choices, (G, T, K) each."""
        tokens, moe = self._group_tokens, self.moe
        if moe.router == "items_per_expert":
            experts = self.constant(np.tile(np.arange(moe.num_experts), (1, tokens, 1)))
            return self._positive(gates), experts, gates
        # TopK breaks ties by the lower index, as the reference does.
        weights, experts = self.outputs(2, "TopK", gates, self.constant([self.max_selected]), axis=-1)
        if moe.routing == "bpr":
            first = self.op("Gather", weights, self.constant([0]), axis=2)
            key = self._positive(self.op("Mul", first, self._scale))
        else:
            place = np.arange(self.max_selected) * tokens + np.arange(tokens)[:, None]
            key = self.op("Mul", self._chosen, self.constant(place.size - place, np.float32))
        if moe.normalize_weights:
            own = self.op("ReduceSum", self.op("Mul", weights, self._chosen), self.constant([2]))
            weights = self.op("Div", weights, own)
        return key, experts, weights

    def _positive(self, key: ir.Value) -> ir.Value:
        """0 for what is not a number, which a sort must not see."""
        return self.op("ThresholdedRelu", key, alpha=0.0)

    def _fill(self, key: ir.Value, experts: ir.Value) -> Slots:
        """Who gets the slots: keys and experts (G, T, K)."""
        layer = len(self._loads)
        most = self._most[layer]
        key, experts = (self.reshape(each, -1, self._group_places) for each in (key, experts))
        depth, off_on = self.constant(self.moe.num_experts), self.constant([0, 1], np.float32)
        queue = self.op("Mul", self.op("OneHot", experts, depth, off_on, axis=0), key)  # (E, G, T * K)
        ahead, place = self.outputs(2, "TopK", queue, most, axis=-1)
        floor = self.op("Gather", self._floors, self.constant(layer), axis=1)
        floor = self.op("Slice", floor, self.constant([0]), most, self.constant([1]))  # (G, F)
        return Slots(self.op("Add", place, self._first_place), self.op("Less", floor, ahead))

    def _of_class_tokens(self, slots: Slots) -> Slots:
        """Slots of the first tokens alone, with their places among the first tokens."""
        choices = self.constant(self.choices)
        per_image = self.constant(self.config.tokens_per_image * self.choices)
        image, within = self.op("Div", slots.place, per_image), self.op("Mod", slots.place, per_image)
        filled = self.op("And", slots.filled, self.op("Less", within, choices))
        place = self.op("Add", self.op("Mul", image, choices), within)
        return Slots(self.op("Where", filled, place, self.constant(0)), filled)

    def _record(self, slots: Slots, experts: ir.Value) -> None:
        """Keeps what the outputs need. All of it runs in every batch: the runtime computes outputs that nobody fetches,
        too (its option to leave them out is ignored by builds for inference: microsoft/onnxruntime#16013)."""
        count = self.op("Cast", slots.filled, to=ir.DataType.INT64.value)
        self._loads.append(self.op("ReduceSum", count, self.constant([2])))  # (E, G, 1)
        pairs = self._pairs(slots)
        experts_of_pairs = self.reshape(experts, -1)
        place = pairs
        if self.moe.router == "items_per_expert":  # one constant for all groups
            place = self.op("Mod", pairs, self.op("Size", experts))
        served = self.op("Gather", experts_of_pairs, place)
        nobody = self.op("Expand", self.constant(-1), self._num_places(self.selected, self.config.tokens_per_image))
        served = self.op("ScatterElements", nobody, pairs, served)
        self._served.append(self.reshape(served, -1, 1, self.config.tokens_per_image, self.choices))

    def records(self) -> Iterator[tuple[str, ir.Value, ir.DataType, list[int]]]:
        """What the layers did, as outputs of the graph: name, value, type, and shape without the batch."""
        layers, per_image, experts = len(self.blocks), self.config.tokens_per_image, self.moe.num_experts
        served = self.op("Concat", *self._served, axis=1)  # (B, L, S, K)
        if self.moe.group_images == 1:
            load = self.op("Transpose", self.op("Concat", *self._loads, axis=2), perm=[1, 2, 0])
        else:
            by = self.reshape(served, -1, layers, per_image * self.choices, 1)
            by = self.op("Cast", self.op("Equal", by, self.constant(np.arange(experts))), to=ir.DataType.INT64.value)
            load = self.op("ReduceSum", by, self.constant([2]), keepdims=0)
        total = self.op("ReduceSum", load, self.constant([2]), keepdims=0)  # (B, L)
        asked = self.op("Mul", self.selected, self.constant(per_image))
        total, asked = (self.op("Cast", each, to=ir.DataType.FLOAT.value) for each in (total, asked))
        yield "kept", self.op("Div", total, asked), ir.DataType.FLOAT, [layers]
        yield "expert_load", load, ir.DataType.INT64, [layers, experts]
        yield "token_experts", served, ir.DataType.INT64, [layers, per_image, self.choices]

    def _num_places(self, rows: ir.Value, per_row: int) -> ir.Value:
        """Number of rows times K places for each of `per_row` tokens, as a shape."""
        return self.op("Mul", self.op("Shape", rows, start=0, end=1), self.constant([per_row * self.choices]))

    def _pairs(self, slots: Slots) -> ir.Value:
        """Places of the filled slots by expert: (P,)."""
        return self.op("Compress", slots.place, self.reshape(slots.filled, -1))

    def serve(self, normed: ir.Value, residual: ir.Value, weights: ir.Value, slots: Slots, name: str) -> ir.Value:
        """Serves the filled slots: normed and residual (N, D), weights (N, 1, K) -> (N, D); N may also be B."""
        count = self.op("Cast", slots.filled, to=ir.DataType.INT64.value)
        sizes = self.op("ReduceSum", count, self.constant([1, 2]), keepdims=0)
        pairs = self._pairs(slots)
        rows = self.op("Gather", normed, self.op("Div", pairs, self.constant(self.choices)), axis=0)
        rows_of = self.outputs(self.moe.num_experts, "Split", self._operand(rows, name), sizes, axis=0)
        answers = self.op("Concat", *(self._expert(rows_of[e], e, name) for e in range(len(rows_of))), axis=0)  # (P, D)
        return self.combine(residual, weights, pairs, answers)

    def combine(self, residual: ir.Value, weights: ir.Value, pairs: ir.Value, answers: ir.Value) -> ir.Value:
        """Adds answers (P, D) of the pairs with these places (P,) to the residual (N, D); weights (N, 1, K)."""
        shape = self.op("Concat", self._num_places(residual, 1), self.constant([self.config.hidden_size]), axis=0)
        placed = self.op("ScatterND", self.op("ConstantOfShape", shape), self.reshape(pairs, -1, 1), answers)
        return self.weigh(residual, weights, placed)

    def weigh(self, residual: ir.Value, weights: ir.Value, placed: ir.Value) -> ir.Value:
        """Adds what experts answered to every pair, (N * K, D), to the residual (N, D); weights (N, 1, K)."""
        size = self.config.hidden_size
        combined = self.op("MatMul", weights, self.reshape(placed, -1, self.choices, size))  # (N, 1, D)
        return self.op("Add", residual, self.reshape(combined, -1, size))

    def _operand(self, rows: ir.Value, name: str) -> ir.Value:
        """What `_expert` takes, from rows (any, D); one for all experts."""
        return self.tape.operand(rows, f"{name}.experts.input")

    def _expert(self, operand: ir.Value, expert: int, name: str) -> ir.Value:
        """(any, D) -> (any, D)."""
        tape, inputs, hidden_name = self.tape, f"{name}.experts.input", f"{name}.experts.hidden"
        weight_in, bias_in, weight_out, bias_out = (
            (f"{name}.experts.{expert}.{part}", tape.state[f"{name}.experts.{part}"][expert])
            for part in ("weight_in", "bias_in", "weight_out", "bias_out")
        )
        hidden = tape.affine(operand, inputs, weight_in, bias_in)
        hidden = self.op("Gelu", hidden, approximate=self.config.gelu_approximation)
        return tape.affine(tape.operand(hidden, hidden_name), hidden_name, weight_out, bias_out)
