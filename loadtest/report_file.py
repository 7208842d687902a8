"""Reports on disk: JSON, in the schema of `loadtest.report`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from loadtest.errors import ReportError
from loadtest.report import SCHEMA_VERSION, Report


def read_report(path: Path) -> Report:
    """What `--json` wrote.

    Raises:
        ReportError: the file cannot be read, or is no report of this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read the report {path}: {error}") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found is None:
        raise ReportError(f"{path} is no report: it has no schema_version; `run` and `simulate` write one with --json")
    if found != SCHEMA_VERSION:
        raise ReportError(
            f"{path} is a report of schema {found}, this version reads schema {SCHEMA_VERSION}: "
            "make it again with `run` or `simulate`"
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}." for part in first["loc"]).removesuffix(".") or "the whole"
        raise ReportError(f"{path} is a damaged report: {place}: {first['msg']}") from error
