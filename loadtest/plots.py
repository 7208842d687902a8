"""Which plots a page shows: reports in, `plot.Plot` out. Several reports share a plot where lines can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from loadtest import histogram
from loadtest.plot import Axis, Mark, Plot, Series
from loadtest.report import PointShare, Report
from loadtest.runs import Run
from loadtest.timeline import Timeline

COLOURS: Final = 6  # of reports, as the page's style has them: --c0, --c1, ...
_GREY: Final = "var(--muted)"
# From the cheapest to the full point; steps of one hue each, legible on light and dark. Chosen, not tuned.
_CHEAP, _MIDDLE, _FULL = (157, 216, 196), (58, 134, 184), (104, 60, 160)

_TIME: Final = Axis("seconds from the start", low=0.0)


def plots(runs: Sequence[Run]) -> list[Plot]:
    """Of the runs that have a timeline: an oracle's report has none."""
    timed = [
        _Timed(run.name, run.report, run.report.timeline, f"var(--c{place % COLOURS})", len(runs) > 1)
        for place, run in enumerate(runs)
        if run.report.timeline is not None and run.report.offered
    ]
    if not timed:
        return []
    return [
        _cdf(timed),
        _latency(timed),
        _rates(timed),
        _accuracy(timed),
        _lost(timed),
        *_points(timed),
        *_stages(timed),
    ]


@dataclass(frozen=True)
class _Timed:
    """A run with its timeline and colour. `several`: it shares the page with others."""

    name: str
    report: Report
    bins: Timeline
    colour: str
    several: bool

    @property
    def x(self) -> list[float]:
        """The middles of the bins."""
        return [(place + 0.5) * self.bins.bin_s for place in range(len(self.bins))]

    @property
    def offered_bins(self) -> int:
        """Without those at the end in which only earlier requests were answered."""
        return max(place for place, count in enumerate(self.bins.offered) if count) + 1

    def series(
        self, what: str, y: Sequence[float | None], *, scale: float = 1.0, dashed: bool = False, colour: str = ""
    ) -> Series:
        name = f"{self.name}: {what}" if self.several else what
        values = [None if value is None else scale * value for value in y]
        return Series(name, self.x, values, colour or self.colour, dashed)

    def titled(self, title: str) -> str:
        return f"{title}: {self.name}" if self.several else title


def _cdf(timed: Sequence[_Timed]) -> Plot:
    series = []
    for each in timed:
        values_s, counts = histogram.decode(each.report.latency_histogram)
        share = 100 * np.cumsum(counts) / max(counts.sum(), 1)
        ms = (1000 * values_s).tolist()
        name = each.name if each.several else "latency"
        series.append(Series(name, ms[:1] + ms, [0.0, *share.tolist()] if ms else [], each.colour))
    return Plot(
        "Latency",
        "Of admitted requests, from the arrival; refused ones have none.",
        Axis("milliseconds", log=True),
        Axis("% of admitted requests", low=0.0, high=100.0),
        series,
        _deadlines(timed, vertical=True),
    )


def _latency(timed: Sequence[_Timed]) -> Plot:
    series = []
    for each in timed:
        series.append(each.series("p99", each.bins.latency_p99_s, scale=1000))
        series.append(each.series("p50", each.bins.latency_p50_s, scale=1000, dashed=True))
    return Plot(
        "Latency over time",
        "Of the requests that arrived then.",
        _TIME,
        Axis("milliseconds", log=True),
        series,
        _deadlines(timed, vertical=False),
    )


def _rates(timed: Sequence[_Timed]) -> Plot:
    series = []
    # One grey line where all were offered the same, which is what a comparison should be of.
    alike = len({(tuple(each.bins.offered), each.bins.bin_s) for each in timed if each.bins.offered}) == 1
    for place, each in enumerate(timed):
        if place == 0 or not alike:
            name = "offered" if alike or not each.several else f"{each.name}: offered"
            rates = _per_second(each.bins, each.bins.offered)
            series.append(Series(name, each.x, rates, _GREY if alike else each.colour, dashed=True))
        series.append(each.series("answered", _per_second(each.bins, each.bins.finished)))
    return Plot(
        "Offered and answered",
        "Answers count when they were given.",
        _TIME,
        Axis("requests per second", low=0.0),
        series,
    )


