"""A tuning database as a file: records out of one machine, into another with the same fingerprint.

In: the cache directory and a path. Out: one JSON file with a checksum, or its records in the database, all or none.
Measurements hold only for the hardware they were made on, so a file of another fingerprint is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec import targets
from sparsec.cache import digest, sealed, write_atomic
from sparsec.errors import BadTuningFile, InputError, OtherMachine, SparsecError, WriteFailed
from sparsec.tune_db import Database
from sparsec.tune_record import SCHEMA, Record, from_rows, to_row

KIND = "sparsec tune"


@dataclass(frozen=True)
class Moved:
    """``file``: what was read or written. ``records``: how many it holds. ``left``: of these, or of the database,
    those that were not taken: on import known here already and not older, on export of another machine."""

    file: str
    records: int
    left: int
    fingerprints: tuple[str, ...]


def fingerprints() -> tuple[str, ...]:
    """Of every target whose kernels run on this machine, that of ``auto`` first; GPUs too, which initialises CUDA."""
    found = []
    for name in targets.names():
        try:
            target = targets.resolve(name)
        except SparsecError:  # it does not run here
            continue
        if target.name != "reference" and getattr(target, "here", True):
            found.append(target.fingerprint)
    return tuple(dict.fromkeys(found))


def export_file(path: Path, cache: str = "") -> Moved:
    """Write what was measured on this machine to ``path``. Raises InputError where there is none, and WriteFailed."""
    database, here = Database.of(cache), fingerprints()
    known = database.all()
    ours = sorted((r for r in known if r.key.hardware in here), key=lambda r: r.key.id)
    if not ours:
        raise InputError(
            detail=f"nothing to export: {database.path} holds no measurement of {here[0]}; run sparsec tune MODEL first"
        )
    marks = tuple(mark for mark in here if any(r.key.hardware == mark for r in ours))
    value = {"kind": KIND, "schema": SCHEMA, "fingerprints": marks, "records": [to_row(r) for r in ours]}
    try:
        write_atomic(path, sealed(value) + b"\n")
    except OSError as error:
        raise WriteFailed(path=str(path), why=error.strerror or str(error)) from error
    return Moved(str(path), len(ours), len(known) - len(ours), marks)


def import_file(path: Path, cache: str = "") -> Moved:
    """Add the records of ``path``; the newer of two of the same key stays.

    Raises OtherMachine for another fingerprint, BadTuningFile, TuningNotKept, and OSError where it cannot be read.
    """
    marks, records = _read(path)
    here = fingerprints()
    for theirs in marks:
        if theirs not in here:
            kind = theirs.partition("/")[0]
            ours = next((mark for mark in here if mark.partition("/")[0] == kind), here[0])
            raise OtherMachine(path=str(path), theirs=theirs, ours=ours)
    database = Database.of(cache, strict=True)
    known = database.load([r.key for r in records])
    new = [r for r in records if r.key not in known or known[r.key].when < r.when]
    if new:
        database.save(*new)
    return Moved(str(path), len(records), len(records) - len(new), marks)


def _read(path: Path) -> tuple[tuple[str, ...], Sequence[Record]]:
    """Fingerprints and records of a file. Raises BadTuningFile, OSError."""
    value = _unsealed(path)
    if value.get("kind") != KIND:
        raise BadTuningFile(path=str(path), why="it is a JSON file of something else")
    schema, rows = value.get("schema"), value.get("records")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise BadTuningFile(path=str(path), why=f"its schema is {schema!r}, and this sparsec reads up to {SCHEMA}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadTuningFile(path=str(path), why="it has no list of records")
    records, wrong = from_rows(rows)
    if wrong or not records:
        raise BadTuningFile(path=str(path), why=f"{wrong} of its {len(rows)} records are none")
    return tuple(dict.fromkeys(r.key.hardware for r in records)), records


def _unsealed(path: Path) -> Mapping[str, Any]:
    try:
        wrapped = json.loads(path.read_bytes())
        value: Mapping[str, Any] = wrapped["value"]
        whole = wrapped["sum"] == digest(json.dumps(value, sort_keys=True)) and isinstance(value, dict)
    except (ValueError, KeyError, TypeError) as error:
        raise BadTuningFile(path=str(path), why="it is no JSON file of ours, or only a part of one") from error
    if not whole:
        raise BadTuningFile(path=str(path), why="its checksum does not match, so it is damaged or was edited")
    return value
