"""Table, verdicts and plot of `tests.benchmarks.model_speed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from tests.benchmarks.model_subjects import CHEAP, FULL, MIXED
from tests.benchmarks.operator_profile import CLASSES, Profile

Key = tuple[str, int, str, str]  # model, batch, way, case
NOTES = """\
*without shortcut*: all tokens in the last block, too. *first graph*: of the first bundle that was shipped. *padded*:
buffers for the batch's largest number of slots, with batched MatMul. *masked*: every expert on every token, without the
shortcut. *dense*: the ViT of the same backbone. torch: the model of this repository, all at K up to 2; torch.compile
runs experts, whose sizes depend on the image, eagerly. On AMD, torch's MKL takes another path than on Intel, about
twice as slow. *mixed*: half of the batch at either end. The bound of a ratio of times is the ratio of FLOPs. *With
weights read*: the time of every expert is that of its FLOPs at the packed MatMul's rate, or that of reading its weights
at the rate at which one row is multiplied by a weight that no cache holds, whichever is longer."""
MATMUL, READ = "MatMul", "read"  # cases of the way `peak`


@dataclass(frozen=True)
class Timed:
    """One way to run one case.

    Attributes:
        rounds: samples behind the median.
        gflop: of one run; null where it is not counted.
        expert_rows: rows of every expert of every layer that has any, where they are counted.
    """

    model: str
    batch: int
    way: str
    case: str
    median_s: float
    rounds: int
    gflop: float | None
    expert_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Findings:
    """Attributes:
    difference: by model, the largest in any probability between an image alone and in a batch.
    shortcut: by model, whether the class-token shortcut applies.
    without_compile: by model, why torch.compile was not timed.
    pair_gflop: by model, one token's way through one expert.
    """

    timed: list[Timed]
    profiles: list[Profile]
    difference: dict[str, float]
    shortcut: dict[str, bool]
    without_compile: dict[str, str]
    pair_gflop: dict[str, float]


class Figures:
    """Ratios of what was timed; None for what was not."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.by: Mapping[Key, Timed] = {(e.model, e.batch, e.way, e.case): e for e in findings.timed}

    def ratio(self, first: Key, second: Key) -> float | None:
        """Time of the first over that of the second."""
        if first not in self.by or second not in self.by:
            return None
        return self.by[first].median_s / self.by[second].median_s

    def share(self, model: str, batch: int, case: str = str(FULL)) -> float | None:
        """Of the packed MatMul's rate, ours."""
        key, peak = (model, batch, "ours", case), (model, 0, "peak", MATMUL)
        if key not in self.by or peak not in self.by:
            return None
        rates = [self.by[each].gflop for each in (key, peak)]
        assert rates[0] is not None
        assert rates[1] is not None
        return rates[0] / self.by[key].median_s / (rates[1] / self.by[peak].median_s)

    def lever(self, model: str, batch: int, way: str) -> float | None:
        """The cheapest point over the full one."""
        return self.ratio((model, batch, way, str(CHEAP)), (model, batch, way, str(FULL)))

    def flops(self, model: str, batch: int, way: str) -> float | None:
        """FLOPs of the cheapest point over the full one's."""
        keys = [(model, batch, way, str(point)) for point in (CHEAP, FULL)]
        counts = [self.by[key].gflop for key in keys if key in self.by]
        return counts[0] / counts[1] if len(counts) == 2 and counts[0] and counts[1] else None

    def read(self, model: str, batch: int, way: str) -> float | None:
        """As `flops`, of the least times with the reading of weights."""
        keys = [(model, batch, way, str(point)) for point in (CHEAP, FULL)]
        peaks = [(model, 0, "peak", case) for case in (MATMUL, READ)]
        if not self.by.keys() >= {*keys, *peaks}:
            return None
        rate_hz, read_hz = (1e9 * (self.by[peak].gflop or 0) / self.by[peak].median_s for peak in peaks)
        pair = 1e9 * self.findings.pair_gflop[model]
        # As many operations as the product of one row has, which reads every number of the weights once.
        reading_s = pair / read_hz
        least_s = []
        for key in keys:
            rows = self.by[key].expert_rows
            others_s = (1e9 * (self.by[key].gflop or 0) - pair * sum(rows)) / rate_hz
            least_s.append(others_s + sum(max(each * pair / rate_hz, reading_s) for each in rows))
        return least_s[0] / least_s[1]

    def over_ours(self, model: str, batch: int, way: str, case: str) -> float | None:
        return self.ratio((model, batch, way, case), (model, batch, "ours", case))

    def slowest_against_torch(self) -> float | None:
        """The best of PyTorch over ours, where it is smallest."""
        found = []
        for model, batch, way, case in self.by:
            if way == "torch eager":
                ratios = (self.over_ours(model, batch, each, case) for each in (way, "torch.compile"))
                found.append(min(ratio for ratio in ratios if ratio is not None))
        return min(found, default=None)

    def difference(self) -> float | None:
        return max(self.findings.difference.values(), default=None)


