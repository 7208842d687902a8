from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtest.errors import TraceError
from loadtest.public_traces import load_trace
from loadtest.trace import Trace, write_trace

SAMPLES = Path(__file__).parents[1] / "data" / "traces"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 100, 100.5, 101 and 102.125: the third ended last, for it took 41 s.
        ("azure_functions_2021.txt", [0.0, 0.5, 1.0, 2.125]),
        ("azure_llm_2023.csv", [0.0, 0.25, 1.75]),
        ("azure_llm_2024.csv", [0.0, 0.25, 1.75]),
        ("burst_gpt_3.csv", [0.0, 50.25, 50.75]),
    ],
)
def test_load_trace_when_in_a_public_format_then_arrivals_start_at_0_and_ascend(
    name: str, expected: list[float]
) -> None:
    trace = load_trace(SAMPLES / name)
    # A date of today has a resolution of 0.2 us as seconds since 1970.
    assert trace.arrival_s.tolist() == pytest.approx(expected, abs=1e-6)
    assert trace.budgets == ("auto",)
    assert np.isnan(trace.deadline_s).all()


def test_load_trace_when_times_are_whole_seconds_then_requests_are_spread_within_them_by_the_seed() -> None:
    first, again, other = (load_trace(SAMPLES / "burst_gpt_1.csv", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.arrival_s, again.arrival_s)
    assert not np.array_equal(first.arrival_s, other.arrival_s)
    # Three requests of second 5, the first of which is time 0, and one of second 7.
    assert (np.diff(first.arrival_s)[:2] > 0).all()
    assert first.arrival_s[2] < 1.0
    assert 1.0 < first.arrival_s[3] < 3.0


def test_load_trace_when_in_our_own_columns_then_budgets_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    write_trace(path, Trace.of([0.5, 1.0], [0, 1], ("auto", "low")))
    assert load_trace(path, ("auto", "low")).arrival_s.tolist() == [0.5, 1.0]
    with pytest.raises(TraceError, match="line 3: unknown budget 'low'; the policy has auto"):
        load_trace(path, ("auto",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a trace needs a column arrival_s, or those of a public trace .* got nothing"),
        ("when,what\n", "got when, what"),
        (
            "app,func,end_timestamp,duration\na,f,1,0\na,f,later,1\n",
            "line 3: end_timestamp must be a number, got 'later'",
        ),
        ("app,func,end_timestamp,duration\na,f,1,-1\n", "line 2: duration must be at least 0, got -1"),
        ("app,func,end_timestamp,duration\na,f,1,\n", "line 2: duration is empty"),
        ("app,func,end_timestamp,duration\na,f,1\n", "line 2: 3 cells under a header of 4"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n",
            "line 2: TIMESTAMP must be a date and time, got 'noon'",
        ),
        ("Timestamp,Model,Request tokens,Response tokens\ninf,GPT-4,1,1\n", "line 2: Timestamp must be finite"),
        ("arrival_s\n0\n1\n2\n3\n", "line 5: a trace may have 3 requests"),
        ("app,func,end_timestamp,duration\n" + 4 * "a,f,1,1\n", "line 5: a trace may have 3 requests"),
        ("x" * 100_000, "line 1: longer than 65,536 characters; is this CSV?"),
    ],
)
def test_load_trace_when_malformed_then_the_message_names_file_and_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        load_trace(path, most=3)
    assert str(path) in str(caught.value)


def test_load_trace_when_it_has_a_header_only_then_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    assert len(load_trace(path)) == 0
