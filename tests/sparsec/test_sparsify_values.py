"""Recipes that end with a value step, as the report, its page and the dry run show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec import forecast as forecast_module
from sparsec import sparsify
from sparsec.forecast import forecast, forecast_table
from sparsec.sparsify import prepare
from sparsec.sparsify_outcome import Outcome, Wanted, sparsify_outcome
from sparsec.sparsify_report import PrunedLayer, Report
from sparsec.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::sparsec.errors.SparsecWarning")
RTN = {"method": "rtn", "bits": 4, "group": 64}
RECIPE = ["wanda", RTN]
TEXT = "the quick brown fox jumps over the lazy dog and reads " * 400


def tokens() -> list[torch.Tensor]:
    return [torch.arange(i, i + 24)[None] for i in range(4)]


@pytest.fixture(scope="module")
def report() -> Report:
    return sparsify(tiny_model("tiny:llama").model, RECIPE, tokens(), progress=False)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    wanted = Wanted(accuracy=False, speed=False)
    return sparsify_outcome(tiny_model("tiny:llama").model, RECIPE, tokens(), wanted=wanted, progress=False)


def test_the_table_has_a_step_column_and_says_what_values_became(report: Report) -> None:
    lines = str(report).splitlines()
    head = next(line for line in lines if line.startswith("layer "))
    assert head.split() == ["layer", "shape", "step", "pattern", "asked", "zero", "error", "output"]
    rounded = [line for line in lines if "2 rtn" in line]
    assert rounded
    assert all("int4, group 64" in line and line.endswith("-") for line in rounded)
    assert all("0.0%" not in line.replace("50.0%", "") for line in rounded)
    assert any("1 wanda" in line and "50.0%" in line for line in lines)


def test_a_recipe_of_one_step_has_no_step_column() -> None:
    head = str(sparsify(tiny_model("tiny:llama").model, "magnitude", progress=False)).splitlines()[2]
    assert head.split() == ["layer", "shape", "pattern", "asked", "zero", "error"]


def test_an_output_error_that_was_not_measured_is_none(report: Report) -> None:
    for layer in report.layers:
        assert (layer.output_error is None) == (layer.method == "rtn")
        assert layer.values == ("int4, group 64" if layer.method == "rtn" else "")
        assert PrunedLayer.from_dict(layer.to_dict()) == layer


def test_the_page_counts_each_layer_once_and_shows_the_bits(outcome: Outcome) -> None:
    page = outcome.to_html()
    assert "14 layers, 2 steps each after each" not in page
    assert "28 layers" not in page
    assert "14 layers, 2 steps" in page
    assert "int4, group 64" in page


def test_the_dry_run_counts_each_layer_once_and_shows_the_bits() -> None:
    model = tiny_model("tiny:llama").model
    said = forecast(prepare(model, RECIPE), 1024)
    once = forecast(prepare(model, "wanda"), 1024)
    assert said["weights"] == once["weights"]
    row = next(line for line in forecast_table(said) if "2 rtn" in line)
    assert "int4, group 64" in row
    assert row.endswith("-")


def test_the_dry_run_says_what_does_not_divide() -> None:
    model = tiny_model("tiny:llama").model
    lines = forecast_table(forecast(prepare(model, {"method": "magnitude", "pattern": "3:7"})))
    assert any(line.startswith("note: ") and "are not a multiple of 7" in line for line in lines)
    lines = forecast_table(forecast(prepare(model, [{"method": "magnitude"}, {**RTN, "group": 48}])))
    notes = [line for line in lines if "are not a multiple of group 48: the last 16 have their own scale" in line]
    assert len(notes) == len({*notes}) > 0


def test_the_forecast_takes_the_least_of_several_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls = 0

    def clock() -> float:
        return now

    def busy(*args: Any) -> None:
        nonlocal now, calls
        calls += 1
        now += 100.0 if calls % 3 else 1.0

    monkeypatch.setattr(forecast_module.time, "perf_counter", clock)
    monkeypatch.setattr(forecast_module, "prune", busy)
    jobs = prepare(tiny_model("tiny:llama").model, "magnitude").jobs
    size = max(job.layer.weight.numel() for _, job in jobs)
    assert forecast_module._rates(jobs).choice == pytest.approx(1.0 / size)


def test_the_forecast_of_a_run_is_that_of_its_own_data_and_memory(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = {"method": "wanda", "calibration": {"samples": 4, "seqlen": 32}}
    wanted = Wanted(accuracy=False, speed=False)
    made = {}
    for memory in (4 << 30, 1):
        model = tiny_model("tiny:llama").model
        made[memory] = sparsify_outcome(
            model, recipe, tmp_path / "text.txt", wanted=wanted, progress=False, max_memory=memory
        ).memory.forecast
        assert made[memory] == forecast(prepare(model, recipe), 4 * 32, memory)["scratch_bytes"]
    assert made[1] < made[4 << 30] < forecast(prepare(model, recipe), 128 * 2048)["scratch_bytes"]


def test_a_graph_that_could_not_be_captured_is_not_called_empty(outcome: Outcome) -> None:
    from dataclasses import replace

    from sparsec.explain import explain
    from sparsec.sparsify_pages import speed_sentences

    speed = explain(torch.nn.Linear(64, 64), (torch.ones(1, 64),))
    failed = replace(speed, layers=(), failures=("capture failed: a branch on data",))
    assert list(speed_sentences(failed)) == ["the model's graph could not be read: capture failed: a branch on data"]
