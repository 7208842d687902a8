"""Accuracy of models whose answers are known by construction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.vmoe.tiny import CONFIG, DENSE, MOE, PREPROCESSING, data_of, model_of
from vmoe.config import ModelConfig
from vmoe.evaluate import evaluate
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint

FULL = OperatingPoint(1.0, 2)


def always(target: int, config: ModelConfig = CONFIG) -> VisionTransformer:
    """Answers `target` whatever it sees; equal gates, so that every token asks expert 0, then expert 1."""
    model = model_of(config)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(3) == target)
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.zero_()
    return model


def brightness_model() -> VisionTransformer:
    """Tells dark, grey and bright: no attention and no MLP, token = (m, -m, 1, -1) for a patch of mean m in -1..1.

    LayerNorm divides by sqrt((m^2 + 1) / 2): the head sees u = m / that and can cut it: logits -u, 0.4, u. The classes
    have means of about -0.69, 0 and 0.69, hence u of about -0.8, 0 and 0.8.
    """
    config = replace(DENSE, hidden_size=4, position_embedding="none")
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attention.out, block.mlp.linear_out):
                layer.weight.zero_()
        model.embedding.weight.zero_()
        model.embedding.weight[0], model.embedding.weight[1] = 1 / 16, -1 / 16
        model.embedding.bias.copy_(torch.tensor([0.0, 0.0, 1.0, -1.0]))
        model.head.weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [0, 0, 0, 0], [1.0, 0, 0, 0]]))
        model.head.bias.copy_(torch.tensor([0.0, 0.4, 0.0]))
    return model


def test_evaluate_of_a_model_that_sees_brightness_finds_every_image() -> None:
    (result,) = evaluate(brightness_model(), data_of(30), PREPROCESSING, [None])
    assert result.accuracy == 1.0
    assert (result.point, result.slots, result.kept, result.num_images) == (None, (), (), 30)


def test_evaluate_of_a_model_that_sees_brightness_on_wrong_targets_finds_none() -> None:
    data = data_of(30)
    (result,) = evaluate(brightness_model(), replace(data, targets=(data.targets + 1) % 3), PREPROCESSING, [None])
    assert result.accuracy == 0.0


def test_evaluate_of_a_constant_answer_is_the_share_of_that_class() -> None:
    # Classes in turn, 10 images: 4, 3 and 3.
    for target, share in ((0, 0.4), (1, 0.3), (2, 0.3)):
        (result,) = evaluate(always(target), data_of(10), PREPROCESSING, [FULL])
        assert result.accuracy == pytest.approx(share)


def test_evaluate_reports_each_point_with_its_slots_and_share_kept() -> None:
    # 4 tokens, 4 experts, all tokens ask expert 0 (then 1). (1, 2): ceil(8/4) = 2 slots keep 2 + 2 of 8.
    # (1, 1): ceil(4/4) = 1 slot keeps 1 of 4. (2, 1): 2 slots keep 2 of 4. (4, 1): 4 slots keep all.
    points = [FULL, OperatingPoint(1.0, 1), OperatingPoint(2.0, 1), OperatingPoint(4.0, 1)]
    results = evaluate(always(0), data_of(9), PREPROCESSING, points)
    assert [result.point for result in results] == points
    assert [result.slots for result in results] == [(2, 2), (1, 1), (2, 2), (4, 4)]
    assert [result.kept for result in results] == [(0.5, 0.5), (0.25, 0.25), (0.5, 0.5), (1.0, 1.0)]


@pytest.mark.parametrize("batch_size", [1, 4, 10, 250])
def test_evaluate_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    done: list[int] = []
    model, points = model_of(), [FULL, OperatingPoint(0.25, 1)]
    found = evaluate(model, data_of(10), PREPROCESSING, points, batch_size=batch_size, advance=done.append)
    for result, whole in zip(found, evaluate(model, data_of(10), PREPROCESSING, points), strict=True):
        assert result.accuracy == whole.accuracy
        assert result.kept == pytest.approx(whole.kept)
    assert sum(done) == 20  # 10 images at each of 2 points
    assert max(done) == min(batch_size, 10)


def test_evaluate_with_a_limit_takes_the_first_images() -> None:
    (result,) = evaluate(always(0), data_of(10), PREPROCESSING, [FULL], limit=2)
    assert (result.num_images, result.accuracy) == (2, 0.5)
    (result,) = evaluate(always(0), data_of(10), PREPROCESSING, [FULL], limit=99)
    assert result.num_images == 10


def test_evaluate_of_groups_leaves_out_a_rest_that_fills_none() -> None:
    model = always(0, replace(CONFIG, moe=replace(MOE, group_images=4)))
    (result,) = evaluate(model, data_of(10), PREPROCESSING, [FULL], batch_size=6)
    assert result.num_images == 8
    assert result.accuracy == pytest.approx(3 / 8)  # images 0, 3 and 6
    assert result.slots == (8, 8)  # 16 tokens * 2 / 4


@pytest.mark.parametrize(("count", "limit", "group"), [(0, None, 1), (5, 0, 1), (5, -1, 1), (3, None, 4)])
def test_evaluate_without_an_image_is_refused(count: int, limit: int | None, group: int) -> None:
    model = model_of(replace(CONFIG, moe=replace(MOE, group_images=group)))
    with pytest.raises(ValueError, match=f"no images to evaluate: {count} in the data set, limit {limit}, {group} per"):
        evaluate(model, data_of(count), PREPROCESSING, [FULL], limit=limit)


def test_evaluate_normalises_with_the_preprocessing_it_is_given() -> None:
    # A mean of 0.05 instead of 0.5 moves every value up by 0.9: the darkest becomes 0.21 and passes for grey
    # (u = 0.21 / sqrt(0.52) = 0.29 < 0.4), grey and bright pass for bright. Right is one image of three.
    (result,) = evaluate(brightness_model(), data_of(30), replace(PREPROCESSING, mean=(0.05,)), [None])
    assert result.accuracy == pytest.approx(1 / 3)