@dataclass(frozen=True)
class Target:
    """Attributes:
    least: whether the bound is a lower one.
    possible: what arithmetic alone allows, where that is known.
    with_reading: what it allows together with the reading of weights.
    """

    what: str
    value: Callable[[Figures], float | None]
    bound: float
    least: bool
    possible: Callable[[Figures], float | None] = lambda figures: None
    with_reading: Callable[[Figures], float | None] = lambda figures: None

    def row(self, figures: Figures) -> str:
        value = self.value(figures)
        wanted = f"{'at least' if self.least else 'at most'} {self.bound:g}"
        if value is None:
            return f"| {self.what} | {wanted} | - | not measured |"
        reached = value >= self.bound if self.least else value <= self.bound
        shown = f"{value:.2g}" if self.bound < 1e-3 else f"{value:.3f}"
        possible = self.possible(figures)
        verdict = "reached" if reached else "missed"
        if possible is not None:
            verdict += f"; FLOPs alone: {possible:.3f}"
        if (with_reading := self.with_reading(figures)) is not None:
            verdict += f"; with weights read: {with_reading:.3f}"
        return f"| {self.what} | {wanted} | {shown} | {verdict} |"


def _targets() -> Iterator[Target]:
    for model, batch, bound in (("S/32", 8, 0.80), ("B/16", 8, 0.80), ("B/16", 1, 0.70)):
        what = f"{model}, batch {batch}: share of the packed MatMul's rate"
        yield Target(what, lambda f, m=model, b=batch: f.share(m, b), bound, True)
    for way in ("ours", "without shortcut"):
        for model, batch, bound in (("B/16", 8, 0.65), ("B/16", 1, 0.70), ("S/32", 8, 0.85), ("S/32", 1, 0.90)):
            what = f"{model}, batch {batch}, {way}: time at {CHEAP} over {FULL}"
            yield Target(
                what,
                lambda f, m=model, b=batch, w=way: f.lever(m, b, w),
                bound,
                False,
                lambda f, m=model, b=batch, w=way: f.flops(m, b, w),
                lambda f, m=model, b=batch, w=way: f.read(m, b, w),
            )
    for model, bound in (("S/32", 1.13), ("B/16", 1.06)):
        what = f"{model}, batch 1, {FULL}: without the class-token shortcut over with it"
        yield Target(what, lambda f, m=model: f.over_ours(m, 1, "without shortcut", str(FULL)), bound, True)
    for model, batch, bound in (("B/16", 1, 3.0), ("S/32", 8, 1.9)):
        what = f"{model}, batch {batch}, {CHEAP}: every expert on every token over ours"
        yield Target(what, lambda f, m=model, b=batch: f.over_ours(m, b, "masked", str(CHEAP)), bound, True)
    yield Target(
        "B/16, mixed batch of 8: padded to the largest over ours",
        lambda f: f.over_ours("B/16", 8, "padded", MIXED),
        1.35,
        True,
    )
    yield Target("The best of PyTorch over ours, smallest of all cases", Figures.slowest_against_torch, 1.0, True)
    yield Target("Probabilities of an image alone and in a batch differ by", Figures.difference, 1e-6, False)
    yield Target(
        f"tiny, batch 1, {FULL}: first graph over ours",
        lambda f: f.over_ours("tiny", 1, "first graph", str(FULL)),
        1.3,
        True,
    )


TARGETS = tuple(_targets())


