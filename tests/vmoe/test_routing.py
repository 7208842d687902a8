"""Routing against the reference's tables, and its losses by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.vmoe.upstream import DIRECTORY
from vmoe.config import Routing
from vmoe.routing import (
    Assignment,
    assign_experts_per_item,
    assign_items_per_expert,
    importance_loss,
    load_loss,
)

TABLES = np.load(DIRECTORY / "routing_unit" / "routing_unit.npz")
CHOOSING_RUNS = sorted(key.removesuffix("/token_index") for key in TABLES if key.endswith("/token_index"))
RUNS = sorted(key.removesuffix("/expert_index") for key in TABLES if key.endswith("/expert_index"))


def assign(gates: Tensor, selected: int, slots: int, routing: Routing) -> Assignment:
    groups = gates.shape[0]
    return assign_experts_per_item(
        gates,
        torch.full((groups,), selected),
        torch.full((groups,), slots),
        max_selected_experts=selected,
        routing=routing,
    )


@pytest.mark.parametrize("run", RUNS)
def test_assignment_of_every_golden_gate_matrix_equals_the_reference(run: str) -> None:
    gates_name, mode = run.split("/")  # mode: k<K>_bpr<0|1>
    gates = torch.from_numpy(TABLES[f"gates/{gates_name}"])[None]
    found = assign(gates, int(mode[1]), slots=4, routing="bpr" if mode.endswith("1") else "vanilla")
    for name in ("expert_index", "buffer_index", "weights"):
        np.testing.assert_array_equal(getattr(found, name)[0].numpy(), TABLES[f"{run}/{name}"])


def test_normalised_weights_of_each_groups_own_choices_sum_to_one_and_keep_their_ratio() -> None:
    gates = torch.tensor([[[0.6, 0.3, 0.1]], [[0.6, 0.3, 0.1]]])
    found = assign_experts_per_item(
        gates,
        torch.tensor([1, 2]),
        torch.tensor([1, 1]),
        max_selected_experts=2,
        routing="bpr",
        normalize_weights=True,
    )
    # K = 1: 0.6 / 0.6; K = 2: 0.6 / 0.9 and 0.3 / 0.9.
    torch.testing.assert_close((found.weights * found.kept)[:, 0], torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]]))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_dispatch_and_combine_of_every_golden_gate_matrix_equal_the_reference(run: str, slots: int) -> None:
    # The reference sends `data` through experts of which number e multiplies its buffer by e + 1.
    gates_name, mode = run.split("/")
    gates = torch.from_numpy(TABLES[f"gates/{gates_name}"])[None]
    found = assign(gates, int(mode[1]), slots, "bpr" if mode.endswith("1") else "vanilla")
    data = torch.from_numpy(TABLES[f"{run}_cap{slots}/data"])
    factor = (found.weights * found.kept * (found.expert_index + 1)).sum(-1)[0]
    # 1e-5 relative: the reference sums one product per expert and slot, in another order.
    np.testing.assert_allclose((data * factor[:, None]).numpy(), TABLES[f"{run}_cap{slots}/combined"], 1e-5, 1e-6)


@pytest.mark.parametrize("run", CHOOSING_RUNS)
def test_tokens_that_experts_choose_from_every_golden_gate_matrix_equal_the_reference(run: str) -> None:
    gates_name, mode = run.split("/")  # mode: items_per_expert_cap<slots>
    slots = int(mode.removeprefix("items_per_expert_cap"))
    found = assign_items_per_expert(torch.from_numpy(TABLES[f"gates/{gates_name}"])[None], torch.tensor([slots]))
    chosen = found.buffer_index[0].argsort(0)[:slots].T  # (E, slots)
    np.testing.assert_array_equal(chosen.numpy(), TABLES[f"{run}/token_index"])
    assert found.kept.sum().item() == chosen.numel()


def test_golden_tables_cover_ties_saturation_and_three_choices() -> None:
    assert len(RUNS) == 54
    assert len(CHOOSING_RUNS) == 27


def test_vanilla_order_serves_tokens_by_position() -> None:
    # Three tokens prefer expert 0, there is one slot: the first token gets it, however sure the others are.
    gates = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]])
    assert assign(gates, 1, slots=1, routing="vanilla").kept[0, :, 0].tolist() == [True, False, False]


def test_priority_order_serves_the_surest_token_first() -> None:
    gates = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]])
    assert assign(gates, 1, slots=2, routing="bpr").kept[0, :, 0].tolist() == [False, True, True]


def test_first_choices_come_before_all_second_choices() -> None:
    # Expert 1 is the second choice of the surest token and the first choice of the least sure one: the latter wins.
    gates = torch.tensor([[[0.9, 0.1, 0.0], [0.0, 0.5, 0.4]]])
    assert assign(gates, 2, slots=1, routing="bpr").kept[0].tolist() == [[True, False], [True, True]]


def test_groups_with_their_own_slots_and_choices_do_not_touch_each_other() -> None:
    gates = torch.rand(3, 10, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    slots, selected = torch.tensor([1, 3, 0]), torch.tensor([2, 1, 2])
    together = assign_experts_per_item(gates, selected, slots, max_selected_experts=2, routing="bpr")
    for group in range(3):
        alone = assign(gates[group : group + 1], int(selected[group]), int(slots[group]), "bpr")
        choices = int(selected[group])
        torch.testing.assert_close(together.kept[group, :, :choices], alone.kept[0])
        assert not together.kept[group, :, choices:].any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.integers(1, 3),
    st.integers(0, 12),
    st.sampled_from(["bpr", "vanilla"]),
)
def test_no_expert_ever_exceeds_its_slots_and_no_slot_stays_free_in_vain(
    seed: int, tokens: int, selected: int, slots: int, routing: Routing
) -> None:
    gates = torch.rand(2, tokens, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    found = assign(gates, selected, slots, routing)
    for expert in range(4):
        asked = (found.expert_index == expert).sum((1, 2))
        served = ((found.expert_index == expert) & found.kept).sum((1, 2))
        assert torch.equal(served, asked.clamp(max=slots))


def test_importance_loss_of_a_known_imbalance() -> None:
    # Two experts get 3 and 1: mean 2, variance 1, squared coefficient of variation 1 / 4.
    gates = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert importance_loss(gates).item() == pytest.approx(0.25)


def test_load_loss_of_a_known_imbalance() -> None:
    # One token, K = 1, no noise drawn. The threshold is the first logit. Its own chance to reach it again is 1/2; the
    # other lies one standard deviation below: 1 - Phi(1) = 0.15866. Mean 0.32933, variance 0.17067**2.
    logits = torch.tensor([[2.0, 1.0]])
    assert load_loss(logits, logits, 1.0, 1).item() == pytest.approx((0.17067 / 0.32933) ** 2, rel=1e-4)


def test_losses_of_a_balanced_batch_are_zero() -> None:
    gates = torch.full((3, 5, 4), 0.25)
    assert importance_loss(gates).item() == 0
    assert load_loss(gates, gates, 0.25, 2).item() == 0
