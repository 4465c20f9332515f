"""Moving a tuning database between machines: what arrives, and what is refused in one sentence."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec import cli, targets, tune_files
from sparsec.cache import sealed
from sparsec.errors import BadTuningFile, InputError, OtherMachine, WriteFailed
from sparsec.timing import Ratio
from sparsec.tune_db import Database
from sparsec.tune_files import export_file, fingerprints, import_file
from sparsec.tune_record import SCHEMA, Key, Record

HERE = targets.resolve("auto").fingerprint


def a_record(i: int = 0, hardware: str = HERE, when: float = 100.0) -> Record:
    key = Key(hardware, "2.13", 2, "text", "bitmap+int8", "dot", "fp32", 64, 64, 8, 1 + i, False)
    return Record(key, Ratio(1.5, 1.4, 1.6), 2e-5, 1e-5, 15, when, "quick", False, 3e-5, 2e-5)


def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    return tmp_path / "here", tmp_path / "there", tmp_path / "tuned.json"


def test_what_was_exported_is_there_after_an_import(tmp_path: Path) -> None:
    here, there, file = folders(tmp_path)
    records = [a_record(i) for i in range(700)]
    Database(here).save(*records, a_record(0, hardware="cpu/other/avx2/64c"))
    done = export_file(file, str(here))
    assert (done.records, done.left, done.fingerprints) == (700, 1, (HERE,))
    done = import_file(file, str(there))
    assert (done.records, done.left) == (700, 0)
    assert {r.key.id: r for r in Database(there).all()} == {r.key.id: r for r in records}
    assert import_file(file, str(there)).left == 700


def test_the_newer_of_two_measurements_stays(tmp_path: Path) -> None:
    here, there, file = folders(tmp_path)
    Database(here).save(a_record(0, when=200.0), a_record(1, when=200.0))
    Database(there).save(a_record(0, when=100.0), a_record(1, when=300.0))
    export_file(file, str(here))
    assert import_file(file, str(there)).left == 1
    assert {r.key.m: r.when for r in Database(there).all()} == {1: 200.0, 2: 300.0}


def test_a_file_of_another_machine_is_refused_and_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, file = folders(tmp_path)
    other = "cpu/some other CPU/avx512/64c"
    Database(here).save(a_record(0, hardware=other), a_record(1, hardware=other))
    monkeypatch.setattr(tune_files, "fingerprints", lambda: (other,))
    export_file(file, str(here))
    monkeypatch.setattr(tune_files, "fingerprints", fingerprints)
    with pytest.raises(OtherMachine) as refused:
        import_file(file, str(there))
    assert other in str(refused.value)
    assert HERE in str(refused.value)
    assert Database(there).all() == []
    assert cli.run(["tune", "--import", str(file), "--cache-dir", str(there)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert other in err
    assert HERE in err


def test_a_file_with_one_record_of_another_machine_is_refused_whole(tmp_path: Path) -> None:
    here, there, file = folders(tmp_path)
    Database(here).save(a_record())
    export_file(file, str(here))
    value = json.loads(file.read_bytes())["value"]
    row = tune_files.to_row(a_record(1, hardware="cuda/H200/sm_90/132sm"))
    file.write_bytes(sealed({**value, "records": [*value["records"], row]}))
    with pytest.raises(OtherMachine, match="H200"):
        import_file(file, str(there))
    assert Database(there).all() == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    here, _, file = folders(tmp_path_factory.mktemp("exported"))
    Database(here).save(*[a_record(i) for i in range(5)])
    export_file(file, str(here))
    return file.read_bytes()


@given(where=st.floats(0, 0.999), what=st.sampled_from(["cut", "change"]))
@settings(derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_file_is_refused_whole(tmp_path: Path, exported: bytes, where: float, what: str) -> None:
    file, place = tmp_path / "damaged.json", int(where * (len(exported) - 1))
    changed = bytes([exported[place] ^ 1])
    file.write_bytes(exported[:place] if what == "cut" else exported[:place] + changed + exported[place + 1 :])
    with pytest.raises(BadTuningFile):
        import_file(file, str(tmp_path))
    assert Database(tmp_path).all() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "something else"}, "something else"),
        ({"schema": SCHEMA + 1}, f"its schema is {SCHEMA + 1}"),
        ({"schema": None}, "its schema is None"),
        ({"records": 7}, "no list of records"),
        ({"records": []}, "0 of its 0 records"),
        ({"records": [{"id": "x"}]}, "1 of its 1 records"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(
    tmp_path: Path, exported: bytes, change: dict[str, object], why: str
) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(sealed({**json.loads(exported)["value"], **change}))
    with pytest.raises(BadTuningFile, match=why):
        import_file(file, str(tmp_path))


def test_there_must_be_something_to_export(tmp_path: Path) -> None:
    here, _, file = folders(tmp_path)
    Database(here).save(a_record(0, hardware="cpu/other/avx2/64c"))
    with pytest.raises(InputError, match=r"nothing to export.*run sparsec tune MODEL first"):
        export_file(file, str(here))
    assert not file.exists()


def test_an_export_to_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, _, file = folders(tmp_path)
    Database(here).save(a_record())
    file.write_text("old")

    def no_room(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparsec.cache.os.replace", no_room)
    with pytest.raises(WriteFailed, match="No space left"):
        export_file(file, str(here))
    assert file.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "there", "tuned.json"]


def test_gpus_of_other_machines_are_no_fingerprint_of_this_one() -> None:
    found = fingerprints()
    assert found[0] == HERE
    assert targets.resolve("cpu:portable").fingerprint in found
    assert len(found) == len(set(found))
    assert not any(mark.startswith("cuda/B200") for mark in found)
    assert not any("made-up" in mark for mark in found)


def test_the_command_moves_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there, file = folders(tmp_path)
    Database(here).save(*[a_record(i) for i in range(3)])
    assert cli.run(["tune", "--export", str(file), "--cache-dir", str(here)]) == 0
    assert capsys.readouterr().out.startswith(f"exported 3 measurements of {HERE} to {file}")
    assert cli.run(["tune", "--import", str(file), "--cache-dir", str(there)]) == 0
    assert capsys.readouterr().out == f"imported 3 measurements from {file}\n"
    again = ["tune", "--import", str(file), "--export", str(tmp_path / "b.json"), "--cache-dir", str(there), "--json"]
    assert cli.run(again) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["imported"][0]["left"], told["exported"]["records"]) == (3, 3)
    assert (tmp_path / "b.json").read_bytes() == file.read_bytes()
    assert cli.run(["tune", "--import", str(tmp_path / "none.json"), "--cache-dir", str(there)]) == 2
    assert "none.json: No such file" in capsys.readouterr().err


def test_records_are_sorted_so_that_equal_databases_export_equal_files(tmp_path: Path) -> None:
    here, there, file = folders(tmp_path)
    records = [dataclasses.replace(a_record(i), when=float(i)) for i in range(20)]
    Database(here).save(*records)
    Database(there).save(*reversed(records))
    export_file(file, str(here))
    export_file(tmp_path / "b.json", str(there))
    assert file.read_bytes() == (tmp_path / "b.json").read_bytes()