def page(findings: Findings, machine: str) -> str:
    """The whole page."""
    figures = Figures(findings)
    models = tuple(dict.fromkeys(each.model for each in findings.timed))
    parts = [
        f"# Speed of the graph\n\n`make bench-model` wrote this page. {machine}\n\n{NOTES}\n\n## Targets\n",
        "| ratio | target | measured | |\n|---|---|--:|---|",
        *(target.row(figures) for target in TARGETS),
        *(part for model in models for part in _model(figures, model)),
        "\n![Times of all ways](model_speed.png)\n",
    ]
    return "\n".join(parts)


def _model(figures: Figures, model: str) -> Iterator[str]:
    findings, peak = figures.findings, figures.by[model, 0, "peak", MATMUL]
    assert peak.gflop is not None
    applies = "applies" if findings.shortcut[model] else "does not apply: the head reads all tokens"
    yield f"\n## {model}\n\nPacked MatMul: {peak.gflop / peak.median_s:.0f} GFLOP/s."
    if (reading := figures.by.get((model, 0, "peak", READ))) is not None:
        assert reading.gflop is not None
        yield f"One row by a weight that no cache holds: {2 * reading.gflop / reading.median_s:.0f} GB/s."
    yield f"The class-token shortcut {applies}."
    if model in findings.without_compile:
        yield f"torch.compile: {findings.without_compile[model]}."
    for batch in sorted({batch for name, batch, *_ in figures.by if name == model and batch}):
        full = figures.by[model, batch, "ours", str(FULL)]
        own = [e for e in findings.timed if (e.model, e.batch) == (model, batch)]
        yield (
            f"\nBatch {batch}: {1000 * full.median_s:.2f} ms at {FULL}, {full.gflop:.2f} GFLOP.\n\n"
            f"| ours | time over {FULL} | FLOPs over {FULL} | share of the MatMul's rate | rounds |\n"
            "|---|--:|--:|--:|--:|"
        )
        for each in own:
            if each.way == "ours":
                assert each.gflop is not None
                assert full.gflop is not None
                cells = f"{each.median_s / full.median_s:.3f} | {each.gflop / full.gflop:.3f}"
                yield f"| {each.case} | {cells} | {figures.share(model, batch, each.case):.2f} | {each.rounds} |"
        yield "\n| other | case | time over ours | rounds |\n|---|---|--:|--:|"
        for each in own:
            if each.way != "ours":
                ratio = figures.over_ours(model, batch, each.way, each.case)
                yield f"| {each.way} | {each.case} | {ratio:.2f} | {each.rounds} |"
    yield (
        "\nShares of the time within operators (ONNX Runtime's profiler, which adds 2-3 µs to every node; "
        "attention includes queries, keys and values, routing includes gathering and combining rows):\n"
    )
    yield f"| batch | point | nodes | {' | '.join(CLASSES)} |\n|--:|---|--:|{'--:|' * len(CLASSES)}"
    for found in findings.profiles:
        if found.model == model:
            cells = " | ".join(f"{found.shares[name]:.2f}" for name in CLASSES)
            yield f"| {found.batch} | {found.case} | {found.nodes} | {cells} |"


def plot(results: Sequence[Timed], path: Path) -> None:
    """Time of every way at the full and the cheapest point, relative to ours at the full point."""
    mpl.use("Agg")
    from matplotlib import pyplot

    by = {(each.model, each.batch, each.way, each.case): each.median_s for each in results}
    models = list(dict.fromkeys(each.model for each in results))
    figure, axes = pyplot.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), sharey=True, squeeze=False)
    ways = [way for way in dict.fromkeys(each.way for each in results) if way != "peak"]
    batches = sorted({each.batch for each in results if each.batch})
    for axis, model in zip(axes[0], models, strict=True):
        for offset, (batch, case) in enumerate((b, c) for b in batches for c in (str(FULL), str(CHEAP))):
            known = [(i, by[key]) for i, way in enumerate(ways) if (key := (model, batch, way, case)) in by]
            reference = by[model, batch, "ours", str(FULL)]
            axis.barh(
                [i + 0.2 * (offset - 1.5) for i, _ in known],
                [seconds / reference for _, seconds in known],
                0.19,
                label=f"batch {batch}, {case}",
            )
        axis.axvline(1, color="grey", linewidth=0.6)
        axis.set_yticks(range(len(ways)), ways)
        axis.set_xlabel(f"time over ours at {FULL}")
        axis.set_title(model)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
