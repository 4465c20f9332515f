"""``sparsec bench --calibration``: what the cost model predicted against what was measured, per kernel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sparsec import cli, targets
from sparsec.model_error import errors_by_kernel, table
from sparsec.timing import Ratio
from sparsec.tune_db import Database
from sparsec.tune_record import Key, Record

HERE = targets.resolve("auto").fingerprint


def a_record(m: int, ours: tuple[float, float], dense: tuple[float, float], format: str = "bitmap+fp32") -> Record:
    """``ours``, ``dense``: predicted and measured seconds."""
    key = Key(HERE, "2.13", 2, "text", format, "dot", "fp32", 96, 64, 8, m, True)
    gain = dense[1] / ours[1]
    return Record(key, Ratio(gain, gain, gain), dense[1], ours[1], 15, 100.0, "quick", False, dense[0], ours[0])


def test_errors_are_medians_and_worst_of_each_kernel() -> None:
    records = [
        a_record(1, (1.1, 1.0), (2.0, 2.0)),
        a_record(2, (0.5, 1.0), (2.0, 2.0)),
        a_record(4, (1.2, 1.0), (2.0, 4.0)),
        a_record(8, (3.0, 1.0), (3.0, 1.0), "index+fp32"),
    ]
    dense, bitmap, index = errors_by_kernel(records)
    assert (dense.kernel, dense.count, dense.speedup) == ("dense", 4, None)
    assert dense.seconds.worst == pytest.approx(2.0)
    assert (bitmap.kernel, bitmap.dtype, bitmap.count) == ("bitmap+fp32/dot", "fp32", 3)
    assert bitmap.seconds.median == pytest.approx(0.2)
    assert bitmap.seconds.worst == pytest.approx(-0.5)
    assert bitmap.seconds.where == "96x64 M=2 80% zero"
    assert bitmap.speedup is not None
    assert bitmap.speedup.worst == pytest.approx(2 / 1.2 / 4 - 1)  # half of dense's time, 1.2 of ours
    assert index.speedup is not None
    assert index.speedup.worst == pytest.approx(0.0)
    lines = table([dense, bitmap, index]).splitlines()
    assert len(lines) == 4
    assert "-50 %" in lines[2]


def test_of_the_configurations_of_a_kernel_the_fastest_is_compared() -> None:
    slow, fast = a_record(1, (1.0, 4.0), (2.0, 2.0)), a_record(1, (1.0, 1.0), (2.0, 2.0))
    both = [
        dataclasses.replace(r, key=dataclasses.replace(r.key, loop=f"dot@x={i}")) for i, r in ((1, slow), (2, fast))
    ]
    _, kernel = errors_by_kernel(both)
    assert (kernel.count, kernel.seconds.worst) == (1, pytest.approx(0.0))


def test_records_without_a_prediction_are_not_counted() -> None:
    unknown = dataclasses.replace(a_record(1, (1.0, 1.0), (2.0, 2.0)), model_s=0.0, model_dense_s=0.0)
    assert errors_by_kernel([unknown]) == ()


def test_without_a_model_all_that_this_machine_knows_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path))
    other = a_record(1, (9.0, 1.0), (1.0, 1.0))
    other = dataclasses.replace(other, key=dataclasses.replace(other.key, hardware="cpu/other/avx2/64c"))
    Database(tmp_path).save(a_record(1, (1.5, 1.0), (2.0, 2.0)), other)
    assert cli.run(["bench", "--calibration"]) == 0
    out = capsys.readouterr().out
    assert "bitmap+fp32/dot" in out
    assert "1 measurements" in out
    assert cli.run(["bench", "--calibration", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["kernels"]
    assert [(r["kernel"], r["count"]) for r in rows] == [("dense", 1), ("bitmap+fp32/dot", 1)]
    assert rows[1]["seconds"]["worst"] == pytest.approx(0.5)


def test_with_nothing_measured_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path))
    assert cli.run(["bench", "--calibration"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "give a model" in err
