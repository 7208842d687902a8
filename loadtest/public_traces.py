"""Traces of the public, in the columns in which they are published, recognised by their header.

    Azure Functions invocations 2021     app, func, end_timestamp, duration: seconds; the arrival is the difference.
        Zhang et al., SOSP 2021. github.com/Azure/AzurePublicDataset, AzureFunctionsInvocationTrace2021.md, CC-BY
    Azure LLM inference 2023 and 2024    TIMESTAMP, ContextTokens, GeneratedTokens: date and time of the invocation.
        Patel et al., ISCA 2024 (Splitwise); Stojkovic et al., 2024 (DynamoLLM). Same place, CC-BY
    BurstGPT                             Timestamp, [Session ID, Elapsed time,] Model, Request tokens, ...: seconds.
        Wang et al., 2024. github.com/HPMLL/BurstGPT, CC-BY

Only arrivals are taken: they start at 0 and ascend whatever the file does. None has budgets or deadlines
(`schedule.Mix`), and what the requests did there says nothing about images here.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from loadtest.csv_rows import MOST_ROWS, Row, open_csv
from loadtest.errors import TraceError
from loadtest.trace import Trace, read_trace


def _azure_functions(row: Row) -> float:
    duration_s = row.needed("duration")
    if duration_s < 0:
        raise TraceError(f"{row.place}: duration must be at least 0, got {duration_s:g}")
    return row.needed("end_timestamp") - duration_s


def _azure_llm(row: Row) -> float:
    text = row.text("TIMESTAMP")
    try:
        time = datetime.fromisoformat(text)  # of seven decimals, as of 2023, it takes six
    except ValueError as error:
        raise TraceError(f"{row.place}: TIMESTAMP must be a date and time, got {text!r}") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _burst_gpt(row: Row) -> float:
    return row.needed("Timestamp")


_FORMATS: Final[tuple[tuple[frozenset[str], Callable[[Row], float]], ...]] = (
    (frozenset({"app", "func", "end_timestamp", "duration"}), _azure_functions),
    (frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure_llm),
    (frozenset({"Timestamp", "Model", "Request tokens", "Response tokens"}), _burst_gpt),
)


def load_trace(path: Path, budgets: Collection[str] | None = None, *, seed: int = 0, most: int = MOST_ROWS) -> Trace:
    """Reads a trace in our own columns or in those of a public one.

    Arguments:
        budgets: those that exist; None accepts any name.
        seed: of the fractions of seconds where the file has none: BurstGPT rounds to seconds, and a second's requests
            did not come all at once.
        most: requests.

    Raises:
        TraceError: the file cannot be read or is no trace in any of these formats.
    """
    with open_csv(path, most) as file:
        if "arrival_s" in file.header:
            return read_trace(path, budgets, most)
        arrival_of = next((reader for columns, reader in _FORMATS if columns <= set(file.header)), None)
        if arrival_of is None:
            known = "; ".join(", ".join(sorted(columns)) for columns, _ in _FORMATS)
            raise TraceError(
                f"{path}, line 1: a trace needs a column arrival_s, or those of a public trace ({known}), "
                f"got {', '.join(file.header) or 'nothing'}"
            )
        arrivals = np.array(array("d", map(arrival_of, file)), np.float64)
    if len(arrivals) and (arrivals == np.floor(arrivals)).all():
        arrivals += np.random.default_rng(seed).uniform(0.0, 1.0, len(arrivals))
    arrivals.sort()
    return Trace.of(arrivals - (arrivals[0] if len(arrivals) else math.nan))
