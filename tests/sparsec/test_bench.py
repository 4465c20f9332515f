"""sparsec bench: what flags mean, what records say, the five formats, comparing two runs, one real run."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsec import cli
from sparsec.bench import BenchRecord, BenchRequest, bench, parse_numbers, summary
from sparsec.bench_output import FORMATS, ratios, read_records, render
from sparsec.bench_worker import cases_of
from sparsec.errors import BadModelFile, BadOptionValue, InputError, ModelNotFound
from sparsec.models import load_model


def record(backend: str = "sparsec", test: str = "pp16", rate: float = 200.0, **changes: object) -> BenchRecord:
    made = BenchRecord(
        sparsec_version="0.1.0",
        build_commit="abc1234",
        torch_version="2.13.0",
        cpu_info="Some 'CPU' | 2",
        isa="avx2",
        model_filename="models/tiny",
        model_type="llama causal",
        model_size=3 * 2**20,
        model_n_params=1_500_000,
        zeros=0.5,
        dtype="bf16",
        backend=backend,
        n_threads=2,
        n_batch=1,
        n_prompt=16,
        n_gen=0,
        test=test,
        unit="tokens",
        test_time="2026-01-01T00:00:00+00:00",
        avg_ns=16e9 / rate,
        stddev_ns=1e6,
        avg_ts=rate,
        stddev_ts=2.5,
        speedup=1.5,
        speedup_low=1.4,
        speedup_high=1.625,
        path="bitmap 24, dense 13",
        difference=1e-6,
        samples_ns=(8e7, 8e7),
        samples_ts=(rate, rate),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


TWO = [record("inductor", speedup=1.0, speedup_low=1.0, speedup_high=1.0, path="as it is"), record(rate=300.0)]


@pytest.mark.parametrize(
    ("said", "numbers"),
    [
        (["512"], (512,)),
        (["1,4"], (1, 4)),
        (["1", "2,3"], (1, 2, 3)),
        (["1-4"], (1, 2, 3, 4)),
        (["1-16*2"], (1, 2, 4, 8, 16)),
        (["10-25+5"], (10, 15, 20, 25)),
        (["10-24+5"], (10, 15, 20)),
        (["4,1-4"], (4, 1, 2, 3)),
    ],
)
def test_numbers_are_read_as_llama_bench_reads_them(said: list[str], numbers: tuple[int, ...]) -> None:
    assert parse_numbers("-p", said) == numbers


@pytest.mark.parametrize("text", ["", "x", "1,", "4-1", "1-4*1", "1-4+0", "0-8*2", "-3", "1.5", "1-999999", "0"])
def test_what_is_no_list_of_numbers_names_the_flag(text: str) -> None:
    with pytest.raises(BadOptionValue, match="'-b'"):
        parse_numbers("-b", [text])


def test_zero_skips_a_test_where_it_may() -> None:
    assert parse_numbers("-n", ["0"], least=0) == (0,)


def test_mean_and_standard_deviation() -> None:
    assert summary([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert summary([4.0]) == (4.0, 0.0)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_has_a_dense_row_and_an_interval() -> None:
    lines = render(TWO, "md").splitlines()
    assert len({len(line) for line in lines[:4]}) == 1  # aligned
    assert re.fullmatch(r"\|( :?-+:? \|)+", lines[1])
    header, dense, sparse = cells(lines[0]), cells(lines[2]), cells(lines[3])
    assert len(header) == len(dense) == len(sparse)
    said = dict(zip(header, sparse, strict=True))
    assert said["t/s"] == "300.00 ± 2.50"
    assert said["vs dense"] == "1.50x [1.40, 1.62]"
    assert said["path"] == "bitmap 24, dense 13"
    assert (said["size"], said["params"], said["zeros"]) == ("3.00 MiB", "1.50 M", "50.0 %")
    assert dict(zip(header, dense, strict=True))["backend"] == "inductor (dense)"


def test_json_and_jsonl_read_back_as_they_were(tmp_path: Path) -> None:
    for format in ("json", "jsonl"):
        path = tmp_path / f"run.{format}"
        path.write_text(render(TWO, format))
        assert read_records(path) == TWO


def test_csv_has_one_row_a_record_and_no_lists() -> None:
    rows = list(csv.DictReader(io.StringIO(render(TWO, "csv"))))
    assert [row["backend"] for row in rows] == ["inductor", "sparsec"]
    assert float(rows[1]["avg_ts"]) == 300.0
    assert "samples_ns" not in rows[0]


def test_sql_loads_in_sqlite_and_twice_appends() -> None:
    database = sqlite3.connect(":memory:")
    text = render(TWO, "sql")
    database.executescript(text)
    database.executescript(text)
    assert database.execute("SELECT count(*), max(avg_ts) FROM test").fetchone() == (4, 300.0)
    assert database.execute("SELECT DISTINCT cpu_info FROM test").fetchone() == ("Some 'CPU' | 2",)
    assert database.execute("SELECT typeof(avg_ns), typeof(n_threads) FROM test").fetchone() == ("real", "integer")


def test_an_unknown_format_names_the_five() -> None:
    with pytest.raises(BadOptionValue, match="md, json, jsonl, csv, sql"):
        render(TWO, "xml")


def test_comparing_matches_rows_and_leaves_strangers_out() -> None:
    before = [record(rate=100.0), record(rate=50.0, n_threads=8), record(rate=9.0, test="tg4")]
    now = [record(rate=300.0), record("inductor", rate=200.0)]
    assert ratios(now, before) == {now[0].key: 3.0}
    lines = render(now, "md", before).splitlines()
    column = cells(lines[0]).index("Speedup")
    assert [cells(line)[column] for line in lines[2:4]] == ["3.00x", "-"]
    assert json.loads(render(now, "json", before))[0]["compare_speedup"] == 3.0
    database = sqlite3.connect(":memory:")
    database.executescript(render(now, "sql", before))
    assert database.execute("SELECT compare_speedup FROM test").fetchall() == [(3.0,), (None,)]


@pytest.mark.parametrize("text", ["not json", '{"a": 1}', '[{"avg_ts": 1}]', "[3]"])
def test_a_file_without_records_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"old\.json holds no records"):
        read_records(path)


def test_a_record_of_a_newer_version_is_read_without_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps([{**TWO[0].to_dict(), "added_later": 1}]))
    assert read_records(path) == [TWO[0]]


def request(*models: str, **changes: object) -> BenchRequest:
    made = BenchRequest(models, prompts=(8,), gens=(2,), threads=(1,), rounds=3, options={"min_speedup": 0})
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_run_gives_dense_and_sparse_rows_of_the_same_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[int, int, str]] = []
    found = list(bench(request("tiny:llama@80"), lambda *step: steps.append(step)))
    assert [(r.test, r.backend) for r in found] == [
        ("pp8", "inductor"),
        ("pp8", "sparsec"),
        ("tg2", "inductor"),
        ("tg2", "sparsec"),
    ]
    for r in found:
        assert len(r.samples_ns) == 3
        assert r.avg_ns == pytest.approx(statistics.fmean(r.samples_ns))
        assert r.stddev_ns == pytest.approx(statistics.stdev(r.samples_ns))
        tokens = r.n_batch * (r.n_prompt or r.n_gen)
        assert r.samples_ts == pytest.approx([1e9 * tokens / ns for ns in r.samples_ns])
        assert r.speedup_low <= r.speedup <= r.speedup_high
        assert (r.n_threads, r.dtype, r.model_filename) == (1, "fp32", "tiny:llama@80")
        assert r.difference < 1e-4
        assert not r.notes
    for dense, sparse in (found[:2], found[2:]):
        assert dense.speedup == 1.0
        ratio = sorted(d / s for d, s in zip(dense.samples_ns, sparse.samples_ns, strict=True))[1]
        assert sparse.speedup == pytest.approx(ratio)
        assert sum(int(part.split()[1]) for part in sparse.path.split(", ")) == 15  # 2 x 7 linears and the head
        assert "dense" not in sparse.path
    assert steps[-1][0] == steps[-1][1]
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("tiny:gpt2", ["pp8", "pp16", "tg2", "pp8", "pp16", "tg2"]),
        ("tiny:bert", ["fwd8", "fwd16", "fwd8", "fwd16"]),
        ("tiny:vit", ["fwd", "fwd"]),
    ],
)
def test_the_tests_of_a_model_follow_its_kind(model: str, names: list[str]) -> None:
    loaded = load_model(model)
    tests = cases_of(loaded, {"prompts": [8, 16], "gens": [2], "batches": [1, 3]})
    assert [test.name for test in tests] == names
    assert {test.batch for test in tests} == {1, 3}
    for test in tests:
        per_row = max(test.n_prompt, test.n_gen, 1)
        assert test.units == test.batch * per_row
        out = test.make(loaded.model)()
        assert (out if isinstance(out, torch.Tensor) else out[0]).shape[0] == test.batch


def test_without_p_an_encoder_gets_what_its_context_allows() -> None:
    (test,) = cases_of(load_model("tiny:bert"), {"prompts": None, "gens": [], "batches": [1]})
    assert test.name == "fwd512"


@pytest.mark.parametrize("model", ["tiny:llama", "tiny:gpt2", "tiny:opt", "tiny:mixtral"])
def test_token_by_token_with_the_static_cache_ends_where_one_forward_ends(model: str) -> None:
    loaded = load_model(model)
    (test,) = cases_of(loaded, {"prompts": [0], "gens": [12], "batches": [2]})
    with torch.no_grad():
        expected = loaded.model(**loaded.inputs(2, 12)).logits[:, -1:]
        run = test.make(loaded.model)
        for _ in range(2):  # the second run starts from an empty cache again
            torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)


def test_a_module_from_a_file_is_timed_in_samples_with_the_threads_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the flag must win
    (tmp_path / "own.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(64, 64), torch.ones(1, 64)\n"
    )
    model = f"{tmp_path}/own.py:make"
    found = list(bench(request(model, batches=(3,), threads=(1,), dtype="fp32", options={})))
    assert [(r.test, r.unit, r.n_batch, r.n_threads, r.backend) for r in found] == [
        ("fwd", "samples", 3, 1, "inductor"),
        ("fwd", "samples", 3, 1, "sparsec"),
    ]
    assert found[1].path == "dense 1"  # a weight without zeros


@pytest.mark.parametrize(
    ("model", "changes", "error"),
    [
        ("./nowhere", {}, ModelNotFound),
        ("tiny:llama", {"prompts": (600,)}, BadOptionValue),
        ("tiny:llama", {"gens": (600,)}, BadOptionValue),
        ("tiny:llama", {"prompts": (0,), "gens": (0,)}, BadOptionValue),
        ("tiny:llama", {"dtype": "int3"}, BadOptionValue),
        (__file__, {}, BadModelFile),
    ],
)
def test_what_the_worker_refuses_arrives_as_the_same_error(
    model: str, changes: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        list(bench(request(model, **changes)))


def test_the_command_writes_one_format_to_stdout_and_another_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[BenchRequest] = []
    monkeypatch.setattr("sparsec.bench.bench", lambda request, step: asked.append(request) or iter(TWO))
    words = ["bench", "a", "-m", "b,c", "-p", "1-4*2", "-n", "0", "-b", "1,4", "-t", "1,2", "-r", "7"]
    assert cli.run([*words, "--min_speedup", "0", "--no-warmup", "-o", "jsonl", "-oe", "csv"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["backend"] for line in out.splitlines()] == ["inductor", "sparsec"]
    assert len(list(csv.DictReader(io.StringIO(err)))) == 2
    expected = BenchRequest(
        ("a", "b", "c"), (1, 2, 4), (0,), (1, 4), (1, 2), rounds=7, warmup=False, options={"min_speedup": 0.0}
    )
    assert asked == [expected]


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_compares_with_an_earlier_run(
    format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sparsec.bench.bench", lambda request, step: iter(TWO))
    old = tmp_path / "old.json"
    old.write_text(render([record(rate=100.0)], "json"))
    assert cli.run(["bench", "a", "-o", format, "--compare", str(old)]) == 0
    out = capsys.readouterr().out
    assert ("Speedup" if format == "md" else "compare_speedup") in out
    assert "3.0" in out