def _points(timed: Sequence[_Timed]) -> list[Plot]:
    """One per run, with the same colours and the same scale."""
    points = sorted({_key(point) for each in timed for point in each.report.points})
    colours = dict(zip(points, _shades(len(points)), strict=True))
    highest = max((count / each.bins.bin_s for each in timed for count in each.bins.answered), default=0.0)
    found = []
    for each in timed:
        until = each.offered_bins
        series = [
            Series(_point_name(point), each.x[:until], _per_second(each.bins, counts)[:until], colours[_key(point)])
            for point, counts in zip(each.report.points, each.bins.answers_by_point, strict=True)
        ]
        found.append(
            Plot(
                each.titled("Operating points"),
                "Answers at each, cheapest at the bottom, by the arrival of their requests.",
                _TIME,
                Axis("answers per second", low=0.0, high=1.05 * highest),
                series,
                stacked=True,
            )
        )
    return found


def _accuracy(timed: Sequence[_Timed]) -> Plot:
    series = []
    for each in timed:
        bins = each.bins
        series.append(each.series("effective", bins.effective_accuracy, scale=100))
        series.append(each.series("of answers", bins.mean_accuracy, scale=100, dashed=True))
        if any(bins.labelled_answers) and not each.several:
            series.append(each.series("live, of labelled answers", bins.live_accuracy, scale=100, colour="var(--c1)"))
    return Plot(
        "Accuracy",
        "Effective: the accuracy of answers in time, 0 for the rest, over all offered.",
        _TIME,
        Axis("%", high=100.0),
        series,
    )


def _lost(timed: Sequence[_Timed]) -> Plot:
    series = []
    for each in timed:
        bins = each.bins
        series.append(each.series("missed", _shares(bins.missed, bins.offered), scale=100))
        colour = "" if each.several else "var(--c1)"
        series.append(
            each.series("shed", _shares(bins.shed, bins.offered), scale=100, dashed=each.several, colour=colour)
        )
    return Plot(
        "Shed and missed",
        "Shed: refused on arrival. Missed: admitted, then late, dropped or failed.",
        _TIME,
        Axis("% of offered requests", low=0.0),
        series,
    )


def _stages(timed: Sequence[_Timed]) -> list[Plot]:
    """One per run, on the same scale."""
    found, highest = [], 0.0
    for each in timed:
        bins, until = each.bins, each.offered_bins
        inference, queue = _milliseconds(bins.inference_s)[:until], _milliseconds(bins.queue_s)[:until]
        highest = max([highest, *((one or 0.0) + (other or 0.0) for one, other in zip(inference, queue, strict=True))])
        stages = (("inference", inference, "var(--c0)"), ("queue", queue, "var(--c1)"))
        found.append((each, [Series(name, each.x[:until], y, colour) for name, y, colour in stages]))
    return [
        Plot(
            each.titled("Queue and inference"),
            "Means over answers, by the arrival of their requests.",
            _TIME,
            Axis("milliseconds", low=0.0, high=1.05 * highest),
            series,
            stacked=True,
        )
        for each, series in found
    ]


def _deadlines(timed: Sequence[_Timed], *, vertical: bool) -> list[Mark]:
    """One line per deadline that holds for a budget, the middle one where its requests differ."""
    found: dict[float, list[str]] = {}
    for each in timed:
        for name, figures in each.report.budgets.items():
            if figures.deadline_s.p50 is not None:
                names = found.setdefault(round(1000 * figures.deadline_s.p50, 3), [])
                names += [name] if name not in names else []
    return [
        Mark(at, "deadline" if len(found) == 1 else f"deadline of {', '.join(names)}", vertical)
        for at, names in sorted(found.items())
    ]


def _key(point: PointShare) -> tuple[float, float, int]:
    """Ascends in accuracy, or else in compute as far as C and K tell."""
    factor, experts = point.capacity_factor or 0.0, point.num_selected_experts or 0
    return point.accuracy or 0.0, factor * experts, experts


def _point_name(point: PointShare) -> str:
    if point.capacity_factor is None:
        return "dense"
    return f"C {point.capacity_factor:g}, K {point.num_selected_experts}"


def _shades(size: int) -> list[str]:
    places = np.linspace(0, 1, size) if size > 1 else np.ones(size)
    channels = [np.interp(places, (0, 0.5, 1), ends) for ends in zip(_CHEAP, _MIDDLE, _FULL, strict=True)]
    return [f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in zip(*channels, strict=True)]


def _per_second(bins: Timeline, counts: Sequence[int]) -> list[float | None]:
    return [count / bins.bin_s for count in counts]


def _shares(parts: Sequence[int], wholes: Sequence[int]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]


def _milliseconds(seconds: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 1000 * value for value in seconds]
