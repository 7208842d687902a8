"""Where the time of a graph goes: ONNX Runtime's own profile, by class of operator.

The profiler adds 2 to 3 microseconds to every node, which a model of 400 nodes feels: read the shares as a comparison
of classes, not as times.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.moe_graph import MoeLayers
from tests.benchmarks.model_subjects import Subject, fetch

CLASSES = ("products", "attention", "LayerNorm", "Gelu", "routing", "rest")
_CLASS_OF = {"Gemm": "products", "Attention": "attention", "LayerNormalization": "LayerNorm", "Gelu": "Gelu"}
_ROUTING = (
    *("TopK", "OneHot", "Compress", "Gather", "GatherElements", "Scatter", "ScatterElements", "ScatterND", "NonZero"),
    *("ConstantOfShape", "ThresholdedRelu", "Where", "Less", "Range"),
)
RUNS = 20, 3  # of a short graph and of one that takes longer than 0.1 s


@dataclass(frozen=True)
class Profile:
    """Shares of one run's time, by class of operator.

    Attributes:
        shares: of `CLASSES`; sum to 1.
        nodes: that ran.
    """

    model: str
    batch: int
    case: str
    nodes: int
    shares: dict[str, float]


def class_of(operator: str, ranks: Iterable[int]) -> str:
    """Class of a node by its operator and the ranks of its inputs.

    Products have 2-D matrices; attention multiplies 4-D ones, head by head, where one operator does not do all of it
    with the projection before; the combination of the experts' rows multiplies 3-D ones.
    """
    if operator in ("MatMul", "FusedMatMul"):
        return {4: "attention", 3: "routing"}.get(max(ranks), "products")
    if operator == "Softmax":
        return "attention" if max(ranks) == 4 else "routing"
    return _CLASS_OF.get(operator, "routing" if operator in _ROUTING else "rest")


def profile(subject: Subject, batch: int, case: str, feeds: Mapping[str, npt.NDArray[Any]]) -> Profile:
    """Profiles the exported graph."""
    session = subject.session("ours", MoeLayers, shortcut=True, profile=subject.folder / "profile")
    run = fetch(session, feeds)
    run()
    for _ in range(RUNS[1] if subject.config.hidden_size * batch > 1024 else RUNS[0]):
        run()
    events = json.loads(Path(session.end_profiling()).read_text())
    return Profile(subject.name, batch, case, *summary(events))


def summary(events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, float]]:
    """Number of nodes of a run, and shares of `CLASSES`, by medians over the runs.

    Arguments:
        events: of the profile, see ONNX Runtime's documentation.
    """
    durations: dict[str, list[float]] = defaultdict(list)
    classes: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            args = event["args"]
            ranks = [len(shape) for each in args["input_type_shape"] for shape in each.values()]
            durations[event["name"]].append(event["dur"])
            classes[event["name"]] = class_of(args["op_name"], ranks)
    totals = dict.fromkeys(CLASSES, 0.0)
    for name, values in durations.items():
        totals[classes[name]] += float(np.median(values))
    whole = sum(totals.values())
    return len(durations), {name: total / whole for name, total in totals.items()}
