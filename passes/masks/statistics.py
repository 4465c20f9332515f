"""Streaming statistics of one layer's inputs. In: activations [tokens, K], batch by batch. Out: tensors by name.

The names and shapes are ``STATISTICS`` of the contract. Nothing needs a second pass over the data, and but for
``sample`` neither the order of the batches nor how tokens are cut into them matters beyond the rounding of sums.
Inputs of every float dtype are reduced in fp32, piece by piece, and the pieces are added up in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from sparsec.errors import NonFinite
from sparsec.passes.masks.contract import GRADIENTS, STATISTICS

BINS = 256  # of a histogram; a multiple of 4, so that bins merge in pairs
SAMPLE = 512  # rows
_PIECE = 2048  # tokens reduced at once: bounds the fp32 copy, and the length of an fp32 sum
_LOWEST = -100  # columns below 2^-100 share the two bins around zero; keeps the scales of ``_Histogram`` normal numbers


class Collector:
    """Reduces the inputs of a layer with ``k`` in-features to the statistics in ``needs``.

    Names of ``GRADIENTS`` are left out: they are not of inputs (``sparsec.gradients`` has them). ``name`` is the layer,
    for errors. The accumulators live on the device of the first batch.
    """

    def __init__(self, k: int, needs: Sequence[str], name: str = "") -> None:
        self.k, self.name = k, name
        self._needs = tuple(need for need in dict.fromkeys(needs) if need not in GRADIENTS)
        if unknown := [need for need in self._needs if need not in STATISTICS]:
            raise ValueError(f"no such statistics: {', '.join(unknown)}")
        self._tokens = 0
        self._reducers: dict[str, _Reducer] | None = None

    def add(self, x: torch.Tensor) -> None:
        """Take in tokens [tokens, K] of any float dtype on any device. Raises NonFinite, before it counts the piece."""
        if x.shape[1:] != (self.k,):
            raise ValueError(f"inputs of shape {tuple(x.shape)} for {self.k} in-features")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # autocast would multiply in 16 bits
            for piece in torch.split(x.detach(), _PIECE):
                if len(piece):
                    self._add(piece.float())

    def _add(self, x: torch.Tensor) -> None:
        peak = x.abs().amax(0)  # of NaN and infinity as well
        _refuse_nonfinite(peak, self.name)
        if self._reducers is None:
            self._reducers = self._made(x.device)
        self._tokens += len(x)
        for reducer in self._reducers.values():
            reducer.add(x, peak)

    def _made(self, device: torch.device) -> dict[str, _Reducer]:
        """A reducer for each statistic asked for; one histogram serves two."""
        kinds = {"histogram" if need == "entropy" else need for need in self._needs} - {"tokens"}
        return {kind: _REDUCERS[kind](self.k, device) for kind in sorted(kinds)}

    def result(self) -> dict[str, torch.Tensor]:
        """The statistics so far; zeros (and an empty sample) where no token came. Raises NonFinite on overflow."""
        reducers = self._made(torch.device("cpu")) if self._reducers is None else self._reducers
        found: dict[str, torch.Tensor] = {}
        for need in self._needs:
            if need == "tokens":
                found[need] = torch.tensor(self._tokens)
            elif need == "entropy":
                found[need] = _entropy(reducers["histogram"].value())
            else:
                found[need] = reducers[need].value()
            if need in ("sum_x4", "sum_x2", "xxt"):
                _refuse_nonfinite(found[need].diagonal() if need == "xxt" else found[need], self.name)
        return found


def _refuse_nonfinite(columns: torch.Tensor, name: str) -> None:
    if not bool((finite := columns.isfinite()).all()):
        where = f" in feature {int((~finite).nonzero()[0])} of {len(columns)}"
        raise NonFinite(what="the inputs", name=repr(name) if name else "a layer", where=where)


class _Reducer(Protocol):
    """``add`` takes x [tokens, K] fp32 and its largest magnitudes [K]; ``value`` is the statistic."""

    def add(self, x: torch.Tensor, peak: torch.Tensor) -> None: ...

    def value(self) -> torch.Tensor: ...


class _Sum:
    """The sum over tokens of what ``of`` makes of x."""

    def __init__(self, of: Callable[[torch.Tensor], torch.Tensor], k: int, device: torch.device) -> None:
        self.of, self.total = of, torch.zeros(k, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, peak: torch.Tensor) -> None:
        self.total += self.of(x).sum(0)

    def value(self) -> torch.Tensor:
        return self.total.float()


class _Outer:
    """x^T x. Over a million tokens an fp32 total is off by up to 8e-6 of its scale, this one by 6e-8."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.total = torch.zeros(k, k, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, peak: torch.Tensor) -> None:
        self.total += x.t() @ x

    def value(self) -> torch.Tensor:
        return self.total.float()


