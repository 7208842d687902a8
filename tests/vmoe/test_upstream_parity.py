"""The PyTorch model against golden outputs of the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.vmoe.upstream import CASES, Case, Setting
from vmoe.model import ModelOutput, VisionTransformer

# The bound; the two float32 implementations agree to 3e-6. An exact GELU costs 7e-4, a slot more or less 0.2.
TOLERANCE = 1e-4


def run(model: VisionTransformer, case: Case, setting: Setting) -> ModelOutput:
    batch = len(case.inputs)
    images = torch.from_numpy(case.inputs)
    if setting.config.moe is None:
        return model(images)
    slots = torch.tensor([setting.slots] * batch)
    return model(images, slots, torch.full((batch,), setting.num_selected_experts), with_statistics=True)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits_at_every_golden_setting_equal_the_reference(name: str) -> None:
    case = Case(name)
    settings = list(case.settings())
    models = {config: case.checkpoint(config).model() for config in {setting.config for setting in settings}}
    for setting in settings:
        logits = run(models[setting.config], case, setting).logits.numpy()
        assert np.abs(logits - setting.logits).max() < TOLERANCE, setting.name
    assert len(settings) >= {"dense_vit": 1, "expert_choice": 38}.get(name, 100)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dense_vit", "expert_choice")])
@torch.inference_mode()
def test_assignments_at_every_golden_setting_equal_the_reference(name: str) -> None:
    case = Case(name)
    tables = case.routing_tables()
    settings = [setting for setting in case.settings() if setting.run is not None]
    models = {config: case.checkpoint(config).model() for config in {setting.config for setting in settings}}
    for setting in settings:
        statistics = run(models[setting.config], case, setting).statistics
        assert statistics is not None
        moe = setting.config.moe
        assert moe is not None
        for layer, block, slots in zip(statistics.layers, moe.layers, setting.slots, strict=True):
            prefix = f"{setting.run}/encoderblock_{block}"
            experts, positions = tables[f"{prefix}/expert_index"], tables[f"{prefix}/buffer_index"]
            np.testing.assert_array_equal(layer.assignment.expert_index.numpy(), experts, setting.name)
            np.testing.assert_array_equal(layer.assignment.kept.numpy(), positions < slots, setting.name)
            np.testing.assert_array_equal(layer.assignment.buffer_index.numpy(), positions, setting.name)


@torch.inference_mode()
def test_tokens_that_experts_choose_at_every_golden_setting_equal_the_reference() -> None:
    case = Case("expert_choice")
    tables = case.routing_tables()
    settings = [setting for setting in case.settings() if setting.run is not None]
    models = {config: case.checkpoint(config).model() for config in {setting.config for setting in settings}}
    for setting in settings:
        statistics = run(models[setting.config], case, setting).statistics
        assert statistics is not None
        assert setting.config.moe is not None
        for layer, block, slots in zip(statistics.layers, setting.config.moe.layers, setting.slots, strict=True):
            expected = tables[f"{setting.run}/encoderblock_{block}/token_index"]  # (G, E, slots), best token first
            chosen = layer.assignment.buffer_index.argsort(1)[:, :slots].transpose(1, 2)
            np.testing.assert_array_equal(chosen.numpy(), expected, setting.name)
            assert layer.assignment.kept.sum((1, 2)).eq(expected[0].size).all()


def test_capacity_of_the_configured_point_equals_the_reference() -> None:
    # token_k2: 8 images of 17 tokens in a group, K = 2, C = 1.05, E = 8: 136 * 2 * 1.05 / 8 = 35.7, up to 36.
    case = Case("token_k2")
    assert case.config.operating_point is not None
    assert case.config.slots(case.config.operating_point) == (36, 36)
