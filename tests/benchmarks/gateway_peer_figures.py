"""Table and plot of `tests.benchmarks.gateway_peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

if TYPE_CHECKING:
    from tests.benchmarks.gateway_peers import Turn


def markdown(
    turns: Sequence[Turn], inference_s: Mapping[int, float], tried: Mapping[float, float], conditions: str
) -> str:
    """Medians over the rounds; latencies of all rounds together.

    Arguments:
        inference_s: processor time per image of the session alone, by batch size.
        tried: LitServe's throughput by batch timeout in milliseconds; empty without LitServe.
    """
    (first, *others) = dict.fromkeys(turn.server for turn in turns)
    lines = [
        "# The gateway against other servers of the same graph\n",
        f"{conditions}\n",
        "| server | answers/s, 16 users | p50, ms | p99, ms | processor time per answer, ms | without an answer |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for server in (first, *others):
        own = [turn for turn in turns if turn.server == server]
        latency_ms = 1000 * np.concatenate([turn.latency_s for turn in own])
        p50, p99 = np.quantile(latency_ms, (0.5, 0.99)) if len(latency_ms) else (np.nan, np.nan)
        lines.append(
            f"| {server} | {_median(own, 'throughput_hz'):.0f} | {p50:.1f} | {p99:.1f} "
            f"| {1000 * _median(own, 'cpu_s'):.2f} | {sum(turn.failed for turn in own)} |"
        )
    lines += [
        f"| inference alone, batches of {size} | | | | {1000 * cpu_s:.2f} | |" for size, cpu_s in inference_s.items()
    ]
    lines.append(
        f"\np50 and p99 of latency at {turns[0].rate_hz:.0f} requests/s, Poisson, 70 % of the throughput of the "
        "slowest in the first round, from the scheduled arrival. The generator was late by "
        f"{1000 * max(turn.lag_p99_s for turn in turns):.1f} ms (p99) in the worst turn.\n"
    )
    for other in others:
        ratios = _ratios(turns, first, other)
        lines.append(
            f"Throughput of {first} over {other}: {np.median(ratios):.2f}, by round "
            f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}.\n"
        )
    own_s = _median([turn for turn in turns if turn.server == first], "cpu_s")
    for size, cpu_s in inference_s.items():
        lines.append(
            f"Processor time of {first} per answer beyond inference alone in batches of {size}: "
            f"{1000 * (own_s - cpu_s):.2f} ms.\n"
        )
    if tried:
        found = ", ".join(f"{timeout_ms:g} ms {rate_hz:.0f}/s" for timeout_ms, rate_hz in tried.items())
        lines.append(f"LitServe by batch timeout, tried before, the best taken: {found}.\n")
    return "\n".join(lines)


def plot(turns: Sequence[Turn], inference_s: Mapping[int, float], path: Path) -> None:
    """Throughput, processor time per answer, and the distribution of latency at equal load."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    servers = list(dict.fromkeys(turn.server for turn in turns))
    figure, (rates, times, tails) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for place, server in enumerate(servers):
        own = [turn for turn in turns if turn.server == server]
        rates.bar(server, _median(own, "throughput_hz"), color=f"C{place}")
        rates.plot([server] * len(own), [turn.throughput_hz for turn in own], "k.", markersize=4)
        times.bar(server, 1000 * _median(own, "cpu_s"), color=f"C{place}")
        latency_ms = np.sort(1000 * np.concatenate([turn.latency_s for turn in own]))
        tails.plot(latency_ms, 1 - np.arange(len(latency_ms)) / max(len(latency_ms), 1), label=server)
    for style, (size, cpu_s) in zip(("--", ":"), inference_s.items(), strict=True):
        times.axhline(1000 * cpu_s, color="0.3", linestyle=style, label=f"inference alone, batches of {size}")
    rates.set_ylabel("answers/s, 16 users")
    times.set_ylabel("processor time per answer, ms")
    times.legend(fontsize=8)
    tails.set(xscale="log", yscale="log", xlabel=f"ms, at {turns[0].rate_hz:.0f} requests/s", ylabel="share slower")
    tails.legend(fontsize=8)
    for panel in (rates, times, tails):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _median(turns: Sequence[Turn], name: str) -> float:
    return float(np.median([getattr(turn, name) for turn in turns]))


def _ratios(turns: Sequence[Turn], first: str, other: str) -> list[float]:
    """Of throughputs in the same round."""
    ours, theirs = ([turn.throughput_hz for turn in turns if turn.server == name] for name in (first, other))
    return [own / their for own, their in zip(ours, theirs, strict=True)]
