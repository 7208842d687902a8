"""Where a tuned policy comes from: the table `[provenance]` of policy.toml, written by `python -m loadtest tune`.

The gateway compares `manifest_sha256` with its bundle's: a policy that was tuned for other points, accuracies or
latencies promises what this bundle cannot hold. The rest is for people.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Expected(_Table):
    """Simulated figures at one load; `loadtest.report` says what each means."""

    load: float = Field(gt=0, description="arrival rate over that of the trace")
    effective_accuracy: float | None = Field(
        default=None, description="of the answers in time, over all offered; 0 for the others"
    )
    mean_accuracy: float | None = Field(default=None, description="of all answers")
    slo_attainment: float | None = Field(default=None, description="answered in time, over all offered")
    shed_ratio: float | None = Field(default=None, description="refused on arrival, over all offered")
    p99_ms: float | None = Field(default=None, description="99th percentile of latency")


class Provenance(_Table):
    """What a policy was tuned for and how; everything but the manifest may be left out."""

    manifest_sha256: Sha256 = Field(description="of the bundle that it was tuned for")
    trace_sha256: Sha256 | None = Field(default=None, description="of the content of the trace")
    seed: int | None = Field(default=None, description="of the search and of the simulated noise")
    trials: int | None = Field(default=None, description="candidates that were simulated")
    objective: str | None = Field(default=None, description="what was maximised, and under which limits")
    command: str | None = Field(default=None, description="that tuned it")
    versions: dict[str, str] = Field(default_factory=dict, description="of the programs that tuned it, by name")
    expected: list[Expected] = Field(default_factory=list, description="of the part of the trace that was held out")
