"""Time and peak memory of a conversion.

    python -m tests.benchmarks.convert VARIANT load
    python -m tests.benchmarks.convert VARIANT export [OPTION of `python -m exporter` ...]

Writes random weights in the reference's format (one data file per expert, as the released models have one chunk per
expert), then converts them in a process of its own and prints seconds, peak resident memory and their ratios.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.vmoe.flax_writer import Tree, write_checkpoint
from vmoe.config import VARIANTS
from vmoe.reference import reference_shapes

LOAD = "from pathlib import Path; from vmoe.sources import load_source; load_source(Path({prefix!r}))"
# Not getrusage: its maximum starts with the memory of the process that forked.
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def random_tree(name: str) -> tuple[Tree, int]:
    """Parameters of a named variant as the reference nests them, and their size in bytes."""
    generator = np.random.default_rng(0)
    tree: Tree = {}
    size_bytes = 0
    for path, shape in reference_shapes(VARIANTS[name]).items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        values = generator.standard_normal(shape, np.float32) * np.float32(0.02)  # about what training starts from
        node[leaf] = values + np.float32(leaf == "scale")
        size_bytes += node[leaf].nbytes
    return tree, size_bytes


def measure(statements: str) -> tuple[float, int]:
    """Seconds and peak bytes of a Python process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", f"{statements}\n{PEAK}"], stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - start, int(done.stdout.split()[-2]) * 1024


def main(name: str, action: str, *options: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "ckpt"
        tree, size_bytes = random_tree(name)
        write_checkpoint(prefix, tree, version=None, shard_count=8, chunk_bytes=2**24)
        del tree
        statements = LOAD.format(prefix=str(prefix))
        if action == "export":
            arguments = [str(prefix), "--out", f"{directory}/repository", *options]
            statements = f"from exporter.cli import app; app({arguments!r}, standalone_mode=False)"
        _, base_bytes = measure("import exporter.cli, exporter.export" if action == "export" else "import vmoe.sources")
        seconds, peak_bytes = measure(statements)
    command = " ".join([name, action, *options])
    print(
        f"{command}: {size_bytes / 1e6:.0f} MB in {seconds:.1f} s ({seconds / size_bytes * 1e9:.1f} s per GB), "
        f"peak {peak_bytes / 1e6:.0f} MB, {(peak_bytes - base_bytes) / size_bytes:.2f} times the parameters above the "
        f"{base_bytes / 1e6:.0f} MB of the imports"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
