"""The benchmark of 8 bits runs, and leaves what its page shows."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.int8_speed import main


def test_one_round_of_the_shipped_model_leaves_table_and_record(tmp_path: Path) -> None:
    main(tmp_path, rounds=1, models=["shipped"], threads=1)
    results = json.loads((tmp_path / "int8_speed.json").read_text())["results"]
    assert [each["model"] for each in results] == ["product", *["shipped"] * 4]
    assert all(each["float32_s"] > 0 and each["int8_s"] > 0 for each in results)
    page = (tmp_path / "int8_speed.md").read_text()
    assert page.count("| shipped | batch ") == 4
