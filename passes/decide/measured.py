"""Ranges of M by measurement: ratios of this very weight in, corrected ranges out.

Measurements are taken at powers of two and hold for the M just below them, so a gain that fades as M grows is never
overstated. Between and beyond them the model goes on, but not upward from an M where measuring found no gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sparsec.facts import Range
from sparsec.passes.decide.candidates import Way
from sparsec.timing import Ratio

Measured = Mapping[tuple[str, str, int], Ratio]


def bucket(m: int) -> int:
    """The power of two at which M is measured: the next one, M itself included."""
    return 1 << max(m - 1, 0).bit_length()


def by_measurement(
    model: tuple[Range, ...], dense: Way, ways: list[Way], measured: Measured, min_speedup: float
) -> tuple[Range, ...]:
    """``model`` with every measured bucket replaced by what was measured there.

    A way must be faster than ``min_speedup`` with its whole interval; ``min_speedup`` 0 takes the fastest sparse way.
    """
    ranges: list[Range] = []
    done, lost = 0, False
    last: Way | None = None
    for at in sorted({b for _, _, b in measured}):
        begin = at // 2 + 1
        _extend(ranges, model, done + 1, begin - 1, dense if lost else None)
        found = _fastest(at, ways, measured, min_speedup, last)
        lost = found is None
        seconds = dense.cost.at(at)
        if found is None:
            _append(ranges, Range(begin, at, "dense", "", seconds, seconds))
        else:
            last, ratio = found
            _append(ranges, Range(begin, at, last.format, last.kernel, seconds, seconds / ratio))
        done = at
    _extend(ranges, model, done + 1, None, dense if lost else None)
    return tuple(ranges)


def _fastest(
    at: int, ways: list[Way], measured: Measured, min_speedup: float, last: Way | None
) -> tuple[Way, float] | None:
    found = [(w, measured[w.format, w.kernel, at]) for w in ways if (w.format, w.kernel, at) in measured]
    if min_speedup > 0:
        found = [(w, r) for w, r in found if r.low > min_speedup]
    best = max(found, key=lambda pair: pair[1].value / pair[0].change(last), default=None)
    return (best[0], best[1].value) if best else None


def _extend(ranges: list[Range], model: tuple[Range, ...], lo: int, hi: int | None, dense: Way | None) -> None:
    """Append the part of the model's ranges inside lo..hi, or dense where ``dense`` is given."""
    if hi is not None and lo > hi:
        return
    if dense is not None:
        seconds = dense.cost.at(lo)
        _append(ranges, Range(lo, hi, "dense", "", seconds, seconds))
        return
    for r in model:
        first = max(lo, r.m_lo)
        last = r.m_hi if hi is None else hi if r.m_hi is None else min(hi, r.m_hi)
        if last is None or first <= last:
            _append(ranges, replace(r, m_lo=first, m_hi=last))


def _append(ranges: list[Range], new: Range) -> None:
    if ranges and (ranges[-1].format, ranges[-1].kernel) == (new.format, new.kernel):
        ranges[-1] = replace(ranges[-1], m_hi=new.m_hi)
    else:
        ranges.append(new)
