"""The rates of a convolution: those of a linear, and what is different about patches.

Dense is the library's convolution, which has no weight to wait for but more arithmetic to overlap, and kernels of ours
gather patches first. How fast a dense convolution is depends on more than a line in M can say (channels, the size of
the image, how the library blocks both), so the model must expect CONV_MARGIN more of a sparse one than of a linear's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sparsec.facts import Conv
from sparsec.targets.base import DenseRate, KernelRate, Rates

CONV_MARGIN = 1.2
_FAR = 1024


def conv_rates(rates: Rates, conv: Conv | None) -> Rates:
    """``rates`` as they are for a linear, or for a 1x1 convolution that reads every pixel as it lies; else those of
    patches."""
    if conv is None or conv.pointwise:
        return rates
    measured = {rate.dtype: rate for rate in rates.conv}
    dense = tuple(_dense(rate, measured.get(rate.dtype)) for rate in rates.dense)
    return replace(rates, dense=dense, kernels=tuple(_gathering(rate, rates.gather) for rate in rates.kernels))


def _dense(linear: DenseRate, conv: DenseRate | None) -> DenseRate:
    """Below the M at which convolutions were measured, and where none was: a linear's, where that is faster."""
    points = tuple(_joined(linear, conv)) if conv else linear.points
    return DenseRate(linear.dtype, tuple((m, seconds / CONV_MARGIN) for m, seconds in points))


def _joined(linear: DenseRate, conv: DenseRate) -> Iterator[tuple[int, float]]:
    first, seconds = conv.points[0]
    yield from ((m, min(s, seconds)) for m, s in linear.points if m < first)
    yield from conv.points


def _gathering(rate: KernelRate, seconds: float) -> KernelRate:
    """``seconds`` for each value of a patch. An image has more rows than were measured with: beyond those, time is
    proportional to M, which a line through the last two points of a noisy machine need not be."""
    points = [(m, c + seconds * m, p, z) for m, c, p, z in rate.points]
    m, *last = points[-1]
    c, p, z = (_FAR * value for value in last)
    return replace(rate, points=(*points, (_FAR * m, c, p, z)))
