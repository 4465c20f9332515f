"""Plots as inline SVG, without JavaScript and without a plotting library: numbers in, one ``<svg>`` element out.

Colours are the classes of ``page_style.html.j2``, so that a plot follows the page's light and dark theme. Every text is
escaped; every dot tells its value when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 10.0, 22.0
Form = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """``values`` in the order of the x axis, None where there is none; ``kind``: a colour class of the page."""

    label: str
    kind: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Band:
    """A mean with its interval, drawn across the whole plot."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _Frame:
    """From values to places: x is a position in a list, y a value between ``low`` and ``high``."""

    width: float
    height: float
    points: int
    low: float
    high: float

    def x(self, i: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * (i + 0.5) / max(self.points, 1)

    def y(self, value: float) -> float:
        inside = (value - self.low) / (self.high - self.low)
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * inside


def plot(
    series: Sequence[Series],
    names: Sequence[str],
    form: Form,
    *,
    below: str = "",
    band: Band | None = None,
    size: tuple[float, float] = (1180, 220),
    lines: bool = True,
) -> str:
    """Dots, joined where ``lines``: one for each name and series. ``form`` writes a value; ``below`` names the x axis.

    The y axis holds zero. Values that are not finite are left out.
    """
    known = [v for s in series for v in s.values if v is not None and math.isfinite(v)]
    known += [band.low, band.high] if band else []
    ticks = nice(min([0.0, *known]), max([0.0, *known]))
    frame = _Frame(*size, len(names), ticks[0], ticks[-1])
    parts = [*_grid(frame, ticks, form)]
    if band:
        parts += _band(frame, band)
    for one in series:
        parts += _line(frame, one) if lines else []
        parts += _dots(frame, one, names, form)
    if below:
        place = f'x="{LEFT:.0f}" y="{frame.height - 5:.0f}"'
        parts.append(f"<text {place}>{escape(below)}</text>")
    box = f'viewBox="0 0 {frame.width:.0f} {frame.height:.0f}" width="{frame.width:.0f}" height="{frame.height:.0f}"'
    label = escape(", ".join(s.label for s in series), quote=True)
    return f'<svg {box} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def nice(low: float, high: float) -> list[float]:
    """Three to seven round numbers from below ``low`` to above ``high``."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low, low + 1.0]
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _grid(frame: _Frame, ticks: Sequence[float], form: Form) -> Iterator[str]:
    for tick in ticks:
        y = frame.y(tick)
        kind = "base" if tick == 0 else "grid"
        yield f'<line class="{kind}" x1="{LEFT:.0f}" x2="{frame.width - RIGHT:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 7:.0f}" y="{y + 3.5:.1f}" text-anchor="end">{escape(form(tick))}</text>'


def _band(frame: _Frame, band: Band) -> Iterator[str]:
    top, bottom, mean = frame.y(band.high), frame.y(band.low), frame.y(band.mean)
    wide = frame.width - LEFT - RIGHT
    yield f'<rect class="band" x="{LEFT:.0f}" y="{top:.1f}" width="{wide:.0f}" height="{max(bottom - top, 1):.1f}"/>'
    yield f'<line class="cross" x1="{LEFT:.0f}" x2="{LEFT + wide:.0f}" y1="{mean:.1f}" y2="{mean:.1f}"/>'


def _known(series: Series) -> Iterator[tuple[int, float]]:
    for i, value in enumerate(series.values):
        if value is not None and math.isfinite(value):
            yield i, value


def _line(frame: _Frame, series: Series) -> Iterator[str]:
    path = " ".join(f"{frame.x(i):.1f},{frame.y(value):.1f}" for i, value in _known(series))
    yield f'<polyline class="line {series.kind}" points="{path}"/>'


def _dots(frame: _Frame, series: Series, names: Sequence[str], form: Form) -> Iterator[str]:
    radius = 4.0 if len(names) <= 120 else 2.5
    for i, value in _known(series):
        title = escape(f"{names[i]}: {series.label} {form(value)}")
        yield (
            f'<circle class="dot {series.kind}" cx="{frame.x(i):.1f}" cy="{frame.y(value):.1f}" r="{radius}">'
            f"<title>{title}</title></circle>"
        )
