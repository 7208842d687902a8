"""Slot arithmetic against the reference's table and by hand."""

from __future__ import annotations

import json

import pytest

from tests.vmoe.upstream import DIRECTORY
from vmoe.operating_point import OperatingPoint, parse_point, slots_per_expert


def test_slots_for_all_20880_combinations_equal_the_reference_refusals_included() -> None:
    rows = json.loads((DIRECTORY / "routing_unit" / "capacity_table.json").read_text())["rows"]
    assert len(rows) == 20_880
    for assignments, experts, factor, rounding, multiple, expected in rows:
        arguments = {"rounding": rounding, "multiple": multiple or 1}
        if expected is None:
            with pytest.raises(ValueError, match="at least 1 is needed"):
                slots_per_expert(assignments, experts, factor, **arguments)
        else:
            assert slots_per_expert(assignments, experts, factor, **arguments) == expected


@pytest.mark.parametrize(
    ("assignments", "factor", "experts", "expected"),
    [
        (400, 1.1, 8, 56),  # 440.00000000000006 / 8 in double precision, rounded up: 56 and not 55
        (200, 0.3, 4, 15),  # 60 / 4; float32 arithmetic would give 16
        (50, 0.125, 8, 1),  # 0.78, rounded up
    ],
)
def test_slots_are_computed_in_double_precision(assignments: int, factor: float, experts: int, expected: int) -> None:
    assert slots_per_expert(assignments, experts, factor) == expected


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_operating_point_with_a_factor_that_buys_nothing_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="capacity_factor must be a finite number above 0"):
        OperatingPoint(factor, 1)


def test_parse_point_reads_what_command_lines_take() -> None:
    assert parse_point("0.25,1") == OperatingPoint(0.25, 1)


@pytest.mark.parametrize("text", ["0.25", "0.25;1", "a,1", "0.25,1,2", "0.25,0"])
def test_parse_point_of_anything_else_says_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected C,K such as 0.25,1"):
        parse_point(text)
