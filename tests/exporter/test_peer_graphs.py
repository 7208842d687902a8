"""The peers of the speed benchmark answer as our graph does, or the comparison would be of different things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.cuda import PaddedLayers
from exporter.graph import build_graph
from exporter.moe_graph import MoeLayers
from tests.benchmarks.peer_graphs import MaskedLayers
from tests.exporter.models import SMALL, pixels, random_checkpoint, session_of


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("layers", [MaskedLayers, PaddedLayers])
def test_peer_graph_gives_our_answers_at_mixed_points(layers: type[MoeLayers], shortcut: bool, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SMALL)
    state = {name: value.numpy() for name, value in checkpoint.state.items()}
    feeds = {
        "images": pixels(SMALL, 4),
        "slots": np.array([[0, 3], [1, 1], [7, 2], [2, 0]]),
        "num_selected_experts": np.array([[1], [2], [2], [1]]),
    }
    found = []
    for form in (MoeLayers, layers):
        graph = build_graph(
            SMALL,
            state,
            checkpoint.preprocessing,
            max_selected_experts=2,
            class_token_shortcut=shortcut,
            moe_layers=form,
        )
        assert isinstance(graph, ir.Model)
        found.append(session_of(graph, tmp_path / f"{form.__name__}.onnx").run(["logits"], feeds)[0])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)
