"""The speed benchmark: what it counts, and what its page says of the targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.moe_graph import MoeLayers
from tests.benchmarks import torch_compiled
from tests.benchmarks.model_speed import alone_or_in_a_batch, onnx_entries
from tests.benchmarks.model_speed_page import TARGETS, Figures, Findings, Timed, page
from tests.benchmarks.model_subjects import CHEAP, FULL, Subject, dense_gflop, feeds_of, fetch
from tests.benchmarks.operator_profile import CLASSES, class_of, profile
from tests.exporter.models import SMALL
from vmoe.flops import flops_per_image


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject("small", SMALL, tmp_path, 1, None)


def timed(model: str, batch: int, way: str, case: str, median_s: float, gflop: float | None = None) -> Timed:
    return Timed(model, batch, way, case, median_s, 3, gflop)


FINDINGS = Findings(
    [
        timed("S/32", 0, "peak", "MatMul", 0.1, 10.0),  # 100 GFLOP/s
        timed("S/32", 8, "ours", str(FULL), 0.5, 42.5),  # 85 GFLOP/s
        timed("S/32", 8, "ours", str(CHEAP), 0.45, 30.0),
        timed("S/32", 8, "masked", str(CHEAP), 0.9),
        timed("S/32", 8, "torch eager", str(FULL), 1.0),
        timed("S/32", 8, "torch.compile", str(FULL), 0.4),
    ],
    [],
    {"S/32": 2e-7},
    {"S/32": True},
    {},
    {"S/32": 0.5},
)


@pytest.mark.parametrize(
    ("what", "measured", "verdict"),
    [
        ("S/32, batch 8: share of the packed MatMul's rate", "0.850", "reached"),
        (f"S/32, batch 8, ours: time at {CHEAP} over {FULL}", "0.900", "missed; FLOPs alone: 0.706"),
        (f"S/32, batch 8, {CHEAP}: every expert on every token over ours", "2.000", "reached"),
        ("The best of PyTorch over ours, smallest of all cases", "0.800", "missed"),
        ("Probabilities of an image alone and in a batch differ by", "2e-07", "reached"),
        ("B/16, mixed batch of 8: padded to the largest over ours", "-", "not measured"),
    ],
)
def test_target_on_the_page_has_the_measured_ratio_and_its_verdict(what: str, measured: str, verdict: str) -> None:
    (row,) = [line for line in page(FINDINGS, "a machine").splitlines() if line.startswith(f"| {what} |")]
    assert row.endswith(f"| {measured} | {verdict} |")


def test_every_target_is_known_as_not_measured_without_figures() -> None:
    nothing = Figures(Findings([], [], {}, {}, {}, {}))
    assert all(target.row(nothing).endswith("| - | not measured |") for target in TARGETS)


def test_bound_takes_the_reading_of_weights_where_an_expert_has_few_rows() -> None:
    # 100 GFLOP/s and 10 GFLOP/s of one row: an expert's weights are read in the time of 10 of its rows.
    ours = [
        Timed("S/32", 1, "ours", str(FULL), 1.0, 3, 10 + 0.5 * 40, (20, 20)),
        Timed("S/32", 1, "ours", str(CHEAP), 1.0, 3, 10 + 0.5 * 4, (2, 2)),
    ]
    figures = Figures(replace(FINDINGS, timed=[*FINDINGS.timed, timed("S/32", 0, "peak", "read", 0.1, 1.0), *ours]))
    assert figures.flops("S/32", 1, "ours") == pytest.approx(12 / 30)
    assert figures.read("S/32", 1, "ours") == pytest.approx((0.1 + 2 * 0.05) / (0.1 + 2 * 0.1))


def test_page_names_the_limit_that_torch_compile_ran_into() -> None:
    late = replace(FINDINGS, without_compile={"S/32": "not finished in 45 s"})
    assert "torch.compile: not finished in 45 s." in page(late, "a machine")
    assert "shortcut applies." in page(late, "a machine")


def test_compilation_that_takes_longer_than_its_limit_is_reported_and_ended() -> None:
    assert torch_compiled.compile_within("tiny", 1, 0.01) == "not finished in 0 s"


def test_compilation_that_fails_gives_the_reason() -> None:
    reason = torch_compiled.compile_within("no such model", 1, 60)
    assert reason == "failed: KeyError: 'no such model'"


def test_gflop_counted_for_ours_are_those_that_torch_counts_when_all_slots_are_filled(subject: Subject) -> None:
    # Without the shortcut, at C so large that every choice of every token has a slot: what is kept is all there is.
    config = SMALL
    assert config.moe is not None
    pairs = config.tokens_per_image * 2 * len(config.moe.layers)
    own = dense_gflop(config, 1, shortcut=False) + pairs * 4 * config.hidden_size * config.mlp_dim / 1e9
    point = type(FULL)(float(config.moe.num_experts), 2)
    assert own == pytest.approx(flops_per_image(config, point) / 1e9)


def test_ways_run_and_an_image_alone_differs_from_one_in_a_batch_by_rounding(subject: Subject) -> None:
    sessions = {"ours": subject.session("ours", MoeLayers, shortcut=True)}
    entries = list(onnx_entries(subject, 8, sessions))
    assert [case for _, case, *_ in entries][-1] == "mixed"
    gflop = {case: count for _, case, count, *_ in entries if count is not None}
    assert gflop["no slots"] < gflop[str(CHEAP)] < gflop["mixed"] < gflop[str(FULL)]
    assert alone_or_in_a_batch(subject, sessions["ours"]) < 1e-6


def test_profile_shares_the_time_out_to_all_classes(subject: Subject) -> None:
    found = profile(subject, 1, str(FULL), feeds_of(SMALL, 1, str(FULL)))
    assert set(found.shares) == set(CLASSES)
    assert min(found.shares.values()) > 0
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.nodes > 100


@pytest.mark.parametrize(
    ("operator", "ranks", "expected"),
    [
        ("Gemm", (2, 2, 1), "products"),
        ("MatMul", (2, 2), "products"),
        ("MatMul", (4, 4), "attention"),
        ("Attention", (3, 2, 1), "attention"),
        ("MatMul", (3, 3), "routing"),
        ("Softmax", (4,), "attention"),
        ("Softmax", (2,), "routing"),
        ("TopK", (3, 1), "routing"),
        ("Reshape", (2, 1), "rest"),
    ],
)
def test_class_of_a_node_follows_its_operator_and_ranks(operator: str, ranks: tuple[int, ...], expected: str) -> None:
    assert class_of(operator, ranks) == expected


def test_torch_peer_answers_as_the_graph_does(subject: Subject) -> None:
    case = str(CHEAP)
    session = subject.session("ours", MoeLayers, shortcut=True)
    found = torch_compiled.run(subject.torch_model(), torch_compiled.torch_inputs(subject, 8, case))
    expected = fetch(session, feeds_of(SMALL, 8, case))()[0]
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)
