"""What tuning keeps: a key, one measurement, and both as rows of a table.

In: rows of SQLite or of an exported file, of this schema or an older one. Out: records that can be true; a row that
cannot (its key does not hash to its id, or its numbers contradict each other) is None, never a wrong decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sparsec.cache import digest
from sparsec.efforts import EFFORTS
from sparsec.timing import Ratio

SCHEMA = 2  # of COLUMNS; 1 had no effort, busy, model_dense_s and model_s


@dataclass(frozen=True)
class Key:
    """What a measurement depends on; equal keys share it. ``density``: the nearest fortieth.

    ``hardware``: the fingerprint of the target. ``kernel``: hash of the kernel's text. ``format``: pattern and values
    (``bitmap+int8``), ``dtype``: of x. ``m``: rows of x, a power of two. ``cold``: weights were in no cache.
    """

    hardware: str
    torch: str
    threads: int
    kernel: str
    format: str
    loop: str
    dtype: str
    n: int
    k: int
    density: int
    m: int
    cold: bool

    @property
    def id(self) -> str:
        return digest(*(f"{name}={value}" for name, value in asdict(self).items()))

    @property
    def name(self) -> str:
        """``bitmap+fp32/dot``, without a configuration."""
        return f"{self.format}/{self.loop.partition('@')[0]}"


@dataclass(frozen=True)
class Record:
    """One kernel against dense ``F.linear``, interleaved: how many times faster, with its interval, and minima in s.

    ``effort``: what it was measured with. ``busy``: others used the machine meanwhile. ``model_s``, ``model_dense_s``:
    what the cost model had expected (0: not known).
    """

    key: Key
    ratio: Ratio
    dense_s: float
    ours_s: float
    rounds: int
    when: float  # seconds since the epoch
    effort: str = ""
    busy: bool = False
    model_dense_s: float = 0.0
    model_s: float = 0.0


KEY = tuple(f.name for f in fields(Key))
COLUMNS = (
    *("id", *KEY, "ratio", "low", "high", "dense_s", "ours_s", "rounds", "at"),
    *("effort", "busy", "model_dense_s", "model_s"),
)
_TEXTS = ("hardware", "torch", "kernel", "format", "loop", "dtype")


def to_row(record: Record) -> dict[str, Any]:
    """The columns of one record."""
    r = record
    values = (r.ratio.value, r.ratio.low, r.ratio.high, r.dense_s, r.ours_s, r.rounds, r.when)
    values = (r.key.id, *asdict(r.key).values(), *values, r.effort, r.busy, r.model_dense_s, r.model_s)
    return dict(zip(COLUMNS, values, strict=True))


def from_row(row: Mapping[str, Any]) -> Record | None:
    """The record of one row, also of schema 1, or None where it is not one."""
    try:
        said = {name: str(row[name]) if name in _TEXTS else int(row[name]) for name in KEY}
        key = Key(**{**said, "cold": bool(said["cold"])})  # type: ignore[arg-type]
        ratio = Ratio(float(row["ratio"]), float(row["low"]), float(row["high"]))
        if "effort" not in row:  # schema 1 did not ask whether the quietest moments agree
            ratio = replace(ratio, low=min(ratio.low, float(row["dense_s"]) / float(row["ours_s"])))
        rounds = int(row["rounds"])
        record = Record(
            key, ratio, float(row["dense_s"]), float(row["ours_s"]), rounds, float(row["at"]),
            str(row["effort"] if "effort" in row else _effort_of(rounds)), bool(row.get("busy", False)),
            float(row.get("model_dense_s", 0.0)), float(row.get("model_s", 0.0)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return record if row.get("id") == key.id and _can_be_true(record) else None


def from_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Record], int]:
    """The records of rows, and how many rows are none."""
    found = [record for row in rows if (record := from_row(row)) is not None]
    return found, len(rows) - len(found)


def _effort_of(rounds: int) -> str:
    """Schema 1 did not say: the least effort that makes so many rounds."""
    able = [name for name, effort in EFFORTS.items() if effort.rounds >= rounds]
    return able[0] if able else list(EFFORTS)[-1]


def _can_be_true(record: Record) -> bool:
    r = record.ratio
    numbers = (r.low, r.value, r.high, record.dense_s, record.ours_s)
    return all(0 < x < math.inf for x in numbers) and r.low <= r.value <= r.high and math.isfinite(record.when)
