"""Where activation sparsity pays: which share of columns (or rows) may be left at most for a kernel that skips the
rest.

In: what is known of the weight and of the zeros of x (or of who reads y), and the decision for calls without zeros.
Out: ranges with ``below``; the op counts at each call and takes the kernel where no larger share is left. A kernel that
skips costs ``overhead + Max(bytes * share / bandwidth, column * K + arithmetic * share)``, linear in the share, so the
share at which it meets the other way is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from sparsec.facts import Range, WeightFact
from sparsec.formats import Format, stored_values
from sparsec.options import Policy
from sparsec.passes.decide.candidates import MODEL_MARGIN, allowed, formats_of, kernel_rates, read_bytes
from sparsec.targets.base import KernelRate, Rates

# Of the model at the crossover. Dense follows the memory of the moment, which varies twofold, and pieces of a weight
# half as much; the shares of skipped calls are spread around the crossover, too.
MARGIN = MODEL_MARGIN
UNKNOWN = 0.3  # share left that is expected where nothing was measured; ReLU models leave 5 to 30 %
KINDS = ("panel", "bitmap", "nm", "block")  # of patterns that have such kernels
_MS = (1, 2, 4, 8)
MOST_ROWS = _MS[-1]  # of x; the union of more leaves nothing out


@dataclass(frozen=True)
class Skipper:
    """A format and loop that read only a share of the weight."""

    format: Format
    rate: KernelRate
    read: int
    stored: int

    def seconds(self, share: float, m: int, rates: Rates, n: int, k: int) -> float:
        memory, fixed, per = self._parts(m, rates, n, k)
        return rates.overhead + self.rate.call + max(memory * share, fixed + per * share)

    def share(self, seconds: float, m: int, rates: Rates, n: int, k: int) -> float:
        """The largest share that takes no longer than ``seconds``; 0 where none does, 1 at most."""
        memory, fixed, per = self._parts(m, rates, n, k)
        left = seconds - rates.overhead - self.rate.call
        by_memory = left / memory if memory > 0 else 1.0
        by_work = (left - fixed) / per if per > 0 else float(left >= fixed)
        return max(0.0, min(by_memory, by_work, 1.0))

    def _parts(self, m: int, rates: Rates, n: int, k: int) -> tuple[float, float, float]:
        _, column, position, value = min((p for p in self.rate.points if p[0] >= m), default=self.rate.points[-1])
        return self.read / (self.rate.bandwidth or rates.bandwidth), column * k, position * n * k + value * self.stored


Took: TypeAlias = "Callable[[str, int], float | None]"


def gated(
    fact: WeightFact,
    dtype: str,
    rates: Rates,
    policy: Policy,
    loop: str,
    left: float | None,
    other: Callable[[int], float],
    took: Took = lambda format, m: None,
) -> tuple[Range, ...]:
    """Ranges of M, 1 to 8, in which a kernel of ``loop`` (``skip`` or ``select``) serves calls with few columns left.

    ``left``: the share that is left, as calibrated; None: not known. ``other``: seconds at M of the way that serves all
    other calls. ``took``: seconds of a format at M where it was measured with that share, else None. Empty where
    nothing is expected to be gained.
    """
    expected = expected_share(left)
    ways = [_Way(s, rates, fact, expected, took) for s in skippers(fact, dtype, rates, policy, loop)]
    best = min(ways, key=lambda w: w.seconds(expected, 1), default=None)
    least = policy.min_speedup
    if best is None or (least and best.seconds(expected, 1) * least * best.margin(1) > other(1)):
        return ()
    ranges = []
    for i, m in enumerate(_MS):
        margin = least if best.measured(m) else MARGIN
        below = best.share(other(m) / margin, m) if least else 1.0
        if below <= 0.02:
            break
        first = 1 if i == 0 else _MS[i - 1] + 1
        ours = best.seconds(min(expected, below), m)
        ranges.append(Range(first, m, str(best.skipper.format), loop, other(m), ours, below=below))
    return tuple(ranges)


def expected_share(left: float | None) -> float:
    """The share of columns or rows that is left: as calibrated, else a guess."""
    return UNKNOWN if left is None else left


@dataclass(frozen=True)
class _Way:
    """A kernel on one weight: its model, and how far off measuring found it to be."""

    skipper: Skipper
    rates: Rates
    fact: WeightFact
    expected: float
    took: Took

    def seconds(self, share: float, m: int) -> float:
        return self._factor(m) * self._model(share, m)

    def share(self, seconds: float, m: int) -> float:
        return self.skipper.share(seconds / self._factor(m), m, self.rates, self.fact.n, self.fact.k)

    def margin(self, m: int) -> float:
        return 1.0 if self.measured(m) else MARGIN

    def measured(self, m: int) -> int:
        """The number of rows that was measured and is nearest to ``m``; 0: none was."""
        known = [at for at in _MS if self.took(str(self.skipper.format), at) is not None]
        return min(known, key=lambda at: abs(at - m), default=0)

    def _factor(self, m: int) -> float:
        at = self.measured(m)
        seconds = self.took(str(self.skipper.format), at) if at else None
        return 1.0 if seconds is None else seconds / self._model(self.expected, at)

    def _model(self, share: float, m: int) -> float:
        return self.skipper.seconds(share, m, self.rates, self.fact.n, self.fact.k)


def skippers(fact: WeightFact, dtype: str, rates: Rates, policy: Policy, loop: str) -> Iterator[Skipper]:
    """The formats of a weight that have a kernel of ``loop`` whose speed is known."""
    for format in formats_of(fact, dtype):
        pattern = format.pattern
        if pattern.kind not in KINDS or not allowed(format, policy.formats):
            continue
        values = "" if format.values == dtype else format.values
        for rate in kernel_rates(rates, pattern, dtype, values, loop):
            stored = fact.nnz if pattern.kind != "panel" else stored_values(pattern, fact)
            yield Skipper(format, rate, read_bytes(rate, format, fact), stored)
