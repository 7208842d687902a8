"""From the command to readiness: `python -m tests.benchmarks.start_up`.

Starts `python -m server` with the shipped bundle again and again, asks `/readyz` every 5 ms, and prints the median,
with the processor time until then and the share of the imports. The first start, which reads everything from disk, is
left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from typing import Annotated

import numpy as np
import typer

from tests.benchmarks import process_tree
from tests.benchmarks.live_gateway import free_port, machine

_POLL_S = 0.005


def start() -> tuple[float, float]:
    """Seconds, and seconds of processor time, until one gateway is ready."""
    port = free_port()
    start_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "server", "--port", str(port), "--log-level", "warning"])
    try:
        while not _is_ready(port):
            if process.poll() is not None:
                raise SystemExit("the gateway ended")
            time.sleep(_POLL_S)
        return time.perf_counter() - start_s, process_tree.cpu_s(process.pid)
    finally:
        process.terminate()
        process.wait()


def imports_cpu_s() -> float:
    """Processor time of the interpreter and the imports alone."""
    code = "import time, server.cli; print(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main(starts: Annotated[int, typer.Option(min=1)] = 7) -> None:
    """Prints the medians."""
    start()
    found = np.array([(*start(), imports_cpu_s()) for _ in range(starts)])
    ready_s, cpu_s, imports_s = np.median(found, axis=0)
    print(
        f"ready after {ready_s:.2f} s (at most {found[:, 0].max():.2f}), with {cpu_s:.2f} s of processor time, of "
        f"which imports {imports_s:.2f}; medians of {starts} starts on {machine()}, load average "
        f"{os.getloadavg()[0]:.1f}"
    )


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    typer.run(main)
