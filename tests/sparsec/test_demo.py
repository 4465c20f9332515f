"""The demo on small models: the same code path as on MiniLM, with every number checked but the times."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.demo import Settings, path_taken, prune, run_demo, share_of_zeros
from sparsec.demo_models import cosine, load_encoder, mean_pooled, wide_case, wide_stack
from sparsec.demo_report import cells, halves, notes_of, render_html, write_report
from sparsec.errors import BadModelFile, ModelNotFound

pytest.importorskip("transformers")

SMALL = {"model": "tiny:bert", "sparsities": (0.0, 0.8), "cases": 1, "rounds": 5, "budget_s": 0.5}
SMALL_WIDE = {"blocks": 1, "hidden": 256, "inner": 512}


@pytest.fixture(scope="module")
def ticks() -> list[tuple[int, int, str]]:
    return []


@pytest.fixture(scope="module")
def report(ticks: list[tuple[int, int, str]]) -> dict[str, Any]:
    settings = Settings(**SMALL, **SMALL_WIDE, options={"min_speedup": 0.0})
    return run_demo(settings, lambda done, total, what: ticks.append((done, total, what)))


def test_each_half_has_a_row_for_each_density(report: dict[str, Any]) -> None:
    assert [title.split()[0] for title, _ in halves(report)] == ["Encoder", "Wide"]
    for _, half in halves(report):
        assert [row["sparsity"] for row in half["rows"]] == [0.0, 0.8]
        assert half["rows"][0]["zeros"] < 0.01
        assert half["rows"][1]["zeros"] == pytest.approx(0.8, abs=0.01)


def test_rows_hold_positive_times_and_an_interval_around_the_ratio(report: dict[str, Any]) -> None:
    for _, half in halves(report):
        for row in half["rows"]:
            assert 0 < row["inductor_ms"]["best"] <= row["inductor_ms"]["median"] <= row["inductor_ms"]["p90"]
            assert row["ours_ms"]["best"] > 0
            assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]


def test_the_path_names_the_formats_that_ran(report: dict[str, Any]) -> None:
    for _, half in halves(report):
        dense, sparse = half["rows"]
        assert re.fullmatch(
            r"\d+ (dense|panel\S*)(, \d+ (dense|panel\S*))?", dense["path"]
        )  # no sparse format where nothing is zero
        assert "bitmap" in sparse["path"] or "index" in sparse["path"]


def test_compiled_embeddings_equal_those_of_the_masked_dense_model(report: dict[str, Any]) -> None:
    for entry in report["encoder"]["quality"]:
        assert entry["to_masked"]["min"] > 0.99999
    assert report["encoder"]["quality"][0]["to_dense"]["min"] > 0.99999
    assert report["encoder"]["quality"][1]["to_dense"]["mean"] < 0.9999  # pruning was not free, and it shows
    for entry in report["wide"]["quality"]:
        assert entry["to_masked"]["min"] > 0.999  # bf16


def test_the_explain_table_is_in_the_report(report: dict[str, Any]) -> None:
    for _, half in halves(report):
        assert half["explain"]["sparsity"] == 0.8
        assert half["explain"]["data"]["layers"]
        assert all(layer["reason"] for layer in half["explain"]["data"]["layers"])


def test_progress_only_grows_and_ends_at_its_total(report: dict[str, Any], ticks: list[tuple[int, int, str]]) -> None:
    done = [tick[0] for tick in ticks]
    assert done == sorted(done)
    assert ticks[-1][0] == ticks[-1][1]
    assert len({total for _, total, _ in ticks}) == 1


def test_the_folder_holds_data_picture_and_one_page_without_network(report: dict[str, Any], tmp_path: Path) -> None:
    written = write_report(report, tmp_path / "out")
    assert [path.name for path in written][::2] == ["report.json", "index.html"]
    if importlib.util.find_spec("matplotlib"):
        assert written[1].read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'src="https?:|<link [^>]*href|@import', page)
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)
    assert len(blocks) == 1
    assert json.loads(blocks[0]) == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert cells(report["wide"]["rows"][1])[4] in page


def test_a_name_cannot_break_out_of_the_page(report: dict[str, Any]) -> None:
    evil = {**report, "notes": ["</script><b>x"]}
    page = render_html(evil, None)
    assert "</script><b>" not in page
    assert notes_of(evil)[0] == "</script><b>x"


def test_magnitude_masks_nest_so_pruning_twice_equals_pruning_once() -> None:
    once, twice = load_encoder("tiny:bert").model, load_encoder("tiny:bert").model
    prune(once, 0.8)
    for sparsity in (0.5, 0.8):
        prune(twice, sparsity)
    assert share_of_zeros(once) == share_of_zeros(twice)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mean_pooling_ignores_padding() -> None:
    encoder = load_encoder("tiny:bert")
    inputs = encoder.tokenized(["a"], 8)
    inputs["attention_mask"][0, 5:] = 0
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 5:] = 3
    with torch.inference_mode():
        same = cosine(mean_pooled(encoder.model, inputs), mean_pooled(encoder.model, changed))
    assert same["min"] == pytest.approx(1.0, abs=1e-6)


def test_a_causal_model_is_used_without_its_head() -> None:
    model = load_encoder("tiny:llama").model
    assert not any("lm_head" in name for name, _ in model.named_modules())


def test_the_wide_stack_keeps_the_size_of_its_activations() -> None:
    stack, case = wide_stack(2, 256, 512), wide_case(256)
    with torch.inference_mode():
        out = stack(**case.inputs).float()
    assert out.shape == (1, 1, 256)
    assert 0.5 < float(out.square().mean().sqrt()) < 5.0
    assert all(math.isfinite(v) for v in out.flatten().tolist())


def test_a_vision_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(BadModelFile, match="sparsec bench"):
        load_encoder("tiny:vit")


def test_a_missing_model_raises() -> None:
    with pytest.raises(ModelNotFound):
        run_demo(Settings(model="./no/such/folder", wide=False))


def test_nothing_recorded_reads_as_not_compiled() -> None:
    assert path_taken([], 1) == "not compiled by sparsec"


def run_command(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsec", "demo", "--quick", "--model", "tiny:bert", "--no-wide", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})})


def test_without_a_compiler_the_demo_says_that_dense_ran_and_why(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "CXX": "", "SPARSEC_CACHE_DIR": str(tmp_path / "c")}
    nowhere["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "i")
    done = run_command("-o", str(tmp_path / "out"), env=nowhere)
    assert done.returncode == 0, done.stderr
    assert re.search(r"note: .*dense.*compiler", done.stdout, re.S)
    assert "Next: sparsec" in done.stdout
    assert (tmp_path / "out" / "index.html").exists()


def test_json_output_is_only_json(tmp_path: Path) -> None:
    done = run_command("--json", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["encoder"]["rows"]
    assert "\x1b" not in done.stderr


def test_a_wrong_model_is_one_sentence_and_exit_code_two(tmp_path: Path) -> None:
    done = run_command("--model", str(tmp_path), "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
