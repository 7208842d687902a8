"""Line and area plots as inline SVG: strings in, one string out, no script and no library.

A plotting library in the page would cost megabytes per report for its script; these plots take some kilobytes each,
print, follow the dark or light theme through the page's CSS (`loadtest.html`), and tell the values under the pointer
with the browser's own tool tips. Every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final

# Of the drawing, in its own units; the page scales it. Chosen, not tuned.
_WIDTH, _HEIGHT = 560.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 12.0, 36.0
_LEAST_STEP: Final = 0.4  # between two points of a line; what is closer cannot be seen


@dataclass(frozen=True)
class Series:
    """A line, or a layer of a stack. y is null where there is no value: the line has a gap there.

    Attributes:
        colour: as CSS has it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A straight line across, at one x or one y."""

    at: float
    label: str
    vertical: bool


@dataclass(frozen=True)
class Axis:
    """What is on it. A logarithmic one shows values above 0 alone.

    Attributes:
        low, high: shown at least; from the values where they are None.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plot:
    """Some series on common axes.

    Attributes:
        note: under the title, what must be known to read it.
        stacked: layers on top of each other, which must share their x.
    """

    title: str
    note: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    marks: Sequence[Mark] = ()
    stacked: bool = False


@dataclass(frozen=True)
class _Scale:
    """Values of an axis to places of the drawing."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def draw(plot: Plot) -> str:
    """A figure with title, legend and SVG."""
    layers = _stack(plot.series) if plot.stacked else [series.y for series in plot.series]
    xs = [value for series in plot.series for value in series.x]
    ys = [value for layer in layers for value in layer if value is not None]
    flat = [mark.at for mark in plot.marks if not mark.vertical]
    upright = [mark.at for mark in plot.marks if mark.vertical]
    x = _scale(plot.x, xs + upright, _LEFT, _WIDTH - _RIGHT, air=0.0)
    y = _scale(plot.y, ys + flat, _HEIGHT - _BOTTOM, _TOP, air=0.05)
    parts = [_grid(x, y, plot)]
    floor: Sequence[float | None] = [0.0] * (len(layers[0]) if layers else 0)
    for series, layer in zip(plot.series, layers, strict=True):
        if plot.stacked:
            parts.append(_area(series, floor, layer, x, y))
            floor = layer
        else:
            parts.append(_line(series, x, y))
    parts += [_mark(mark, x, y) for mark in plot.marks]
    parts.append(_tips(plot, x))
    legend = "".join(
        f'<span><i class="{"dashed" if series.dashed else "solid"}" style="color:{escape(series.colour)}"></i>'
        f"{escape(series.name)}</span>"
        for series in plot.series
    )
    note = f"<p>{escape(plot.note)}</p>" if plot.note else ""
    return (
        f'<figure class="plot"><figcaption><h3>{escape(plot.title)}</h3>{note}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(plot.title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _stack(series: Sequence[Series]) -> list[list[float | None]]:
    """The upper edge of every layer."""
    edges: list[list[float | None]] = []
    below = [0.0] * (len(series[0].y) if series else 0)
    for each in series:
        below = [floor + (value or 0.0) for floor, value in zip(below, each.y, strict=True)]
        edges.append(list(below))
    return edges


def _scale(axis: Axis, values: Sequence[float], start: float, end: float, *, air: float) -> _Scale:
    """`air`: above the highest value, as a share of the axis."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not axis.log)]
    low = min([*known, *([] if axis.low is None else [axis.low])], default=1.0 if axis.log else 0.0)
    high = max([*known, *([] if axis.high is None else [axis.high])], default=low)
    if axis.log:
        low, high = 0.9 * low, 1.1 * high
    elif high <= low:
        low, high = low, low + 1.0
    elif axis.high is None:
        high += air * (high - low)
    return _Scale(low, high, axis.log, start, end)


