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
    users = tuple(turns[0].throughput_hz)
    head = [f"answers/s, {each} users" for each in users] + [f"processor ms per answer, {each}" for each in users]
    lines = [
        "# The gateway against other servers of the same graph\n",
        f"{conditions}\n",
        f"| server | {' | '.join(head)} | p50, ms | p99, ms | without an answer |",
        "|---|" + "--:|" * (len(head) + 3),
    ]
    for server in (first, *others):
        own = [turn for turn in turns if turn.server == server]
        latency_ms = 1000 * np.concatenate([turn.latency_s for turn in own])
        p50, p99 = np.quantile(latency_ms, (0.5, 0.99)) if len(latency_ms) else (np.nan, np.nan)
        cells = [f"{_throughput_hz(own, each):.0f}" for each in users]
        cells += [f"{1000 * _cpu_s(own, each):.2f}" for each in users]
        lines.append(f"| {server} | {' | '.join(cells)} | {p50:.1f} | {p99:.1f} | {sum(turn.failed for turn in own)} |")
    alone = ", ".join(f"{1000 * cpu_s:.2f} ms in batches of {size}" for size, cpu_s in inference_s.items())
    lines.append(
        f"\nOf the processor time, inference alone takes per image: {alone}.\n\n"
        f"p50 and p99 of latency at {turns[0].rate_hz:.0f} requests/s, Poisson, 70 % of the least throughput of the "
        "first round, from the scheduled arrival. The generator was late by "
        f"{1000 * max(turn.lag_p99_s for turn in turns):.1f} ms (p99) in the worst turn.\n"
    )
    for other in others:
        for each in users:
            ratios = _ratios(turns, first, other, each)
            lines.append(
                f"Throughput of {first} over {other} with {each} users: {np.median(ratios):.2f}, by round "
                f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}.\n"
            )
    if tried:
        found = ", ".join(f"{timeout_ms:g} ms {rate_hz:.0f}/s" for timeout_ms, rate_hz in tried.items())
        lines.append(f"LitServe by batch timeout, tried before, the best taken: {found}.\n")
    return "\n".join(lines)


def plot(turns: Sequence[Turn], inference_s: Mapping[int, float], path: Path) -> None:
    """Throughput, processor time per answer, and the distribution of latency at equal load."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    servers, users = list(dict.fromkeys(turn.server for turn in turns)), tuple(turns[0].throughput_hz)
    figure, (rates, times, tails) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for place, server in enumerate(servers):
        own = [turn for turn in turns if turn.server == server]
        for number, each in enumerate(users):
            bar = {"x": place + (number - (len(users) - 1) / 2) * 0.4, "width": 0.36, "color": f"C{number}"}
            label = f"{each} users" if not place else None
            rates.bar(height=_throughput_hz(own, each), label=label, **bar)
            times.bar(height=1000 * _cpu_s(own, each), label=label, **bar)
        latency_ms = np.sort(1000 * np.concatenate([turn.latency_s for turn in own]))
        tails.plot(latency_ms, 1 - np.arange(len(latency_ms)) / max(len(latency_ms), 1), label=server)
    for style, (size, cpu_s) in zip(("-", "--", ":"), inference_s.items(), strict=True):
        times.axhline(1000 * cpu_s, color="0.3", linestyle=style, label=f"inference alone, batches of {size}")
    for panel in (rates, times):
        panel.set_xticks(range(len(servers)), servers)
    rates.set_ylabel("answers/s")
    times.set_ylabel("processor time per answer, ms")
    tails.set(xscale="log", yscale="log", xlabel=f"ms, at {turns[0].rate_hz:.0f} requests/s", ylabel="share slower")
    for panel in (rates, times, tails):
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _throughput_hz(turns: Sequence[Turn], users: int) -> float:
    return float(np.median([turn.throughput_hz[users] for turn in turns]))


def _cpu_s(turns: Sequence[Turn], users: int) -> float:
    return float(np.median([turn.cpu_s[users] for turn in turns]))


def _ratios(turns: Sequence[Turn], first: str, other: str, users: int) -> list[float]:
    """Of throughputs in the same round."""
    ours, theirs = ([turn.throughput_hz[users] for turn in turns if turn.server == name] for name in (first, other))
    return [own / their for own, their in zip(ours, theirs, strict=True)]
