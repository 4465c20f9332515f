"""Measured ratios on disk: SQLite in the cache directory, shared by processes, one committed row per measurement.

In: a ``Record``. Out: the same record in any later process on the same hardware. What an older sparsec wrote is taken
over; a damaged file is set aside, what can be read of it is taken over too, and it is begun anew; where nothing can be
written, records are kept for this process. Each of these is one sentence, and no file is ever removed.
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sparsec import tune_schema
from sparsec.cache import cache_dir, one_at_a_time, wanted_dir
from sparsec.errors import SparsecWarning, TuningNotKept
from sparsec.tune_record import Key, Record, from_row, from_rows, to_row

NAME = "tune.sqlite3"
BUSY_S = 20.0
_TRIES = 5
_AT_ONCE = 500  # keys of one query; SQLite bounds their number

_T = TypeVar("_T")
_unkept: dict[Path, dict[str, Record]] = {}  # what could not be written, for the rest of this process
_said: set[tuple[Path, str]] = set()


class Database:
    """The table of one cache directory. Every call opens, commits and closes: any number of processes may share it.

    ``strict``: raise TuningNotKept where nothing can be kept, instead of warning once and keeping it in memory.
    ``shipped``: a directory to read as well, whose own database cannot be written (part of a read-only image).
    """

    def __init__(self, folder: Path, strict: bool = False, shipped: Path | None = None) -> None:
        self.path = folder / NAME
        self.strict = strict
        self.shipped = shipped / NAME if shipped else None

    @classmethod
    def of(cls, chosen: str, strict: bool = False) -> Database:
        """That of the cache directory which ``chosen`` means."""
        folder, wanted = cache_dir(chosen), wanted_dir(chosen)
        return cls(folder, strict, wanted if wanted != folder else None)

    def load(self, keys: Iterable[Key]) -> dict[Key, Record]:
        """The records that exist among ``keys``."""
        wanted = {key.id: key for key in keys}
        if not wanted:
            return {}
        names = list(wanted)
        found: dict[str, Record] = {}
        for part in (names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)):
            text = f"SELECT * FROM records WHERE id IN ({','.join('?' * len(part))})"
            found |= {r.key.id: r for r in self._read(text, tuple(part))}
        found |= {name: r for name, r in _unkept.get(self.path, {}).items() if name in wanted}
        return {key: found[name] for name, key in wanted.items() if name in found}

    def all(self) -> list[Record]:
        """Every record, newest first."""
        found = {r.key.id: r for r in self._read("SELECT * FROM records", ())}
        return sorted((found | _unkept.get(self.path, {})).values(), key=lambda r: -r.when)

    def save(self, *records: Record) -> None:
        """Keep records, all or none; they outlive this process when this returns. Raises TuningNotKept if strict."""
        rows = [to_row(record) for record in records]
        if not self._do(lambda connection: tune_schema.insert(connection, rows), False):
            _unkept.setdefault(self.path, {}).update({record.key.id: record for record in records})

    def _read(self, text: str, values: tuple[str, ...]) -> list[Record]:
        """Records of this database and, where it has none, of the shipped one."""

        def rows(connection: sqlite3.Connection) -> list[Mapping[str, Any]]:
            return tune_schema.dicts(connection.execute(text, values))

        none: list[Mapping[str, Any]] = []
        ours = self._do(rows, none) if self._exists() else none
        theirs = _read_only(self.shipped, rows) if self.shipped else []
        found, wrong = from_rows([*theirs, *ours])
        if wrong:
            self._warn(f"holds {wrong} rows that are no measurements; they are left alone and not used")
        return found

    def _exists(self) -> bool:
        return self.path.exists() or self.path.with_name(tune_schema.FIRST).exists()

    def _do(self, work: Callable[[sqlite3.Connection], _T], otherwise: _T) -> _T:
        why = "it is locked by another process"
        for attempt in range(_TRIES):
            try:
                with self._open() as connection:
                    return work(connection)
            except tune_schema.Newer as error:
                why = str(error)
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) and "busy" not in str(error):
                    why = str(error)
                    break
                time.sleep(0.05 * 2**attempt)  # WAL still has moments, such as its first use, that do not wait
            except sqlite3.DatabaseError as error:
                why = str(error)
                self._set_aside(error)
        if self.strict:
            raise TuningNotKept(path=str(self.path), why=why)
        self._warn(f"cannot be used ({why}); measurements are kept for this process only")
        return otherwise

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            if said := tune_schema.prepare(connection, self.path):
                self._warn(said)
            yield connection

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """One process at a time, and only while the file is damaged: another may have begun it anew meanwhile."""
        with one_at_a_time(self.path.with_suffix(".lock")):
            if _is_whole(self.path):
                return
            aside = next(p for i in range(10**6) if not (p := self.path.with_suffix(f".damaged{i or ''}")).exists())
            self.path.replace(aside)
            for part in ("-wal", "-shm"):  # the write-ahead log may hold the newest rows
                if (beside := self.path.with_name(self.path.name + part)).exists():
                    beside.replace(aside.with_name(aside.name + part))
        saved = [record for row in _salvaged(aside) if (record := from_row(row)) is not None]
        if saved:
            self.save(*saved)
        what = f"it was set aside as {aside.name} and begun anew with {len(saved)} of its records"
        self._warn(f"is damaged ({error}); {what}")

    def _warn(self, what: str) -> None:
        if (self.path, what) in _said:
            return
        _said.add((self.path, what))
        warnings.warn(f"the tuning database {self.path} {what}", SparsecWarning, stacklevel=5)


def _read_only(path: Path, work: Callable[[sqlite3.Connection], list[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """What a database in a directory that cannot be written says; nothing where it cannot be read."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            return work(connection)
    except sqlite3.Error:
        return []


def _is_whole(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_S)) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.OperationalError:  # locked, so another process can use it
        return True
    except sqlite3.DatabaseError:
        return False


def _salvaged(path: Path) -> list[Mapping[str, Any]]:
    """The rows that can still be read of a damaged database."""
    found: list[Mapping[str, Any]] = []
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            for row in tune_schema.each(connection.execute("SELECT * FROM records NOT INDEXED")):
                found.append(row)
    except sqlite3.Error:
        pass
    return found