def _ticks(low: float, high: float) -> list[float]:
    """About five round values."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]


def _grid(x: _Scale, y: _Scale, plot: Plot) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_LEFT:g}" x2="{right:g}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6:g}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:,g}</text>'
        for tick in y.ticks()
    ]
    parts += [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP:g}" y2="{bottom:g}"/>'
        f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 14:g}" text-anchor="middle">{tick:,g}</text>'
        for tick in x.ticks()
    ]
    parts.append(f'<line class="axis" x1="{_LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" x="{(_LEFT + right) / 2:g}" y="{_HEIGHT - 5:g}" text-anchor="middle">'
        f"{escape(plot.x.label)}</text>"
        f'<text class="label" transform="rotate(-90 11 {middle:g})" x="11" y="{middle:g}" text-anchor="middle">'
        f"{escape(plot.y.label)}</text>"
    )
    return "".join(parts)


def _line(series: Series, x: _Scale, y: _Scale) -> str:
    places: list[tuple[float, float] | None] = [
        None if value is None or (y.log and value <= 0) else (x(at), y(value))
        for at, value in zip(series.x, series.y, strict=True)
    ]
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    return f'<path class="line" style="stroke:{escape(series.colour)}"{dash} d="{_path(places)}"/>'


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """SVG's path data; a gap at every None, and a dot where a point stands alone."""
    parts: list[str] = []
    last: tuple[float, float] | None = None
    for before, here, after in zip([None, *places], places, [*places[1:], None], strict=False):
        if here is None:
            continue
        text = f"{here[0]:.1f} {here[1]:.1f}"
        if before is None:
            parts.append(f"M{text}" + ("h0.01" if after is None else ""))
        elif after is not None and last is not None and math.dist(last, here) < _LEAST_STEP:
            continue
        else:
            parts.append(f"L{text}")
        last = here
    return "".join(parts)


def _area(series: Series, lower: Sequence[float | None], upper: Sequence[float | None], x: _Scale, y: _Scale) -> str:
    there = _corners(series.x, upper, x, y)
    back = _corners(series.x, lower, x, y)[::-1]
    data = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in there + back) + "Z" if there else ""
    return f'<path class="area" style="fill:{escape(series.colour)}" d="{data}"/>'


def _corners(at: Sequence[float], edge: Sequence[float | None], x: _Scale, y: _Scale) -> list[tuple[float, float]]:
    return [(x(place), y(value or 0.0)) for place, value in zip(at, edge, strict=True)]


def _mark(mark: Mark, x: _Scale, y: _Scale) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    if mark.vertical:
        place = x(mark.at)
        line = f'x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP:g}" y2="{bottom:g}"'
        text = f'x="{place - 4:.1f}" y="{bottom - 6:g}" text-anchor="end"'
    else:
        place = y(mark.at)
        line = f'x1="{_LEFT:g}" x2="{right:g}" y1="{place:.1f}" y2="{place:.1f}"'
        text = f'x="{right - 2:g}" y="{place - 4:.1f}" text-anchor="end"'
    return f'<line class="mark" {line}/><text class="marked" {text}>{escape(mark.label)}</text>'


def _tips(plot: Plot, x: _Scale) -> str:
    """An invisible column over every x of a plot against linear x, with its values as a tool tip."""
    if plot.x.log:
        return ""
    tables = [(series.name, dict(zip(series.x, series.y, strict=True))) for series in plot.series]
    columns = sorted({at for series in plot.series for at in series.x})
    if not columns:
        return ""
    middles = [(left + right) / 2 for left, right in pairwise(columns)]
    edges = [columns[0], *middles, columns[-1]]
    parts = []
    for at, left, right in zip(columns, edges[:-1], edges[1:], strict=True):
        lines = [f"{name}: {value:,.4g}" for name, table in tables if (value := table.get(at)) is not None]
        parts.append(
            f'<rect class="tip" x="{x(left):.1f}" width="{max(x(right) - x(left), 1):.1f}" y="{_TOP:g}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM:g}"><title>{escape(f"{plot.x.label}: {at:,g}")}&#10;'
            f"{escape(chr(10).join(lines))}</title></rect>"
        )
    return "".join(parts)