class _AbsMax:
    def __init__(self, k: int, device: torch.device) -> None:
        self.peak = torch.zeros(k, device=device)

    def add(self, x: torch.Tensor, peak: torch.Tensor) -> None:
        self.peak = torch.maximum(self.peak, peak)

    def value(self) -> torch.Tensor:
        return self.peak


class _Histogram:
    """Counts in ``BINS`` equal bins over [-r, r); r = 2^exponent of a column is the power of two above its largest |x|.

    A larger value doubles the range, which merges bins in pairs around zero: floor(floor(a) / 2) = floor(a / 2), so
    the counts are those of a second pass with the final range.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.exponent = torch.full((k,), _LOWEST, dtype=torch.int32, device=device)
        self.counts = torch.zeros(k, BINS, dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor, peak: torch.Tensor) -> None:
        exponent = torch.frexp(peak).exponent.masked_fill(peak == 0, _LOWEST)  # zeros fit any range
        self._widen(torch.maximum(self.exponent, exponent))
        per_bin = (BINS // 2).bit_length() - 1 - self.exponent
        scale = ((per_bin + 127) << 23).view(torch.float32)  # 2^per_bin by its bits: pow() may be off by an ulp
        bins = (x * scale).floor().to(torch.int32)
        bins.masked_fill_((bins == 0) & (x < 0), -1)  # a product that underflowed to -0.0
        first = torch.arange(len(peak), dtype=torch.int32, device=x.device) * BINS + BINS // 2
        self.counts += torch.bincount((bins + first).flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, exponent: torch.Tensor) -> None:
        if torch.equal(exponent, self.exponent):
            return
        steps = (exponent - self.exponent).clamp(max=31)  # wider shifts of an int32 are undefined, and give the same
        centred = torch.arange(-BINS // 2, BINS // 2, dtype=torch.int32, device=exponent.device)
        place = (centred >> steps[:, None]) + BINS // 2
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, place.long(), self.counts)
        self.exponent = exponent

    def value(self) -> torch.Tensor:
        return self.counts


class _Sample:
    """Every ``step``-th row: when there are too many, every other one goes, and the step doubles."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.rows = torch.zeros(0, k, device=device)
        self.step, self.seen = 1, 0

    def add(self, x: torch.Tensor, peak: torch.Tensor) -> None:
        self.rows = torch.cat([self.rows, x[-self.seen % self.step :: self.step]])
        self.seen += len(x)
        while len(self.rows) > SAMPLE:
            self.rows, self.step = self.rows[::2].clone(), 2 * self.step

    def value(self) -> torch.Tensor:
        return self.rows


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy of each row of counts [K, bins], nats; 0 for a row without counts."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    nats: torch.Tensor = torch.special.entr(share).sum(1)
    return nats.float()


_REDUCERS: Mapping[str, Callable[[int, torch.device], _Reducer]] = {
    "sum_x2": lambda k, device: _Sum(torch.square, k, device),
    "sum_x4": lambda k, device: _Sum(lambda x: x.square().square(), k, device),
    "xxt": _Outer,
    "absmax": _AbsMax,
    "histogram": _Histogram,
    "sample": _Sample,
}
