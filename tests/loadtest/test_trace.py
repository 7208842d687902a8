from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from loadtest.errors import TraceError
from loadtest.trace import Trace, read_trace, write_trace


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_trace_when_only_arrivals_are_given_then_requests_are_auto_with_the_budgets_deadline(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "arrival_s\n0\n0.5\n0.5\n"))
    assert trace.arrival_s.tolist() == [0.0, 0.5, 0.5]
    assert [trace.budgets[code] for code in trace.budget] == ["auto"] * 3
    assert np.isnan(trace.deadline_s).all()
    assert trace.image.tolist() == [-1, -1, -1]


def test_trace_when_all_columns_are_given_in_any_order_then_empty_cells_mean_the_default(tmp_path: Path) -> None:
    text = "image,budget,deadline_ms,arrival_s\nshirt.png,low,50,0.1\n,,,0.2\n\nshirt.png,auto,1e3,3\n"
    trace = read_trace(written(tmp_path, text))
    assert [trace.budgets[code] for code in trace.budget] == ["low", "auto", "auto"]
    assert trace.deadline_s[0] == 0.05
    assert math.isnan(trace.deadline_s[1])
    assert trace.deadline_s[2] == 1.0
    assert trace.images == ("shirt.png",)
    assert trace.image.tolist() == [0, -1, 0]
    assert trace.duration_s == 3.0


def test_trace_when_written_and_read_then_it_is_the_same(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "arrival_s,budget,deadline_ms,image\n0.123456789,low,,a\n2,auto,70.5,\n"))
    copy = tmp_path / "copy.csv"
    write_trace(copy, trace)
    assert read_trace(copy).sha256 == trace.sha256


def test_trace_when_nothing_but_arrivals_is_known_then_nothing_else_is_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    write_trace(path, Trace.of([0.25, 1.0]))
    assert path.read_text() == "arrival_s\n0.250000000\n1.000000000\n"


def test_trace_when_empty_then_it_has_no_requests(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "arrival_s,budget\n"))
    assert (len(trace), trace.duration_s) == (0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a trace needs a column arrival_s, got nothing"),
        ("time,budget\n1,low\n", "line 1: a trace needs a column arrival_s, got time, budget"),
        ("arrival_s,arrival_s\n1,1\n", "line 1: every column may stand once"),
        ("arrival_s\n0\nsoon\n", "line 3: arrival_s must be a number, got 'soon'"),
        ("arrival_s\nnan\n", "line 2: arrival_s must be finite"),
        ("arrival_s\ninf\n", "line 2: arrival_s must be finite"),
        ("arrival_s\n-1\n", "line 2: arrival_s counts from the start and must be at least 0, got -1"),
        ("arrival_s\n2\n1.5\n", "line 3: arrival_s must not go back, got 1.5 after 2"),
        ("arrival_s,budget\n1,low\n2\n", "line 3: 1 cells under a header of 2"),
        ("arrival_s,budget\n,low\n", "line 2: arrival_s is empty"),
        ("arrival_s,deadline_ms\n1,0\n", "line 2: deadline_ms must be finite and above 0, got 0"),
        ("arrival_s,deadline_ms\n1,fast\n", "line 2: deadline_ms must be a number, got 'fast'"),
        ("arrival_s,budget\n1,low\n2,cheap\n", "line 3: unknown budget 'cheap'; the policy has auto, low"),
    ],
)
def test_trace_when_malformed_then_the_message_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path, ("auto", "low"))
    assert str(path) in str(caught.value)


def test_trace_when_the_file_is_missing_then_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read .*nowhere\.csv"):
        read_trace(tmp_path / "nowhere.csv")


def test_trace_when_binary_then_it_is_refused_as_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00arrival_s\n")
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(path)


def test_trace_when_it_has_columns_that_mean_nothing_then_they_are_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = read_trace(written(tmp_path, "arrival_s,deadline\n1,5\n"))
    assert len(trace) == 1
    assert "'deadline'" in caplog.text


def test_trace_when_made_of_times_that_go_back_then_it_is_refused() -> None:
    with pytest.raises(TraceError, match="ascending"):
        Trace.of([1.0, 0.5])
