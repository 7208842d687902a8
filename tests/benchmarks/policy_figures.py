"""Table and plot of `tests.benchmarks.policies`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

if TYPE_CHECKING:
    from tests.benchmarks.policies import Result

OURS = "foresight"


def markdown(results: Sequence[Result], decision_us: dict[str, dict[str, float]]) -> str:
    """Tables of means over the seeds, and of decision times."""
    parts = []
    for trace in dict.fromkeys(result.trace for result in results):
        parts.append(
            f"### {trace}\n\n"
            "| policy | in time % | accuracy % | effective % | shed % | missed % | of oracle % | foresight leads by |\n"
            "| --- | --: | --: | --: | --: | --: | --: | --: |\n"
        )
        here = [result for result in results if result.trace == trace]
        for policy in dict.fromkeys(result.policy for result in here):
            cells = (
                f"{100 * mean(here, policy, 'slo_attainment'):.2f}",
                f"{100 * mean(here, policy, 'mean_accuracy'):.2f}",
                f"{100 * mean(here, policy, 'effective_accuracy'):.2f}",
                f"{100 * mean(here, policy, 'shed_ratio'):.2f}",
                f"{100 * mean(here, policy, 'missed_ratio'):.2f}",
                f"{100 * mean(here, policy, 'of_oracle'):.2f}",
                _lead(here, policy),
            )
            parts.append(f"| {policy} | {' | '.join(cells)} |\n")
        parts.append("\n")
    parts.append(
        "### Decision time at 1,000 waiting requests\n\n"
        "| policy | one budget, us | five budgets, us |\n| --- | --: | --: |\n"
    )
    for policy, times in decision_us.items():
        parts.append(f"| {policy} | {times['uniform_us']:.0f} | {times['mixed_us']:.0f} |\n")
    return "".join(parts)


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy of the answers against SLO attainment, one panel per trace; static points joined by a line."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    traces = list(dict.fromkeys(result.trace for result in results))
    policies = list(dict.fromkeys(result.policy for result in results))
    static = [policy for policy in policies if policy.startswith("fixed")]
    adaptive = [policy for policy in policies if policy not in static]
    columns = min(4, len(traces))
    rows = -(-len(traces) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.4 * columns, 3 * rows + 0.6), squeeze=False)
    for panel, trace in zip(panels.flat, traces, strict=False):
        here = [result for result in results if result.trace == trace]
        panel.plot(*_points(here, static), "o-", color="0.65", markersize=4, label="fixed, every point")
        for policy, marker in zip(adaptive, "*Ds^vPX", strict=False):
            size = 14 if policy == OURS else 7
            panel.plot(*_points(here, [policy]), marker, markersize=size, label=policy, linestyle="", alpha=0.85)
        attained = [100 * mean(here, policy, "slo_attainment") for policy in policies]
        margin = max(0.05 * (max(attained) - min(attained)), 0.05)
        panel.set_xlim(min(attained) - margin, max(attained) + margin)
        panel.set_title(trace, fontsize=10)
        panel.grid(alpha=0.3)
        panel.ticklabel_format(useOffset=False)
    for panel in panels[:, 0]:
        panel.set_ylabel("accuracy of answers, %")
    for panel in panels[-1]:
        panel.set_xlabel("answered in time, %")
    for panel in list(panels.flat)[len(traces) :]:
        panel.axis("off")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(adaptive) + 1, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean(results: Sequence[Result], policy: str, figure: str) -> float:
    """Over the seeds; nothing answered has no accuracy and counts for nothing."""
    values = [getattr(result, figure) for result in results if result.policy == policy]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _lead(results: Sequence[Result], policy: str) -> str:
    """Points of effective accuracy by which foresight is ahead: mean of the paired differences and its error."""
    ours = [result.effective_accuracy for result in results if result.policy == OURS]
    theirs = [result.effective_accuracy for result in results if result.policy == policy]
    if policy == OURS:
        return ""
    gaps = 100 * (np.array(ours) - np.array(theirs))
    error = f" ± {gaps.std(ddof=1) / np.sqrt(len(gaps)):.2f}" if len(gaps) > 1 else ""
    return f"{gaps.mean():+.2f}{error}"


def _points(results: Sequence[Result], policies: Sequence[str]) -> tuple[list[float], list[float]]:
    return (
        [100 * mean(results, policy, "slo_attainment") for policy in policies],
        [100 * mean(results, policy, "mean_accuracy") for policy in policies],
    )
