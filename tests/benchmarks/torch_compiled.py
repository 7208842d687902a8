"""torch.compile of a model of the benchmark, for comparison. `python -m tests.benchmarks.torch_compiled NAME THREADS`
compiles in a process of its own, which a limit of time can end, and leaves the result in Inductor's cache on disk.

Whole blocks are compiled once per batch size; experts run eagerly: how many rows each gets depends on the image, and
every new number would be compiled again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.model_subjects import FULL, Subject, feeds_of
from vmoe.model import VisionTransformer
from vmoe.moe import MoeMlp
from vmoe.preprocess import normalize

BATCHES = (1, 8)


def compiled(model: VisionTransformer) -> Callable[..., Any]:
    """Takes and gives what the model does; compiles at the first call with each shape."""
    for layer in model.modules():
        if isinstance(layer, MoeMlp):
            layer._serve = torch.compiler.disable(layer._serve)  # type: ignore[method-assign]
    return torch.compile(model, dynamic=False)


def torch_inputs(subject: Subject, batch: int, case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, slots and K."""
    feeds = feeds_of(subject.config, batch, case)
    images = torch.from_numpy(normalize(feeds["images"], subject.preprocessing))
    return images, torch.from_numpy(feeds["slots"]), torch.from_numpy(feeds["num_selected_experts"][:, 0])


def run(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Logits. The bound of K is the same for every case: another would be compiled again."""
    with torch.inference_mode():
        logits: torch.Tensor = call(*inputs, max_selected_experts=FULL.num_selected_experts).logits
    return logits


def compile_within(name: str, threads: int, limit_s: float) -> str | None:
    """Compiles in another process. Returns None, or why there is nothing to time."""
    command = [sys.executable, "-m", "tests.benchmarks.torch_compiled", name, str(threads)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"not finished in {limit_s:.0f} s"
    except subprocess.CalledProcessError as error:
        return f"failed: {(error.stderr.strip().splitlines() or ['no message'])[-1]}"
    return None


def main(name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject.named(name, Path(folder), int(threads))
        call = compiled(subject.torch_model())
        for batch in BATCHES:
            run(call, torch_inputs(subject, batch, str(FULL)))


if __name__ == "__main__":
    main(*sys.argv[1:])
