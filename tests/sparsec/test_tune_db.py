"""The tuning database: what comes back, what damage, age, a full disk and a killed process cost, and who shares it."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import cache, tune_schema
from sparsec.errors import SparsecWarning, TuningNotKept
from sparsec.timing import Ratio
from sparsec.tune_db import Database
from sparsec.tune_record import COLUMNS, SCHEMA, Key, Record, from_row, from_rows, to_row


def a_record(i: int = 0, **other: Any) -> Record:
    key = Key("cpu/x", "2.13", 2, "text", "bitmap+fp32", "dot", "fp32", 64, 64, 8, 1 + i, False)
    ratio = Ratio(1.5, 1.4, 1.6)
    return Record(dataclasses.replace(key, **other), ratio, 2e-5, 1e-5, 15, 100.0 + i, "quick", False, 3e-5, 2e-5)


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    database = Database(tmp_path)
    for record in (a_record(), a_record(1, cold=True), a_record(2, density=39)):
        database.save(record)
        assert database.load([record.key, a_record(9).key]) == {record.key: record}
    assert [r.key.m for r in database.all()] == [3, 2, 1]


def test_more_keys_than_sqlite_takes_at_once_are_loaded(tmp_path: Path) -> None:
    records = [a_record(i) for i in range(1200)]
    Database(tmp_path).save(*records)
    assert Database(tmp_path).load(r.key for r in records) == {r.key: r for r in records}


def test_every_field_of_a_key_keeps_records_apart() -> None:
    base = a_record().key
    changed = {"hardware": "y", "torch": "3", "threads": 4, "kernel": "new", "format": "index+fp32", "loop": "outer"}
    changed |= {"dtype": "bf16", "n": 65, "k": 65, "density": 9, "m": 2, "cold": True}
    assert set(changed) == {f.name for f in dataclasses.fields(Key)}
    ids = {dataclasses.replace(base, **{name: value}).id for name, value in changed.items()}
    assert len(ids | {base.id}) == 1 + len(changed)


@given(
    numbers=st.tuples(*[st.floats(1e-9, 1e9) for _ in range(5)]),
    rounds=st.integers(5, 1000),
    effort=st.sampled_from(["", "quick", "full"]),
    busy=st.booleans(),
    values=st.sampled_from(["fp32", "bf16", "int8", "int4g128"]),
)
@settings(derandomize=True, max_examples=50)
def test_a_row_is_the_record_that_it_was_made_of(
    numbers: tuple[float, ...], rounds: int, effort: str, busy: bool, values: str
) -> None:
    low, value, high = sorted(numbers[:3])
    key = dataclasses.replace(a_record().key, format=f"bitmap+{values}")
    record = Record(key, Ratio(value, low, high), numbers[3], numbers[4], rounds, 1e9, effort, busy, 1e-5, 2e-5)
    assert from_row(to_row(record)) == record


@given(column=st.sampled_from(COLUMNS), junk=st.sampled_from([None, "x", -1, float("nan"), float("inf"), b"\xff", 0]))
@settings(derandomize=True, max_examples=150)
def test_a_row_with_junk_in_it_is_no_record_or_still_a_true_one(column: str, junk: object) -> None:
    found = from_row({**to_row(a_record()), column: junk})
    if found is not None:
        assert found.key == a_record().key
        assert 0 < found.ratio.low <= found.ratio.value <= found.ratio.high < float("inf")
        assert min(found.dense_s, found.ours_s) > 0


def test_rows_that_cannot_be_true_are_left_alone_and_said(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.save(a_record(), a_record(1))
    with contextlib.closing(sqlite3.connect(database.path)) as connection, connection:
        connection.execute("UPDATE records SET low=9.9 WHERE m=1")
    with pytest.warns(SparsecWarning, match="1 rows that are no measurements"):
        assert database.all() == [a_record(1)]
    with contextlib.closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("SELECT count(*) FROM records").fetchone() == (2,)


# -------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", [b"this is no database", b"SQLite format 3\x00" + b"\xff" * 4000])
def test_a_damaged_database_is_set_aside_and_begun_anew(tmp_path: Path, damage: bytes) -> None:
    database = Database(tmp_path)
    database.path.write_bytes(damage)
    with pytest.warns(SparsecWarning, match=r"damaged .* set aside as tune.damaged and begun anew with 0"):
        database.save(a_record())
    assert database.all() == [a_record()]
    assert database.path.with_suffix(".damaged").read_bytes() == damage


def test_what_can_be_read_of_a_damaged_database_is_kept(tmp_path: Path) -> None:
    database = Database(tmp_path)
    records = [a_record(i) for i in range(400)]
    database.save(*records)
    whole = database.path.read_bytes()
    middle = len(whole) // 2 // 4096 * 4096
    database.path.write_bytes(whole[:middle] + b"\xff" * 8192 + whole[middle + 8192 :])
    with pytest.warns(SparsecWarning, match="damaged"):
        database.load([r.key for r in records])
    kept = database.all()
    assert 0 < len(kept) < 400
    assert set(kept) <= set(records)
    database.save(*records)
    assert len(database.all()) == 400


def test_a_second_damage_does_not_cost_the_first_file(tmp_path: Path) -> None:
    database = Database(tmp_path)
    for damage in (b"first", b"second"):
        database.path.write_bytes(damage * 300)
        with pytest.warns(SparsecWarning, match="damaged"):
            database.save(a_record())
    assert [p.read_bytes()[:5] for p in sorted(tmp_path.glob("*.damaged*"))] == [b"first", b"secon"]


def test_a_file_that_another_process_has_already_begun_anew_is_not_set_aside(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.save(a_record())
    database._set_aside(sqlite3.DatabaseError("seen before the other process was done"))
    assert database.all() == [a_record()]
    assert not list(tmp_path.glob("*.damaged*"))


# -------------------------------------------------------------------------------------------------- age


def an_old_table(path: Path, version: int, rows: int = 3) -> None:
    """As schema 1 had it: without the last four columns."""
    old = COLUMNS[:-4]
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE records (id TEXT PRIMARY KEY, {', '.join(old[1:])})")
        for i in range(rows):
            row = to_row(a_record(i))
            connection.execute(f"INSERT INTO records VALUES ({','.join('?' * len(old))})", [row[c] for c in old])
        connection.execute(f"PRAGMA user_version={version}")


@pytest.mark.parametrize(("name", "version"), [(tune_schema.FIRST, 0), ("tune.sqlite3", 0), ("tune.sqlite3", 1)])
def test_the_records_of_an_older_sparsec_are_taken_over(tmp_path: Path, name: str, version: int) -> None:
    an_old_table(tmp_path / name, version)
    before = (tmp_path / name).read_bytes()
    database = Database(tmp_path)
    with pytest.warns(SparsecWarning, match="took over 3 of 3 measurements of an older sparsec") as said:
        found = database.load([a_record(i).key for i in range(4)])
    assert len(said) == 1
    unknown = {"model_s": 0.0, "model_dense_s": 0.0}
    assert list(found.values()) == [dataclasses.replace(a_record(i), **unknown) for i in range(3)]
    database.save(a_record(7))
    assert len(database.all()) == 4
    if name == tune_schema.FIRST:
        assert (tmp_path / name).read_bytes() == before
    else:
        with contextlib.closing(sqlite3.connect(database.path)) as connection:
            assert connection.execute(f"SELECT count(*) FROM records_{version}").fetchone() == (3,)


def test_an_older_file_that_cannot_be_read_is_said_and_stays(tmp_path: Path) -> None:
    (tmp_path / tune_schema.FIRST).write_bytes(b"no database" * 100)
    with pytest.warns(SparsecWarning, match="tune-1.sqlite3 of an older sparsec, which cannot be read"):
        Database(tmp_path).save(a_record())
    assert Database(tmp_path).all() == [a_record()]
    assert (tmp_path / tune_schema.FIRST).read_bytes() == b"no database" * 100


def test_an_older_gain_that_its_own_minima_deny_is_not_sure() -> None:
    row = {**to_row(a_record()), "dense_s": 1e-5, "ours_s": 1.2e-5}
    old = {name: value for name, value in row.items() if name in COLUMNS[:-4]}
    found = from_row(old)
    assert found is not None
    assert found.ratio.low == pytest.approx(1 / 1.2)
    assert found.ratio.value == 1.5


def test_a_table_of_other_columns_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "tune.sqlite3")) as connection, connection:
        connection.execute("CREATE TABLE records (id TEXT, gain)")
        connection.execute("INSERT INTO records VALUES ('a', 2.0)")
    with pytest.warns(SparsecWarning, match="took over 0 of 1 measurements .* stay in its table records_0"):
        Database(tmp_path).save(a_record())
    assert Database(tmp_path).all() == [a_record()]


def test_a_database_of_a_newer_sparsec_is_not_touched(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.save(a_record())
    with contextlib.closing(sqlite3.connect(database.path)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA + 1}")
    with pytest.warns(SparsecWarning, match=f"a newer sparsec wrote it: its schema is {SCHEMA + 1}"):
        database.save(a_record(1))
    assert database.load([a_record(1).key])  # in this process
    with pytest.raises(TuningNotKept, match="newer sparsec"):
        Database(tmp_path, strict=True).save(a_record(2))
    with contextlib.closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("SELECT count(*) FROM records").fetchone() == (1,)


# -------------------------------------------------------------------------------------------------- no room


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every database is as large as it may become: SQLite itself then says that the disk is full."""
    opened = Database._open

    @contextlib.contextmanager
    def limited(self: Database) -> Iterator[sqlite3.Connection]:
        with opened(self) as connection:
            connection.execute("PRAGMA max_page_count=1")
            yield connection

    monkeypatch.setattr(Database, "_open", limited)


