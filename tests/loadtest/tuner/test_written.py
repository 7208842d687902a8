from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.errors import LoadtestError
from loadtest.subject import Subject
from loadtest.tuner.objective import Goal, Objective
from loadtest.tuner.written import provenance_of, render, write
from server.policy_file import parse_policy
from server.provenance import Expected

BUDGETS = 'policy = "aimd"\n[aimd]\ndecrease = 0.25\n[budgets.auto]\ndeadline_ms = 80.0\n'


def test_file_when_read_back_then_policy_budgets_and_provenance_are_those_that_were_written(subject: Subject) -> None:
    active = parse_policy(BUDGETS, subject.manifest, subject.ladder, "here")
    provenance = provenance_of(
        manifest_sha256=subject.manifest_sha256,
        trace_sha256="c" * 64,
        seed=1,
        trials=2,
        objective=Objective(Goal.mean_accuracy, 50, 0.5),
        command=("python", "-m", "loadtest", "tune", "--trace", "with space.csv"),
        expected=[Expected(load=1.5, mean_accuracy=0.9123456, p99_ms=12.3456)],
    )
    text = render(active, provenance, ["One remark."])
    found = parse_policy(text, subject.manifest, subject.ladder, "again")
    assert (found.config.aimd, found.budgets) == (active.config.aimd, active.budgets)
    assert found.config.provenance == provenance
    assert provenance.expected == [Expected(load=1.5, mean_accuracy=0.91235, p99_ms=12.35)]
    assert provenance.command == "python -m loadtest tune --trace 'with space.csv'"
    assert text.splitlines()[1] == "# One remark."


def test_write_when_a_file_is_there_then_it_is_replaced_at_once_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("old")
    reader = path.open()
    write(path, "new")
    with reader:
        assert reader.read() == "old"  # whoever had opened it goes on reading the old one
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_write_when_the_directory_is_gone_then_the_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(LoadtestError, match=r"cannot write .*policy\.toml: No such file"):
        write(tmp_path / "gone" / "policy.toml", "new")
