"""How far the cost model is from the clock: tuning's records in, median and worst error per kernel out.

Each record holds what the model expected of the kernel and of dense when it was measured. The errors are of seconds,
which the model gets wrong together on a slower or a busier machine, and of the speedup, which decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsec.tune_record import Record


@dataclass(frozen=True)
class Error:
    """Relative errors, predicted over measured minus one: 0.2 is 20 % more than measured.

    ``median``: of the sizes, without their sign. ``worst``: the largest by factor, with its sign; ``where``: the record
    it is of, ``2048x2048 M=16 80% zero``.
    """

    median: float
    worst: float
    where: str


@dataclass(frozen=True)
class KernelError:
    """One kernel, or dense, with x of one dtype: how well its ``seconds`` and its ``speedup`` are predicted.

    ``speedup`` is None for dense. ``count``: measurements.
    """

    kernel: str
    dtype: str
    count: int
    seconds: Error
    speedup: Error | None


def errors_by_kernel(records: Iterable[Record]) -> tuple[KernelError, ...]:
    """Of records with a prediction; dense first, then kernels by name. Of a GPU's configurations the fastest counts:
    the model predicts kernels, not configurations."""
    told = list(_fastest(r for r in records if r.model_s > 0 and r.model_dense_s > 0))
    dense: dict[str, list[Record]] = {}
    kernels: dict[tuple[str, str], list[Record]] = {}
    for record in told:
        dense.setdefault(record.key.dtype, []).append(record)
        kernels.setdefault((record.key.name, record.key.dtype), []).append(record)
    rows = [KernelError("dense", dtype, len(found), _dense(found), None) for dtype, found in sorted(dense.items())]
    for (name, dtype), found in sorted(kernels.items()):
        seconds = _error(found, [r.model_s / r.ours_s for r in found])
        gains = _error(found, [r.model_dense_s / r.model_s / r.ratio.value for r in found])
        rows.append(KernelError(name, dtype, len(found), seconds, gains))
    return tuple(rows)


def _fastest(records: Iterable[Record]) -> Iterable[Record]:
    best: dict[tuple[object, ...], Record] = {}
    for record in records:
        k = record.key
        what = (k.hardware, k.torch, k.threads, k.kernel, k.name, k.dtype, k.n, k.k, k.density, k.m, k.cold)
        if what not in best or record.ours_s < best[what].ours_s:
            best[what] = record
    return best.values()


def _dense(records: Sequence[Record]) -> Error:
    return _error(records, [r.model_dense_s / r.dense_s for r in records])


def _error(records: Sequence[Record], factors: Sequence[float]) -> Error:
    """``factors``: predicted over measured, above zero."""
    worst = max(range(len(factors)), key=lambda i: max(factors[i], 1 / factors[i]))
    key = records[worst].key
    where = f"{key.n}x{key.k} M={key.m} {100 - 2.5 * key.density:.0f}% zero"
    return Error(statistics.median(abs(f - 1) for f in factors), factors[worst] - 1, where)


def table(rows: Sequence[KernelError]) -> str:
    """The rows as text: percent, predicted against measured."""
    head = ["kernel", "x", "n", "seconds: median", "worst", "speedup: median", "worst", "where its worst is"]
    body = [
        [
            row.kernel, row.dtype, str(row.count), f"{100 * row.seconds.median:.0f} %", _signed(row.seconds.worst),
            *((f"{100 * row.speedup.median:.0f} %", _signed(row.speedup.worst)) if row.speedup else ("-", "-")),
            (row.speedup or row.seconds).where,
        ]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lefts = (0, 1, len(head) - 1)
    return "\n".join(
        "  ".join(c.ljust(w) if i in lefts else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        .rstrip()
        for line in [head, *body]
    )  # fmt: skip


def _signed(error: float) -> str:
    return f"{100 * error:+.0f} %"
