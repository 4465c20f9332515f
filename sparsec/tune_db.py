"""Measured ratios on disk: SQLite in the cache directory, shared by processes, one committed row per measurement.

In: a ``Record``. Out: the same record in any later process on the same hardware. A damaged file is set aside with a
warning and begun anew; one that cannot be written means that measurements are not kept.
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sparsec.cache import digest
from sparsec.errors import SparsecWarning
from sparsec.timing import Ratio

NAME = "tune-1.sqlite3"  # the number is that of the table's shape
BUSY_S = 20.0
_TRIES = 5

_T = TypeVar("_T")


@dataclass(frozen=True)
class Key:
    """What a measurement depends on; equal keys share it. ``density``: the nearest fortieth.

    ``kernel``: hash of the kernel's text. ``m``: rows of x, a power of two. ``cold``: weights were in no cache.
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


@dataclass(frozen=True)
class Record:
    """One kernel against dense ``F.linear``, interleaved: how many times faster, with its interval, and minima in s."""

    key: Key
    ratio: Ratio
    dense_s: float
    ours_s: float
    rounds: int
    when: float  # seconds since the epoch


_KEY = [f.name for f in fields(Key)]
_COLUMNS = ["id", *_KEY, "ratio", "low", "high", "dense_s", "ours_s", "rounds", "at"]


class Database:
    """The table of one cache directory. Every call opens, commits and closes: any number of processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def load(self, keys: Iterable[Key]) -> dict[Key, Record]:
        """The records that exist among ``keys``."""
        wanted = {key.id: key for key in keys}
        if not wanted or not self.path.exists():
            return {}
        marks = ",".join("?" * len(wanted))
        text = f"SELECT * FROM records WHERE id IN ({marks})"
        rows: list[Any] = self._do(lambda c: c.execute(text, list(wanted)).fetchall(), [])
        return {record.key: record for record in map(_record, rows) if record.key.id in wanted}

    def save(self, record: Record) -> None:
        """Keep one record; it is on disk when this returns."""
        key = asdict(record.key)
        values = [record.key.id, *key.values(), *(record.ratio.value, record.ratio.low, record.ratio.high)]
        values += [record.dense_s, record.ours_s, record.rounds, record.when]
        text = f"INSERT OR REPLACE INTO records VALUES ({','.join('?' * len(values))})"
        self._do(lambda c: c.execute(text, values) and None, None)

    def all(self) -> list[Record]:
        """Every record, newest first."""
        if not self.path.exists():
            return []
        rows: list[Any] = self._do(lambda c: c.execute(_ALL).fetchall(), [])
        return [_record(row) for row in rows]

    def _do(self, work: Callable[[sqlite3.Connection], _T], otherwise: _T) -> _T:
        for attempt in range(_TRIES):
            try:
                with self._open() as connection:
                    return work(connection)
            except sqlite3.OperationalError as error:
                if "locked" in str(error) or "busy" in str(error):
                    time.sleep(0.05 * 2**attempt)  # WAL still has moments, such as its first use, that do not wait
                    continue
                self._warn(f"cannot be used ({error}); measurements are not kept")
                return otherwise
            except sqlite3.DatabaseError as error:
                self._set_aside(error)
        return otherwise

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=BUSY_S)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_CREATE)
            with connection:
                yield connection
        finally:
            connection.close()

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Two processes may both find the damage: only the one whose rename works says so."""
        try:
            self.path.replace(self.path.with_suffix(".damaged"))
        except FileNotFoundError:
            return
        for leftover in ("-wal", "-shm"):
            self.path.with_name(self.path.name + leftover).unlink(missing_ok=True)
        self._warn(f"is damaged ({error}); it was set aside and is begun anew")

    def _warn(self, what: str) -> None:
        warnings.warn(f"the tuning database {self.path} {what}", SparsecWarning, stacklevel=5)


_CREATE = f"CREATE TABLE IF NOT EXISTS records (id TEXT PRIMARY KEY, {', '.join(_COLUMNS[1:])})"
_ALL = "SELECT * FROM records ORDER BY at DESC"


def _record(row: tuple[object, ...]) -> Record:
    values: dict[str, object] = dict(zip(_COLUMNS, row, strict=True))
    key = Key(**{name: values[name] for name in _KEY} | {"cold": bool(values["cold"])})  # type: ignore[arg-type]
    number = {name: float(str(values[name])) for name in ("ratio", "low", "high", "dense_s", "ours_s", "at")}
    ratio = Ratio(number["ratio"], number["low"], number["high"])
    return Record(key, ratio, number["dense_s"], number["ours_s"], int(str(values["rounds"])), number["at"])
