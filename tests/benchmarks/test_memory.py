"""What the memory benchmark says of processes that hold the shipped bundle."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import triton_memory
from tests.benchmarks.live_gateway import BUNDLE
from tests.benchmarks.memory import Held, holding, row
from tests.benchmarks.process_tree import Memory

MIB = 1 << 20


def test_two_processes_when_weights_are_packed_in_files_then_they_share_most_of_them(tmp_path: Path) -> None:
    weights = (BUNDLE / "1/model.onnx").stat().st_size
    with holding(BUNDLE, tmp_path, 2) as held:  # the first one writes the files
        grown = [each.after.shared - each.before.shared for each in held]
        assert held[1].after.total > held[1].before.total + weights
    assert grown[1] > weights / 2


def test_row_when_two_processes_share_half_of_the_weights_then_pss_counts_them_once() -> None:
    # 100 MiB of weights: each process holds 110 more than before, 60 of them for itself, 50 with the other one.
    before = Memory(total=50 * MIB, proportional=40 * MIB, private=30 * MIB)
    after = Memory(total=160 * MIB, proportional=(40 + 60 + 25) * MIB, private=90 * MIB)
    text = row("name", 100 * MIB, [Held(2.0, before, after), Held(1.0, before, after)])
    assert text == "| name | 100 | 1.0 | 110 | 1.10 | 60 | 170 | 1.70 |"


def test_row_of_instances_when_one_is_larger_then_it_stands_for_each_and_pss_for_all() -> None:
    small = Memory(total=100 * MIB, proportional=70 * MIB, private=40 * MIB)
    large = Memory(total=110 * MIB, proportional=75 * MIB, private=45 * MIB)
    assert triton_memory.row("name", [small, large]) == "| name | 2 | 110 | 45 | 145 |"
