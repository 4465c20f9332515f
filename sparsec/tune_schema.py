"""The table of the tuning database, and the way from older ones to it: a connection in, the present table inside.

Older rows are copied into the new table in the one transaction that makes it, so a killed process leaves the old
table or the new one; the old table or file itself stays.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from sparsec.tune_record import COLUMNS, SCHEMA, from_rows, to_row

FIRST = "tune-1.sqlite3"  # the file of schema 1, which carried the number in its name
_CREATE = f"CREATE TABLE records (id TEXT PRIMARY KEY, {', '.join(COLUMNS[1:])})"
_INSERT = f"INSERT OR REPLACE INTO records ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{c}' for c in COLUMNS)})"


class Newer(Exception):
    """A database of a later sparsec. It is left as it is."""


def prepare(connection: sqlite3.Connection, path: Path) -> str:
    """Make the table where it is missing; a sentence about older records that were taken over, or nothing.

    Raises Newer, and what SQLite raises.
    """
    if _version(connection) == SCHEMA:
        return ""
    connection.execute("BEGIN IMMEDIATE")
    try:
        said = _upgrade(connection, path)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # an error such as a full disk has already undone it
            connection.execute("ROLLBACK")
        raise
    return said


def _upgrade(connection: sqlite3.Connection, path: Path) -> str:
    version = _version(connection)  # another process may have been here first
    if version == SCHEMA:
        return ""
    if version > SCHEMA:
        raise Newer(f"a newer sparsec wrote it: its schema is {version}, and this one reads up to {SCHEMA}")
    rows: list[Mapping[str, Any]] = []
    unread = ""
    if _has_table(connection):
        rows = dicts(connection.execute("SELECT * FROM records"))
        connection.execute(f"ALTER TABLE records RENAME TO records_{version}")
        where = f"the others stay in its table records_{version}"
    elif (first := path.with_name(FIRST)).exists():
        where = f"{first.name} stays as it is"
        try:
            rows = _of_file(first)
        except sqlite3.Error as error:
            unread = f"found {first.name} of an older sparsec, which cannot be read ({error}); it stays as it is"
    connection.execute(_CREATE)
    records, _ = from_rows(rows)
    connection.executemany(_INSERT, [to_row(record) for record in records])
    connection.execute(f"PRAGMA user_version={SCHEMA}")
    if not rows:
        return unread
    return f"took over {len(records)} of {len(rows)} measurements of an older sparsec; {where}"


def insert(connection: sqlite3.Connection, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Write rows in one transaction, in the place of those with the same id."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(_INSERT, rows)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return True


def each(cursor: sqlite3.Cursor) -> Iterator[Mapping[str, Any]]:
    """Rows by the names of their columns."""
    names = [column[0] for column in cursor.description]
    for row in cursor:
        yield dict(zip(names, row, strict=True))


def dicts(cursor: sqlite3.Cursor) -> list[Mapping[str, Any]]:
    return list(each(cursor))


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _has_table(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name='records'").fetchone())


def _of_file(path: Path) -> list[Mapping[str, Any]]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        return dicts(connection.execute("SELECT * FROM records"))
