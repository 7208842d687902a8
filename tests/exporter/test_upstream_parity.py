"""The exported graph against golden outputs of the reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporter.graph import build_graph
from tests.vmoe.upstream import CASES, Case, Setting
from vmoe.config import ModelConfig

TOLERANCE = 1e-4  # the bound; the graph agrees to 4e-6. A slot more or less costs 0.2.
MAX_SELECTED_EXPERTS = 2  # the settings have K = 1 and K = 2; one graph serves both


def open_graph(case: Case, config: ModelConfig) -> ort.InferenceSession:
    checkpoint = case.checkpoint(config)
    state = {name: value.numpy() for name, value in checkpoint.state.items()}
    if config.position_embedding == "sincos2d":
        state["sincos2d"] = checkpoint.model().sincos2d.numpy()
    selected = None if config.moe is None else min(MAX_SELECTED_EXPERTS, config.moe.most_selected_experts)
    graph = build_graph(config, state, checkpoint.preprocessing, input_type="float32", max_selected_experts=selected)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, case: Case, setting: Setting) -> list[npt.NDArray[Any]]:
    """`logits` and, of a sparse model, `token_experts`."""
    if setting.config.moe is None:
        return session.run(["logits"], {"images": case.inputs})  # type: ignore[no-any-return]
    batch = len(case.inputs)
    feeds = {
        "images": case.inputs,
        "slots": np.array([setting.slots] * batch, np.int64),
        "num_selected_experts": np.full((batch, 1), setting.num_selected_experts, np.int64),
    }
    return session.run(["logits", "token_experts"], feeds)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_graph_at_every_golden_setting_equals_the_reference(name: str) -> None:
    case = Case(name)
    settings = list(case.settings())
    sessions = {config: open_graph(case, config) for config in {setting.config for setting in settings}}
    tables = case.routing_tables()
    for setting in settings:
        logits, *served = run(sessions[setting.config], case, setting)
        assert np.abs(logits - setting.logits).max() < TOLERANCE, setting.name
        if setting.run is not None:
            expected = case.token_experts(setting, tables)
            choices = expected.shape[-1]
            np.testing.assert_array_equal(served[0][..., :choices], expected, setting.name)
            assert (served[0][..., choices:] == -1).all()  # beyond the setting's K
