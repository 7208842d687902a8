"""policy.toml as tuning writes it: a header for people, the policy, its budgets, and `[provenance]`.

The same arguments give the same bytes: no date, and figures are rounded where noise drowns the digits.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import tomli_w

from loadtest.environment import Environment
from loadtest.errors import LoadtestError
from loadtest.tuner.objective import Objective
from server.policy_file import ActivePolicy
from server.provenance import Expected, Provenance


def provenance_of(
    *,
    manifest_sha256: str,
    trace_sha256: str,
    seed: int,
    trials: int,
    objective: Objective,
    command: Sequence[str],
    expected: Sequence[Expected],
) -> Provenance:
    """Adds the versions."""
    here = Environment.here()
    return Provenance(
        manifest_sha256=manifest_sha256,
        trace_sha256=trace_sha256,
        seed=seed,
        trials=trials,
        objective=str(objective),
        command=shlex.join(command),
        versions=here.versions | {"optuna": version("optuna"), "python": here.python},
        expected=[_rounded(each) for each in expected],
    )


def render(active: ActivePolicy, provenance: Provenance, remarks: Sequence[str]) -> str:
    """The text of the file."""
    header = [
        f"Tuned: {provenance.objective}.",
        *remarks,
        "Measure the bundle or the traffic anew, and it should be tuned anew: provenance.command does it.",
    ]
    tables = tomli_w.dumps({"provenance": provenance.model_dump(exclude_none=True)})
    return "".join(f"# {line}\n" for line in header) + "\n" + active.text + "\n" + tables


def check_writable(path: Path) -> None:
    """Before an hour of searching, not after it.

    Raises:
        LoadtestError: the file could not be written.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise LoadtestError(f"cannot write {path}: it must be a file in a directory that exists and may be written")


def write(path: Path, text: str) -> None:
    """Whoever reads the file meanwhile sees the old one or the new one.

    Raises:
        LoadtestError: it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)  # readable by a gateway of another user, as other files are
                temporary.replace(path)
            except BaseException:
                temporary.unlink()
                raise
    except OSError as error:
        raise LoadtestError(f"cannot write {path}: {error.strerror}") from error


def _rounded(expected: Expected) -> Expected:
    ratios = ("effective_accuracy", "mean_accuracy", "slo_attainment", "shed_ratio")
    found = {name: getattr(expected, name) for name in ratios}
    values = {name: None if value is None else round(value, 5) for name, value in found.items()}
    p99_ms = None if expected.p99_ms is None else round(expected.p99_ms, 2)
    return expected.model_copy(update=values | {"p99_ms": p99_ms})
