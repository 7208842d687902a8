from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from loadtest.plot import Axis, Mark, Plot, Series, draw

X = Axis("s", low=0.0)


def paths(drawn: str, kind: str) -> list[str]:
    return re.findall(rf'<path class="{kind}"[^>]* d="([^"]*)"', drawn)


def places(data: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", data)]


def test_line_when_values_rise_then_it_goes_right_and_up_within_the_frame() -> None:
    plot = Plot("t", "", X, Axis("y", low=0.0), [Series("a", [0, 1, 2], [0.0, 5.0, 10.0], "red")])
    (data,) = paths(draw(plot), "line")
    found = places(data)
    assert len(found) == 3
    assert found[0][0] == 52.0  # x = 0 is the left border,
    assert found[0][1] == 214.0  # and y = 0 the lower one
    # The middle value lies half way, to the rounding of a tenth.
    assert found[1][1] == pytest.approx((found[0][1] + found[2][1]) / 2, abs=0.11)
    assert found[2][1] < found[1][1]


def test_line_when_a_value_is_unknown_then_it_has_a_gap_and_a_lone_value_is_a_dot() -> None:
    series = Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, None, 3.0, None], "red")
    (data,) = paths(draw(Plot("t", "", X, Axis("y"), [series])), "line")
    assert re.sub(r"[-\d. ]+", "", data) == "MLMh"


def test_line_when_the_axis_is_logarithmic_then_equal_factors_are_equal_lengths_and_zero_is_left_out() -> None:
    series = Series("a", [0, 1, 2, 3], [1.0, 10.0, 100.0, 0.0], "red")
    (data,) = paths(draw(Plot("t", "", X, Axis("y", log=True), [series])), "line")
    heights = [y for _, y in places(data)]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


def test_line_when_points_cannot_be_told_apart_then_they_are_thinned_and_the_ends_stay() -> None:
    steps = 20_000
    series = Series("a", [place / steps for place in range(steps)], [place / steps for place in range(steps)], "red")
    (data,) = paths(draw(Plot("t", "", X, Axis("y", low=0.0, high=1.0), [series])), "line")
    found = places(data)
    assert len(found) < 2000
    assert found[0] == (52.0, 214.0)
    assert found[-1] == pytest.approx((550.0, 12.0), abs=0.2)


def test_stack_when_layers_are_added_then_each_starts_where_the_last_one_ends() -> None:
    series = [Series("a", [0, 1], [1.0, 2.0], "red"), Series("b", [0, 1], [3.0, None], "blue")]
    lower, upper = paths(draw(Plot("t", "", X, Axis("y", low=0.0), series, stacked=True)), "area")
    edge = places(lower)[:2]
    assert places(upper)[2:] == edge[::-1]
    assert places(upper)[1] == edge[1]  # nothing is added where the value is unknown
    # The upper edge: 1 + 3 above 1.
    assert 214 - places(upper)[0][1] == pytest.approx(4 * (214 - edge[0][1]), abs=0.3)


def test_plot_when_texts_are_hostile_then_they_are_text() -> None:
    evil = "</title><script>alert(1)</script>\"'&"
    plot = Plot(evil, evil, Axis(evil), Axis(evil), [Series(evil, [0, 1], [1, 2], evil)], [Mark(1.0, evil, True)])
    root = ElementTree.fromstring(draw(plot))  # well-formed, or it could not be parsed
    assert {element.tag for element in root.iter()}.isdisjoint({"script"})
    assert root.findtext("figcaption/h3") == evil


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[], [None], [0.0], [5.0], [5.0, 5.0]])
def test_plot_when_there_is_little_to_show_then_it_is_drawn_all_the_same(
    values: list[float | None], log: bool, stacked: bool
) -> None:
    series = Series("a", list(range(len(values))), values, "red")
    drawn = draw(Plot("t", "", X, Axis("y", log=log, low=None if log else 0.0), [series], stacked=stacked))
    assert "nan" not in drawn
    assert ElementTree.fromstring(drawn).find("svg") is not None


def test_plot_when_pointed_at_then_the_tool_tip_has_the_values_there() -> None:
    series = [Series("a", [0, 1], [1.5, None], "red"), Series("b", [0, 1], [2.0, 3.0], "blue")]
    root = ElementTree.fromstring(draw(Plot("t", "", X, Axis("y"), series)))
    assert [title.text for title in root.iter("title")] == ["s: 0\na: 1.5\nb: 2", "s: 1\nb: 3"]
