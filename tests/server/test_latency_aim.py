from __future__ import annotations

import pytest

from server.latency import LatencyModel


def test_model_when_another_quantile_is_aimed_at_then_predictions_move_to_it() -> None:
    aimed, built = (LatencyModel([[0.1]], [0.1], [1], 1, quantile=quantile) for quantile in (0.9, 0.99))
    aimed.aim_at(0.99)
    assert aimed.quantile == 0.99
    assert aimed.predict_s([0], high=True) == pytest.approx(built.predict_s([0], high=True))


def test_model_when_another_quantile_is_aimed_at_then_what_was_learned_is_kept() -> None:
    model = LatencyModel([[0.1]], [0.1], [1], 1, quantile=0.9)
    for _ in range(20):
        model.observe([0], 0.2)
    scale = model.scale
    model.aim_at(0.95)
    assert model.scale == scale
