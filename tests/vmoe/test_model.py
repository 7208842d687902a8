"""The model on small seeded weights: independence of batch mates, statistics, groups, heads, dense models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vmoe.tiny import CONFIG, DENSE, MOE, images_of, model_of
from vmoe.config import ModelConfig
from vmoe.model import VisionTransformer, sincos2d
from vmoe.moe import MoeMlp
from vmoe.operating_point import OperatingPoint

# Logits are of the order of 1. One batch and another take other kernels and other row orders: float32 rounding.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def moe_layers(model: VisionTransformer) -> list[MoeMlp]:
    return [module for module in model.modules() if isinstance(module, MoeMlp)]


def test_every_image_of_a_batch_with_its_own_point_equals_the_image_alone() -> None:
    model, images = model_of(), images_of(CONFIG, 5)
    slots = torch.tensor([[2, 2], [1, 1], [0, 3], [4, 0], [1, 2]])
    selected = torch.tensor([2, 1, 3, 1, 4])
    together = model(images, slots, selected, with_statistics=True)
    for i in range(5):
        alone = model(images[i : i + 1], slots[i : i + 1], selected[i : i + 1], with_statistics=True)
        torch.testing.assert_close(together.logits[i : i + 1], alone.logits, **TOLERANCE)
        torch.testing.assert_close(together.statistics.kept[i : i + 1], alone.statistics.kept)
        assert torch.equal(together.statistics.expert_load[i : i + 1], alone.statistics.expert_load)
        assert torch.equal(together.statistics.processed[i : i + 1], alone.statistics.processed)


def test_one_image_at_different_points_gets_different_logits() -> None:
    # What makes the test above able to fail: the points matter.
    model, image = model_of(), images_of(CONFIG, 1)
    points = [((2, 2), 2), ((1, 1), 1), ((0, 3), 3), ((4, 0), 1)]
    logits = [model(image, torch.tensor([slots]), torch.tensor([k])).logits for slots, k in points]
    for i in range(len(logits)):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().max() > 1e-2


def test_forward_without_a_point_takes_the_configured_one() -> None:
    model, images = model_of(), images_of(CONFIG, 3)
    slots, selected = model.operating_point_tensors(OperatingPoint(1.0, 2), 3)
    assert slots.tolist() == [[2, 2]] * 3  # 4 tokens * 2 / 4
    assert torch.equal(model(images).logits, model(images, slots, selected).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_an_image_with_hostile_batch_mates_keeps_its_logits(value: float) -> None:
    # The mates stand before and after the image; rows that pad an expert's batch read the first one.
    model, images = model_of(), images_of(CONFIG, 3)
    slots, selected = torch.tensor([[4, 4], [2, 1], [4, 4]]), torch.tensor([4, 2, 4])
    alone = model(images[1:2], slots[1:2], selected[1:2], with_statistics=True)
    images[0], images[2] = value, value
    found = model(images, slots, selected, with_statistics=True)
    assert torch.isfinite(alone.logits).all()
    torch.testing.assert_close(found.logits[1:2], alone.logits, **TOLERANCE)
    assert torch.equal(found.statistics.expert_load[1:2], alone.statistics.expert_load)


def test_zero_slots_leave_the_residual_only() -> None:
    # The same logits as with experts whose answer is zero.
    model, images = model_of(), images_of(CONFIG, 2)
    skipped = model(images, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 2]), with_statistics=True)
    served = model(images)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.experts.weight_out.zero_()
            layer.experts.bias_out.zero_()
    torch.testing.assert_close(skipped.logits, model(images).logits, **TOLERANCE)
    assert (skipped.logits - served.logits).abs().max() > 1e-2
    assert skipped.statistics.kept.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("group_images", [1, 2])
def test_statistics_equal_a_count_over_the_assignments(group_images: int) -> None:
    config = replace(CONFIG, moe=replace(MOE, group_images=group_images))
    slots, selected = torch.tensor([[1, 2]] * 4), torch.tensor([2, 2, 1, 1])
    found = model_of(config)(images_of(config, 4), slots, selected, with_statistics=True).statistics
    tokens = config.tokens_per_image
    for layer, output in enumerate(found.layers):
        load = torch.zeros(4, 4, dtype=torch.int64)
        processed = torch.zeros(4, tokens, dtype=torch.int64)
        for group, token, choice in output.assignment.kept.nonzero().tolist():
            image, own = divmod(group * group_images * tokens + token, tokens)
            load[image, output.assignment.expert_index[group, token, choice]] += 1
            processed[image, own] += 1
        assert torch.equal(found.expert_load[:, layer], load)
        assert torch.equal(found.processed[:, layer], processed)
        assert 0 < load.sum() < 4 * tokens * 2  # something was kept and something was dropped
        torch.testing.assert_close(found.kept[:, layer], load.sum(1) / (selected * tokens))


def test_share_kept_of_a_router_without_preference_by_hand() -> None:
    # Equal gates: every token asks expert 0 first, then expert 1. Two slots each serve 2 of 4 tokens at K = 1 (0.5) and
    # 2 + 2 of 8 assignments at K = 2 (0.5); with 1 slot, 1 of 4 and 2 of 8.
    model = model_of()
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.zero_()
    found = model(
        images_of(CONFIG, 2), torch.tensor([[2, 1], [2, 1]]), torch.tensor([1, 2]), with_statistics=True
    ).statistics
    assert found.kept.tolist() == [[0.5, 0.25], [0.5, 0.25]]
    assert found.expert_load[:, 0].tolist() == [[2, 0, 0, 0], [2, 2, 0, 0]]
    assert found.processed.tolist() == [[[1, 1, 0, 0], [1, 0, 0, 0]], [[2, 2, 0, 0], [2, 0, 0, 0]]]


def test_moe_layer_equals_the_sum_of_gate_times_expert_over_the_kept_pairs() -> None:
    layer = moe_layers(model_of())[0]
    tokens = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    found = layer(tokens, torch.tensor([1, 2]), torch.tensor([2, 1]), 2)
    experts, expected = layer.experts, torch.zeros(2, 4, 8)
    for image, token, choice in found.assignment.kept.nonzero().tolist():
        e = found.assignment.expert_index[image, token, choice]
        hidden = tokens[image, token] @ experts.weight_in[e] + experts.bias_in[e]
        # GELU, tanh approximation (1606.08415): 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        expected[image, token] += found.gates[image, token, e] * (hidden @ experts.weight_out[e] + experts.bias_out[e])
    torch.testing.assert_close(found.hidden, expected, **TOLERANCE)
    assert (found.hidden[found.assignment.kept.sum(-1) == 0] == 0).all()
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(2, 4))


def test_padding_of_the_experts_rows_does_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = model_of(), images_of(CONFIG, 6)
    slots, selected = torch.tensor([[2, 2], [1, 1], [0, 3], [4, 0], [1, 2], [0, 0]]), torch.tensor([2, 1, 3, 1, 4, 2])
    results = []
    for multiple in (1, 64):
        monkeypatch.setattr("vmoe.moe.ROWS_MULTIPLE", multiple)
        results.append(model(images, slots, selected).logits)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_a_group_of_images_takes_the_point_of_its_first_image() -> None:
    config = replace(CONFIG, moe=replace(MOE, group_images=2))
    model, images = model_of(config), images_of(config, 4)
    own = model(images, torch.tensor([[1, 1], [3, 0], [2, 2], [0, 0]]), torch.tensor([1, 4, 2, 3]))
    shared = model(images, torch.tensor([[1, 1], [1, 1], [2, 2], [2, 2]]), torch.tensor([1, 1, 2, 2]))
    assert torch.equal(own.logits, shared.logits)
    swapped = model(images, torch.tensor([[3, 0], [1, 1], [0, 0], [2, 2]]), torch.tensor([4, 1, 3, 2]))
    assert (own.logits - swapped.logits).abs().max() > 1e-2


def test_images_of_a_group_share_the_buffers() -> None:
    config = replace(CONFIG, moe=replace(MOE, group_images=2))
    found = model_of(config)(
        images_of(config, 4), torch.tensor([[1, 2]] * 4), torch.tensor([2] * 4), with_statistics=True
    ).statistics
    per_group = found.expert_load.view(2, 2, 2, 4).sum(1)  # (groups, L, E)
    assert per_group[:, 0].max() == 1
    assert per_group[:, 1].max() == 2


def test_a_batch_that_is_no_multiple_of_the_group_is_refused() -> None:
    config = replace(CONFIG, moe=replace(MOE, group_images=2))
    with pytest.raises(ValueError, match="the batch of 3 is not a multiple of group_images = 2"):
        model_of(config)(images_of(config, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 1, 8, 8),), r"images must have shape \('B', 8, 8, 1\), got \(2, 1, 8, 8\)"),
        ((torch.zeros(8, 8, 1),), r"images must have shape"),
        ((torch.zeros(2, 8, 8, 1), torch.ones(2, 3).long(), torch.ones(2).long()), r"slots must have shape \(2, 2\)"),
        ((torch.zeros(2, 8, 8, 1), torch.ones(1, 2).long(), torch.ones(2).long()), r"got \(1, 2\) and \(2,\)"),
        ((torch.zeros(2, 8, 8, 1), torch.ones(2, 2).long(), torch.ones(2, 1).long()), r"num_selected_experts \(2,\)"),
        ((torch.zeros(2, 8, 8, 1), torch.ones(2, 2).long(), None), "must be given together"),
        ((torch.zeros(2, 8, 8, 1), None, torch.ones(2).long()), "must be given together"),
    ],
)
def test_forward_with_a_wrong_shape_says_which_is_right(arguments: tuple[Tensor | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of()(*arguments)


@pytest.mark.parametrize("selected", [0, 5])
def test_forward_with_more_choices_than_experts_or_none_is_refused(selected: int) -> None:
    with pytest.raises(ValueError, match=f"num_selected_experts must be 1 to 4, got {selected}"):
        model_of()(images_of(CONFIG, 1), torch.ones(1, 2).long(), torch.tensor([selected]))


def variant(**changes: Any) -> ModelConfig:
    return replace(CONFIG, **changes)


@pytest.mark.parametrize("classifier", ["token", "gap", "map"])
@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
@pytest.mark.parametrize("extras", [{}, {"representation_size": 5, "qk_norm": True}])
def test_every_head_and_position_embedding_runs_and_learns(
    classifier: str, position: str, extras: dict[str, Any]
) -> None:
    config = variant(classifier=classifier, position_embedding=position, image_size=(8, 12), channels=3, **extras)
    model = model_of(config)
    logits = model(images_of(config, 2)).logits
    assert logits.shape == (2, 3)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("classifier", ["token", "gap", "map"])
@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
def test_order_of_the_patches_matters_exactly_when_positions_are_embedded(classifier: str, position: str) -> None:
    # Dense, so that no queue knows the order either. The two rows of patches are swapped.
    config = replace(DENSE, classifier=classifier, position_embedding=position)
    model, image = model_of(config), images_of(config, 1)
    with torch.no_grad():
        if position == "learned":
            model.position_embedding.normal_()
        difference = (model(image).logits - model(image.roll(4, dims=1)).logits).abs().max()
    assert difference < 1e-5 if position == "none" else difference > 1e-3


def test_patches_are_read_row_by_row_with_channels_last() -> None:
    # An embedding that copies the pixels: patch 1 of a 2 x 2 grid is the upper right one.
    config = replace(DENSE, patch_size=(2, 2), image_size=(4, 4), channels=2, position_embedding="none")
    model = model_of(config)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(8))
        model.embedding.bias.zero_()
    image = torch.arange(32.0).view(1, 4, 4, 2)
    assert torch.equal(model.tokens(image)[0, 1], image[0, :2, 2:].reshape(-1))


def test_pre_logits_are_a_tanh() -> None:
    config = variant(representation_size=5)
    features = model_of(config).features(1e4 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, 5)
    assert (features.abs() > 0.99).all()


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries() -> None:
    config = variant(qk_norm=True)
    for qk_norm in (True, False):
        model = model_of(replace(config, qk_norm=qk_norm))
        attention, tokens = model.blocks[0].attention, torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
        before = attention(tokens)
        with torch.no_grad():
            attention.qkv.weight[:8] *= 100
            attention.qkv.bias[:8] *= 100
        difference = (attention(tokens) - before).abs().max()
        assert difference < 1e-3 if qk_norm else difference > 1e-2  # epsilon 1e-6 beside small variances


def test_attention_in_bfloat16_agrees_with_the_fused_kernel() -> None:
    # bfloat16 has 8 bits of mantissa: 2**-8 of values up to 1, over a few roundings.
    model, images = model_of(), images_of(CONFIG, 4)
    with torch.autocast("cpu", torch.bfloat16):
        attended = model.blocks[0].attention(model.tokens(images))
    torch.testing.assert_close(attended.float(), model.blocks[0].attention(model.tokens(images)), rtol=0.05, atol=0.05)


def test_a_dense_model_has_no_statistics_and_no_auxiliary_loss() -> None:
    model = model_of(DENSE)
    output = model.train()(images_of(DENSE, 2), with_statistics=True)
    assert output.statistics is None
    assert output.auxiliary_loss == 0
    assert output.logits.shape == (2, 3)


def test_router_noise_appears_in_training_only_and_repeats_with_the_generator() -> None:
    model, images = model_of(), images_of(CONFIG, 16)

    def forward(seed: int) -> tuple[Tensor, float]:
        output = model(images, generator=torch.Generator().manual_seed(seed))
        return output.logits, output.auxiliary_loss.item()

    silent, loss = forward(0)
    assert loss == 0
    assert torch.equal(silent, forward(1)[0])
    model.train()
    noisy, loss = forward(0)
    assert loss > 0
    repeated, repeated_loss = forward(0)
    assert torch.equal(noisy, repeated)
    assert loss == repeated_loss
    other, other_loss = forward(1)
    assert not torch.equal(noisy, other)
    assert loss != other_loss


def test_router_noise_has_a_standard_deviation_of_one_over_the_number_of_experts() -> None:
    # A router of zeros: log-gates are the noise up to a constant per token, so differences of two experts have the
    # deviation sqrt(2) / 4 = 0.354. 64 images * 4 tokens = 256 draws of the first choice's weight against the last's.
    model = model_of().train()
    layer = moe_layers(model)[0]
    with torch.no_grad():
        layer.router.weight.zero_()
    output = layer(
        torch.randn(2048, 4, 8), torch.full((2048,), 4), torch.full((2048,), 4), 4, torch.Generator().manual_seed(0)
    )
    by_expert = torch.empty(2048, 4, 4).scatter(-1, output.assignment.expert_index, output.assignment.weights.log())
    difference = by_expert[..., 0] - by_expert[..., 1]
    assert difference.std().item() == pytest.approx(math.sqrt(2) / 4, rel=0.05)  # 8,192 draws: 0.8 % each way
    assert torch.equal(output.gates, torch.full_like(output.gates, 0.25))  # the losses see gates without noise


def test_training_without_noise_needs_no_generator_and_has_no_load_loss() -> None:
    config = variant(moe=replace(MOE, noise_std=0.0, importance_loss_weight=0.0))
    model = model_of(config).train()
    images = images_of(config, 4)
    output = model(images)
    assert torch.equal(output.logits, model(images).logits)
    assert output.auxiliary_loss == 0


@pytest.mark.parametrize("auxiliary", [0.0, 0.005])
def test_gradients_reach_the_router_and_every_expert(auxiliary: float) -> None:
    # Without auxiliary losses too: the router learns through the combine weights.
    config = variant(moe=replace(MOE, importance_loss_weight=auxiliary, load_loss_weight=auxiliary))
    model = model_of(config).train()
    output = model(images_of(config, 16), generator=torch.Generator().manual_seed(0))
    (output.logits.logsumexp(-1).sum() + output.auxiliary_loss).backward()
    for layer in moe_layers(model):
        assert layer.router.weight.grad is not None
        assert (layer.router.weight.grad.abs().amax(1) > 0).all()
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).all()


def test_auxiliary_loss_alone_moves_the_router() -> None:
    model = model_of().train()
    model(images_of(CONFIG, 4), generator=torch.Generator().manual_seed(0)).auxiliary_loss.backward()
    for layer in moe_layers(model):
        assert layer.router.weight.grad is not None
        assert layer.router.weight.grad.abs().max() > 0


def test_sincos2d_by_hand() -> None:
    # Size 8 has two frequencies, 10000**0 = 1 and 10000**-1. Patch 5 of 2 rows and 3 columns: y = 1, x = 2.
    table = sincos2d((2, 3), 8)
    assert table.shape == (1, 6, 8)
    angles_x, angles_y = (2.0, 2e-4), (1.0, 1e-4)
    expected = [f(a) for angles in (angles_x, angles_y) for f in (math.sin, math.cos) for a in angles]
    assert table[0, 5].tolist() == pytest.approx(expected, abs=1e-7)
    assert table[0, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_sincos2d_adds_no_entry_to_the_state_dict() -> None:
    assert "sincos2d" not in model_of().state_dict()