def test_a_full_disk_costs_one_warning_and_nothing_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    database = Database(tmp_path)
    kept = [a_record(i) for i in range(20)]
    database.save(*kept)
    request.getfixturevalue("full")
    more = [a_record(100 + i) for i in range(200)]
    with pytest.warns(SparsecWarning, match=r"disk is full.*kept for this process only") as said:
        all_saved = [database.save(record) for record in more]
    assert (len(said), len(all_saved)) == (1, 200)
    assert set(database.load([r.key for r in more]).values()) == set(more)  # whichever of them still had room
    monkeypatch.undo()
    on_disk = {r.key.id for r in Database(tmp_path)._read("SELECT * FROM records", ())}
    assert {r.key.id for r in kept} <= on_disk
    assert len(on_disk) < 220


def test_on_a_full_disk_a_tuning_stops_with_one_sentence(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    Database(tmp_path).save(a_record())
    request.getfixturevalue("full")
    with pytest.raises(TuningNotKept, match=r"could not be kept in .*disk is full") as said:
        Database(tmp_path, strict=True).save(*[a_record(i) for i in range(400)])
    assert "\n" not in str(said.value)
    assert [r.key for r in Database(tmp_path).all()] == [a_record().key]  # all of a call or nothing


def test_a_database_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.path.mkdir()
    with pytest.warns(SparsecWarning, match="kept for this process only"):
        database.save(a_record())
    assert database.load([a_record().key]) == {a_record().key: a_record()}


def test_records_in_a_directory_that_cannot_be_written_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Database(tmp_path).save(a_record())
    monkeypatch.setattr(cache, "_replacements", {})
    usual = cache.unwritable
    monkeypatch.setattr(cache, "unwritable", lambda p: "Read-only file system" if p == tmp_path else usual(p))
    with pytest.warns(SparsecWarning, match="cannot be written"):
        database = Database.of(str(tmp_path))
    assert database.path.parent != tmp_path
    assert database.all() == [a_record()]
    database.save(a_record(1))
    assert {r.key.m for r in Database.of(str(tmp_path)).all()} == {1, 2}
    monkeypatch.undo()
    assert Database(tmp_path).all() == [a_record()]


# -------------------------------------------------------------------------------------------------- processes

WRITER = """
import sys
from pathlib import Path
from sparsec.timing import Ratio
from sparsec.tune_db import Database
from sparsec.tune_record import Key, Record
database, who = Database(Path(sys.argv[1])), sys.argv[2]
for i in range(int(sys.argv[3])):
    key = Key(who, "2.13", 2, "text", "bitmap+fp32", "dot", "fp32", 64, 64, 8, i, False)
    database.save(Record(key, Ratio(1.5, 1.4, 1.6), 2e-5, 1e-5, 15, 100.0))
    print(i, flush=True)
"""


def writer(folder: Path, who: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(folder), who, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_one_database(tmp_path: Path) -> None:
    writers = [writer(tmp_path, who, 40) for who in ("one", "two")]
    for process in writers:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    found = Database(tmp_path).all()
    assert {(r.key.hardware, r.key.m) for r in found} == {(who, i) for who in ("one", "two") for i in range(40)}


def test_a_killed_process_loses_nothing_that_it_had_saved(tmp_path: Path) -> None:
    process = writer(tmp_path, "one", 10**6)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(30)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert told[-1] == "29\n"
    found = Database(tmp_path).all()
    assert {r.key.m for r in found} >= set(range(30))
    Database(tmp_path).save(a_record())
    assert len(Database(tmp_path).all()) == len(found) + 1


def test_rows_that_are_none_are_counted() -> None:
    assert from_rows([to_row(a_record()), {}, {"id": 1}]) == ([a_record()], 2)
