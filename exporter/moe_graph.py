"""The MoE layers of the graph: the only module that knows how C and K enter a graph.

Axes: B images, S tokens per image, N = B * S, D hidden, G routing groups of T tokens, L MoE layers, E experts, K the
largest number of selected experts, P kept (token, expert) pairs.

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

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from exporter.tape import Tape
from vmoe.config import ModelConfig, MoeConfig

NO_CHOICE = np.iinfo(np.int64).max


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
        self.tape, self.config, self.moe, self.slots, self.selected = tape, config, moe, slots, selected
        self.op, self.outputs, self.constant, self.reshape = tape.op, tape.outputs, tape.constant, tape.reshape
        self.blocks = moe.layers
        self.max_selected = max_selected_experts or moe.num_selected_experts
        self.choices = moe.choices_per_token(self.max_selected)
        self.kept: list[ir.Value] = []
        self.expert_load: list[ir.Value] = []
        self.token_experts: list[ir.Value] = []

    def records(self) -> Iterator[tuple[str, Sequence[ir.Value], ir.DataType, list[int]]]:
        """What the layers did, as outputs of the graph: name, a value per layer, type, and shape without the batch."""
        layers, per_image = len(self.blocks), self.config.tokens_per_image
        yield "kept", self.kept, ir.DataType.FLOAT, [layers]
        yield "expert_load", self.expert_load, ir.DataType.INT64, [layers, self.moe.num_experts]
        yield "token_experts", self.token_experts, ir.DataType.INT64, [layers, per_image, self.choices]

    def write(self, normed: ir.Value, residual: ir.Value, name: str, *, only_class: bool = False) -> ir.Value:
        """The next layer: (N, D) after LayerNorm and the residual (N, D) -> the residual with the experts' work added.

        Arguments:
            name: of the layer in the state.
            only_class: route all tokens, serve the first one of every image, and return (B, D) of these.
        """
        moe, selected = self.moe, self.selected
        group = moe.group_images
        layer = self.constant([len(self.kept)])
        slots = self.op("Gather", self.slots, layer, axis=1)  # (B, 1)
        if group > 1:  # one value per group: its first image's
            window = self.constant([0]), self.constant([NO_CHOICE]), self.constant([0]), self.constant([group])
            slots, selected_by_group = self.op("Slice", slots, *window), self.op("Slice", selected, *window)
        else:
            selected_by_group = selected
        router = self.tape.weight(f"{name}.router.weight", self.tape.state[f"{name}.router.weight"].T)
        gates = self.op("Softmax", self.op("MatMul", normed, router), axis=-1)  # (N, E)
        if moe.router == "items_per_expert":
            keys, experts = self._keys_of_choosing_experts(gates)
        else:
            keys, experts, top, chosen = self._keys(gates, selected_by_group)
            if moe.normalize_weights:
                own = self.op("Where", chosen, top, self.constant(0, np.float32))
                total = self.op("ReduceSum", own, self.constant([2]))  # (G, T, 1)
                gates = self.op("Div", gates, self.reshape(total, -1, 1))
        kept = self._fill(keys, slots)  # (G, E, T)
        self._record(kept, experts, selected)
        by_expert = self.reshape(self.op("Transpose", kept, perm=[1, 0, 2]), moe.num_experts, -1)  # (E, N)
        if only_class:
            tokens, size = self.config.tokens_per_image, self.config.hidden_size
            normed, residual = (self.tape.first_rows(rows, tokens, size) for rows in (normed, residual))
            gates = self.tape.first_rows(gates, tokens, moe.num_experts)
            by_image = self.reshape(by_expert, moe.num_experts, -1, tokens)
            by_expert = self.op("Gather", by_image, self.constant(0), axis=2)  # (E, B)
        return self.serve(normed, residual, gates, by_expert, name)

    def _keys(self, gates: ir.Value, selected: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """From gates (N, E) and K of each group (G, 1): queue keys (G, E, T), the largest K's experts and their gates
        (G, T, K), and which of them are among the group's own K (G, 1, K)."""
        tokens = self.config.tokens_per_image * self.moe.group_images
        grouped = self.reshape(gates, -1, tokens, self.moe.num_experts)
        # TopK breaks ties by the lower index, as the reference does.
        top, experts = self.outputs(2, "TopK", grouped, self.constant([self.max_selected]), axis=-1)
        choice = self.constant(np.arange(self.max_selected))
        if self.moe.routing == "bpr":
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
        return self.op("Transpose", keys, perm=[0, 2, 1]), experts, top, chosen

    def _keys_of_choosing_experts(self, gates: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Ranks of the tokens for every expert (G, E, T), and experts (G, T, E) of which choice e is e."""
        tokens = self.config.tokens_per_image * self.moe.group_images
        grouped = self.reshape(gates, -1, tokens, self.moe.num_experts)
        keys = self._rank(self.op("Transpose", grouped, perm=[0, 2, 1]), tokens)
        return keys, self.op("Expand", self.constant(np.arange(self.moe.num_experts)), self.op("Shape", grouped))

    def _rank(self, scores: ir.Value, tokens: int) -> ir.Value:
        """Rank of every score along the last axis of size `tokens`, 0 for the largest; ties by the lower index."""
        count = self.constant([tokens])
        _, order = self.outputs(2, "TopK", scores, count)
        _, rank = self.outputs(2, "TopK", order, count, largest=0)  # its inverse
        return rank

    def _fill(self, keys: ir.Value, slots: ir.Value) -> ir.Value:
        """Which tokens get a slot: keys (G, E, T), slots (G, 1) -> mask (G, E, T)."""
        tokens = self.config.tokens_per_image * self.moe.group_images
        most = self.op("ReduceMax", slots, keepdims=0)
        most = self.op("Min", self.op("Max", most, self.constant(1)), self.constant(tokens))
        smallest, _ = self.outputs(
            2, "TopK", keys, self.reshape(most, 1), axis=-1, largest=0
        )  # (G, E, most), ascending
        slots = self.op("Unsqueeze", slots, self.constant([2]))  # (G, 1, 1)
        last = self.op("Sub", self.op("Max", self.op("Min", slots, most), self.constant(1)), self.constant(1))
        shape = self.op("Concat", self.op("Shape", keys, start=0, end=2), self.constant([1]), axis=0)
        limit = self.op("GatherElements", smallest, self.op("Expand", last, shape), axis=2)  # (G, E, 1)
        limit = self.op("Min", limit, self.constant(NO_CHOICE - 1))
        limit = self.op("Where", self.op("Greater", slots, self.constant(0)), limit, self.constant(-1))
        return self.op("LessOrEqual", keys, limit)

    def _record(self, kept: ir.Value, experts: ir.Value, selected: ir.Value) -> None:
        """Adds this layer to the outputs; kept (G, E, T), experts (G, T, choices), selected (B, 1)."""
        per_image = self.config.tokens_per_image
        if self.moe.group_images > 1:
            kept = self.reshape(kept, -1, self.moe.num_experts, self.moe.group_images, per_image)
            kept = self.op("Transpose", kept, perm=[0, 2, 1, 3])
            kept = self.reshape(kept, -1, self.moe.num_experts, per_image)
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

    def serve(self, normed: ir.Value, residual: ir.Value, gates: ir.Value, kept: ir.Value, name: str) -> ir.Value:
        """Serves the kept pairs: normed and residual (N, D), gates (N, E), kept (E, N) -> (N, D); N may also be B."""
        sizes = self.op("ReduceSum", self.op("Cast", kept, to=ir.DataType.INT64.value), self.constant([1]), keepdims=0)
        pairs = self.op("NonZero", kept)  # (2, P): expert, token
        token = self.op("Gather", pairs, self.constant(1), axis=0)  # (P,)
        gate = self.op("Compress", self.op("Transpose", gates, perm=[1, 0]), self.reshape(kept, -1))  # (P,), same order

        def split(value: ir.Value) -> tuple[ir.Value, ...]:
            return self.outputs(self.moe.num_experts, "Split", value, sizes, axis=0)

        tape, state = self.tape, self.tape.state
        inputs, hidden_name = f"{name}.experts.input", f"{name}.experts.hidden"  # one operand each for all experts
        rows = split(tape.operand(self.op("Gather", normed, token, axis=0), inputs))
        tokens, weights = split(self.reshape(token, -1, 1)), split(self.reshape(gate, -1, 1))
        for e in range(self.moe.num_experts):
            weight_in, bias_in, weight_out, bias_out = (
                (f"{name}.experts.{e}.{part}", state[f"{name}.experts.{part}"][e])
                for part in ("weight_in", "bias_in", "weight_out", "bias_out")
            )
            hidden = tape.affine(rows[e], inputs, weight_in, bias_in)
            hidden = self.op("Gelu", hidden, approximate=self.config.gelu_approximation)
            output = tape.affine(tape.operand(hidden, hidden_name), hidden_name, weight_out, bias_out)
            output = self.op("Mul", output, weights[e])
            residual = self.op("ScatterND", residual, tokens[e], output, reduction="add")
        return residual
