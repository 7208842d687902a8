"""What becomes of a wide table on a terminal and in a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

CELLS = [f"{number:,}" for number in range(10**6, 10**6 + 30)]  # 9 characters each: 30 columns are wider than 80
PROGRAM = (
    "from rich.table import Table; from vmoe.console import open_console; "
    "table = Table(*'a' * 30); table.add_row(*(f'{number:,}' for number in range(10**6, 10**6 + 30))); "
    "open_console().print(table)"
)


def test_table_in_a_pipe_keeps_every_digit() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert all(cell in done.stdout for cell in CELLS)
    assert len(done.stdout.splitlines()) == 5  # frame, head, line, row, frame


def test_table_on_a_terminal_is_as_wide_as_that() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=theirs, env=os.environ | {"COLUMNS": "60", "TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""
    try:
        while block := os.read(ours, 4096):
            seen += block
    except OSError:  # Linux says so where the other end is closed
        pass
    finally:
        os.close(ours)
    assert done.wait() == 0
    assert max(map(len, seen.decode().splitlines())) <= 60
