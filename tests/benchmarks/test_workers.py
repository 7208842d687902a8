"""The comparison of arrangements of workers: they serve, and the table says what was measured."""

from __future__ import annotations

import json
import urllib.request

from tests.benchmarks import process_tree
from tests.benchmarks.gateway_peers import Turn
from tests.benchmarks.workers import markdown, running


def _turn(server: str, throughput_hz: float, latency_s: list[float]) -> Turn:
    return Turn(server, {16: throughput_hz / 2, 32: throughput_hz}, {16: 0.001, 32: 0.002}, 70.0, latency_s, 1, 0.003)


def test_table_has_medians_over_rounds_and_ratios_by_round() -> None:
    turns = [_turn("a", 100, [0.01] * 50), _turn("b", 150, [0.02] * 50)]
    turns += [_turn("a", 200, [0.01] * 50), _turn("b", 100, [0.02] * 50)]
    text = markdown(turns, {"a": 90.0, "b": 180.0}, "conditions")
    # Medians of 50, 100 and of 100, 200; of 75, 50 and of 150, 100. 150 over 100 and 100 over 200.
    assert "| a | 75 | 150 | 1.00, 1.00 | 2.00 | 10.0 | 10.0 | 2 | 90 |" in text
    assert "| b | 62 | 125 | 1.50, 0.50 | 2.00 | 20.0 | 20.0 | 2 | 180 |" in text
    assert "late by 3.0 ms" in text


def test_two_workers_when_running_then_they_serve_the_full_point_and_all_processes_end() -> None:
    with running("two workers") as server:
        with urllib.request.urlopen(f"{server.url}/v1/policy", timeout=10) as response:
            budget = json.loads(response.read())["budgets"]["auto"]
        assert budget["floor"] == budget["ceiling"]
        assert len(process_tree.members(server.pid)) >= 3  # supervisor and workers
    assert process_tree.members(server.pid) == []
