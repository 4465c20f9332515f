"""What is measured around ``sparsify``: the same weights as without, one model in memory, windows calibration left."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsec import sparsify
from sparsec.calibration import calibrate, segments_of
from sparsec.cli import run as command_line
from sparsec.errors import InputError, UnreadableCalibration
from sparsec.evaluate import compare_windows, evaluate, read_windows, text_windows
from sparsec.models import LoadedModel
from sparsec.recipe import Calibration
from sparsec.sparsify_outcome import Outcome, Wanted, as_loaded, sparsify_outcome, spread
from sparsec.svg import Band, Series, nice, plot
from sparsec.tiny import tiny_model

TEXT = "\n".join(f"Line {i}: the {i * 7919 % 1009}th word of {i * i % 997} others." for i in range(900))
SMALL = {"samples": 6, "seqlen": 64}
pytestmark = pytest.mark.filterwarnings("ignore::sparsec.errors.SparsecWarning")


def wanda(**more: Any) -> dict[str, Any]:
    return {"method": "wanda", "pattern": "2:4", "calibration": SMALL, **more}


def text_file(folder: Path, text: str = TEXT, name: str = "text.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A small causal model pruned with everything looked at."""
    data = text_file(tmp_path_factory.mktemp("text"))
    return sparsify_outcome(tiny_model("tiny:llama").model, wanda(), data, progress=False)


# --------------------------------------------------------------------------------------------------------- what is done


def test_the_weights_are_the_same_bits_as_without_any_measuring(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    plain, looked = tiny_model("tiny:llama").model, tiny_model("tiny:llama").model
    report = sparsify(plain, wanda(), data, progress=False)
    found = sparsify_outcome(looked, wanda(), data, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(looked).values(), strict=True))
    assert found.report.layers == report.layers
    assert found.report.recipe == report.recipe
    assert not any(module.training for module in looked.modules())


def test_accuracy_is_what_evaluate_says_of_two_models_side_by_side(tmp_path: Path) -> None:
    loaded, dense = tiny_model("tiny:llama"), tiny_model("tiny:llama")
    text = text_file(tmp_path)
    found = sparsify_outcome(
        loaded.model, "magnitude", wanted=Wanted(text=text, windows=1000, speed=False), progress=False
    )
    both = evaluate(loaded, dense, TEXT, ["ppl"])
    assert found.accuracy is not None
    expected = both.results[0]
    assert found.accuracy.result.n == expected.n == len(found.accuracy.differences)
    for key in ("value", "dense", "delta"):
        assert getattr(found.accuracy.result, key) == pytest.approx(getattr(expected, key), rel=1e-5)
    assert found.accuracy.result.interval == pytest.approx(expected.interval, rel=1e-4)
    assert sum(found.accuracy.differences) / expected.n == pytest.approx(expected.delta, rel=1e-4)


def test_no_copy_of_the_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    real = copy.deepcopy

    def watched(value: Any, *rest: Any) -> Any:
        copied.extend([value] if isinstance(value, nn.Linear) else [])
        return real(value, *rest)

    monkeypatch.setattr(copy, "deepcopy", watched)
    model = tiny_model("tiny:llama").model
    found = sparsify_outcome(model, "magnitude", wanted=Wanted(text=text_file(tmp_path), speed=False), progress=False)
    assert found.accuracy is not None
    assert not copied


def test_a_reading_of_a_causal_model_is_one_number_a_window() -> None:
    loaded = tiny_model("tiny:llama")
    windows = text_windows(loaded, TEXT, window=64, limit=5)
    assert read_windows(loaded, windows, batch=2).shape == (5,)
    bert = tiny_model("tiny:bert")
    assert read_windows(bert, windows, batch=2).shape == (5, bert.config.hidden_size)


# ------------------------------------------------------------------------------------------------------------ the text


def test_what_calibration_leaves_shares_no_segment_with_what_it_takes(tmp_path: Path) -> None:
    data, model = text_file(tmp_path), tiny_model("tiny:llama").model
    settings = Calibration(samples=6, seqlen=64)
    drawn = segments_of(data, settings, model)
    assert drawn is not None
    taken = [sample["input_ids"][0].tolist() for sample in calibrate(data, settings, model).samples]
    assert taken == drawn.segments
    assert len(drawn.rest) == len(TEXT.encode()) // 64 - len(taken)
    assert not {tuple(ids) for ids in taken} & {tuple(ids) for ids in drawn.rest}


def test_accuracy_is_measured_on_text_that_calibration_did_not_see(outcome: Outcome) -> None:
    assert outcome.accuracy is not None
    assert "parts that calibration did not see" in outcome.accuracy.text
    assert outcome.accuracy.tokens == 64 * outcome.accuracy.result.n  # segments of 64 are windows of 64


def test_a_segment_longer_than_a_window_is_cut_into_windows(tmp_path: Path) -> None:
    data, recipe = text_file(tmp_path), wanda(calibration={"samples": 3, "seqlen": 512})
    wanted = Wanted(speed=False, windows=10**6)
    found = sparsify_outcome(tiny_model("tiny:llama").model, recipe, data, wanted=wanted, progress=False)
    assert found.accuracy is not None
    assert found.accuracy.result.n == 2 * (len(TEXT.encode()) // 512 - 3)
    assert found.accuracy.tokens == 256 * found.accuracy.result.n


def test_text_that_calibration_used_up_is_a_sentence_and_not_a_number(tmp_path: Path) -> None:
    data, wanted = text_file(tmp_path, TEXT[:400]), Wanted(speed=False)
    found = sparsify_outcome(tiny_model("tiny:llama").model, wanda(), data, wanted=wanted, progress=False)
    assert found.accuracy is None
    assert any("calibration used all of its text" in note for note in found.notes)


def test_a_method_without_data_is_measured_on_the_text_it_did_not_need(tmp_path: Path) -> None:
    recipe = {"method": "magnitude", "calibration": {"dataset": str(text_file(tmp_path))}}
    found = sparsify_outcome(tiny_model("tiny:llama").model, recipe, wanted=Wanted(speed=False), progress=False)
    assert found.accuracy is not None
    assert found.accuracy.result.n == 64
    assert "did not see" not in found.accuracy.text


@pytest.mark.parametrize("data", [None, [torch.arange(64).reshape(1, 64)] * 8], ids=["nothing", "tensors"])
def test_without_text_accuracy_is_a_sentence(data: Any) -> None:
    method = "magnitude" if data is None else "wanda"
    found = sparsify_outcome(tiny_model("tiny:llama").model, method, data, wanted=Wanted(speed=False), progress=False)
    assert found.accuracy is None
    assert any(note.startswith("accuracy was not measured") and "--eval-text" in note for note in found.notes)


def test_an_evaluation_text_that_is_not_there_is_refused_before_anything_is_pruned(tmp_path: Path) -> None:
    model = tiny_model("tiny:llama").model
    before = weights(model)
    with pytest.raises(UnreadableCalibration, match="no such file"):
        sparsify_outcome(model, "magnitude", wanted=Wanted(text=tmp_path / "none.txt"), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(model).values(), strict=True))


@given(st.lists(st.lists(st.integers(), max_size=2), max_size=40), st.integers(1, 50))
def test_windows_are_spread_in_order_over_the_whole_text(windows: list[list[int]], most: int) -> None:
    windows = [[i, *ids] for i, ids in enumerate(windows)]
    found = spread(windows, most)
    assert len(found) == min(most, len(windows))
    assert found == sorted(found)
    assert len({ids[0] for ids in found}) == len(found)


# ----------------------------------------------------------------------------------------------- other kinds of models


def test_an_encoder_is_compared_by_its_embeddings(tmp_path: Path) -> None:
    paragraphs = "\n\n".join(TEXT.splitlines()[:40])
    loaded, wanted = tiny_model("tiny:bert"), Wanted(text=text_file(tmp_path, paragraphs), windows=30)
    found = sparsify_outcome(loaded.model, {"method": "magnitude", "sparsity": 0.8}, wanted=wanted, progress=False)
    assert found.accuracy is not None
    assert found.accuracy.result.task == "similarity"
    assert found.accuracy.result.n == 30
    assert found.accuracy.result.value < 1.0
    assert found.accuracy.result.verdict == "worse"
    assert found.speed is not None
    assert "similarity to the dense model's embeddings" in str(found)


def test_a_plain_module_is_explained_by_the_first_of_its_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    data = [torch.randn(4, 64) for _ in range(200)]
    found = sparsify_outcome(model, "wanda", data, progress=False)
    assert found.accuracy is None
    assert any("Sequential takes no text" in note for note in found.notes)
    assert found.speed is not None
    assert {layer.name for layer in found.speed.layers} == {"0", "2"}


def test_a_plain_module_without_an_example_says_why_it_is_not_explained() -> None:
    found = sparsify_outcome(nn.Sequential(nn.Linear(8, 8)), "magnitude", progress=False)
    assert found.speed is None
    assert any(note.startswith("speed was not measured") for note in found.notes)
    assert "peak" in str(found)


def test_a_model_that_pools_by_itself_is_read_as_it_answers() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("tiny:bert").model
            self.config = self.inner.config

        def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.inner(**inputs)[0][:, 0],)

    loaded = as_loaded(Pools())
    assert loaded.kind == "encoder"
    assert read_windows(loaded, [[1, 2, 3], [4, 5]]).shape == (2, 64)


def test_outputs_that_are_not_finite_are_refused_by_name() -> None:
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    with pytest.raises(InputError, match="not finite"):
        compare_windows(good, bad)
    with pytest.raises(InputError, match="not finite"):
        compare_windows(torch.ones(2, 3), torch.full((2, 3), float("inf")))


def test_a_model_that_breaks_when_read_is_still_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no forward today\nand a long trace")

    monkeypatch.setattr("sparsec.evaluate.read_windows", broken)
    model, wanted = tiny_model("tiny:llama").model, Wanted(text=text_file(tmp_path), speed=False)
    found = sparsify_outcome(model, "magnitude", wanted=wanted, progress=False)
    assert found.report.achieved == pytest.approx(0.5, abs=1e-3)
    assert found.notes == ("accuracy was not measured: RuntimeError: no forward today",)


# ------------------------------------------------------------------------------------------------ what the user is told


def test_the_dict_is_json_and_holds_the_plain_report(outcome: Outcome) -> None:
    body = outcome.to_dict()
    assert json.loads(json.dumps(body)) == body
    assert {k: body[k] for k in outcome.report.to_dict()} == outcome.report.to_dict()
    speed = body["speed"]
    assert {layer["name"] for layer in body["layers"]} <= {layer["name"] for layer in speed["layers"]}
    for layer in speed["layers"]:
        assert layer["expected"]["speedup"] == pytest.approx(
            layer["expected"]["dense_s"] / layer["expected"]["ours_s"], rel=1e-2
        )
    pruned = [layer for layer in speed["layers"] if "proj" in layer["name"]]
    assert {layer["pattern"] for layer in pruned} == {"2:4"}
    assert speed["bytes"]["ours"] <= speed["bytes"]["dense"]
    memory = body["memory"]
    assert memory["model"] < memory["before"] <= memory["pruned"] <= memory["peak"]
    assert memory["forecast"] > 0


def test_layers_that_run_dense_in_panels_are_not_counted_as_sparse(outcome: Outcome) -> None:
    from sparsec.report_text import ways

    assert outcome.speed is not None
    layers = [
        replace(layer, at=tuple(replace(at, decision=runs) for at in layer.at))
        for layer, runs in zip(outcome.speed.layers, ("panel+fp32", "nm:2:4+fp32", "dense"), strict=False)
    ]
    assert ways(replace(outcome.speed, layers=tuple(layers))) == (1, 1)


def test_the_text_names_accuracy_speed_bytes_and_memory(outcome: Outcome) -> None:
    lines = str(outcome).splitlines()
    for word in ("accuracy  perplexity", "speed     expected", "weights   ", "memory    peak"):
        assert any(line.startswith(word) for line in lines), word
    assert "95 % interval" in str(outcome)
    assert "forecast" in str(outcome)


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", page, flags=re.S)]


def test_the_page_loads_nothing_and_shows_every_layer_and_window(outcome: Outcome) -> None:
    page = outcome.to_html()
    assert not re.search(r"""(src|href)=["'](?!#)|url\(|@import""", page)
    windows, losses = svgs(page)
    assert outcome.accuracy is not None
    assert len(windows.findall("circle")) == outcome.accuracy.result.n
    assert len(losses.findall("circle")) == 2 * len(outcome.report.layers)
    for layer in outcome.report.layers:
        assert f">{layer.name}<" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    assert data is not None
    assert json.loads(data[1]) == outcome.to_dict()
    legend = page.split('id="time"')[1].split('class="legend"')[1].split("</div>")[0]
    assert set(re.findall(r'class="seg (\w+)"', page)) == set(re.findall(r'<span class="(\w+)">', legend))
    places = set(re.findall(r'id="(row-\d+)"', page))
    assert set(re.findall(r'href="#(row-\d+)"', page)) <= places


def test_names_are_escaped_on_the_page(outcome: Outcome) -> None:
    evil = "</script><script>alert(1)</script>"
    layers = tuple(replace(layer, name=evil) for layer in outcome.report.layers)
    page = replace(outcome, model=evil, report=replace(outcome.report, layers=layers), notes=(evil,)).to_html()
    assert "<script>alert" not in page
    assert page.count("</script>") == 1


def test_a_page_without_accuracy_and_speed_still_says_what_was_pruned(outcome: Outcome) -> None:
    page = replace(outcome, accuracy=None, speed=None, notes=("there was nothing to see",)).to_html()
    assert "there was nothing to see." in page
    assert 'id="accuracy"' not in page
    assert 'id="time"' not in page
    assert len(svgs(page)) == 1


# ------------------------------------------------------------------------------------------------------------- plots


@given(st.floats(-1e9, 0, allow_subnormal=False), st.floats(0, 1e9, allow_subnormal=False))
def test_ticks_are_few_and_hold_all_values(low: float, high: float) -> None:
    ticks = nice(low, high)
    assert 2 <= len(ticks) <= 7
    slack = 1e-6 * max(high - low, 1e-300)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert ticks == sorted(ticks)


def test_a_plot_leaves_out_what_is_not_finite_and_escapes_names() -> None:
    series = Series("a & b", "nm", [1.0, None, float("nan"), 2.0])
    picture = ElementTree.fromstring(plot([series], ["<x>", "b", "c", "d"], str, band=Band(1.0, 0.5, 1.5)))
    titles = [title.text for title in picture.iter("title")]
    assert titles == ["<x>: a & b 1.0", "d: a & b 2.0"]


# ------------------------------------------------------------------------------------------------------ command line


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = command_line(["sparsify", "tiny:llama", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_saves_its_report_as_json_and_as_a_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--method", "wanda", "--pattern", "2:4", "--data", str(text_file(tmp_path)), "-o", str(tmp_path / "out")]
    settings = ["--calibration", json.dumps(SMALL), "--eval-text", str(text_file(tmp_path, name="other.txt"))]
    code, out, _ = said(capsys, *words, *settings, "--eval-windows", "9", "--json")
    assert code == 0
    printed: Mapping[str, Any] = json.loads(out)
    saved = json.loads((tmp_path / "out" / "sparsec_report.json").read_text())
    assert {**saved, "output": str(tmp_path / "out")} == printed
    assert printed["accuracy"]["result"]["n"] == 9
    assert "other.txt" in printed["accuracy"]["text"]
    assert printed["speed"]["total"] is None
    page = (tmp_path / "out" / "sparsec_report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "sparsec_report" not in (tmp_path / "out" / "sparsec.json").read_text()
    code, out, _ = said(capsys, *words, *settings, "--no-eval", "--no-explain")  # the same recipe: replaced
    assert code == 0
    assert "accuracy" not in out
    assert "speed" not in out
    assert "memory    peak" in out
    assert json.loads((tmp_path / "out" / "sparsec_report.json").read_text())["speed"] is None


def test_a_wrong_evaluation_text_is_one_sentence_and_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out_folder = tmp_path / "out"
    code, out, err = said(capsys, "--method", "magnitude", "--eval-text", "none.txt", "-o", str(out_folder))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "none.txt" in err
    assert not out_folder.exists()


def test_measured_speed_is_beside_the_predicted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    wanted = Wanted(accuracy=False, measure=True)
    found = sparsify_outcome(model, "magnitude", example=torch.randn(1, 256), wanted=wanted, progress=False)
    assert found.speed is not None
    body = found.to_dict()["speed"]
    assert body["linear_layers"][0]["measured"]["speedup"] > 0
    assert all(layer["measured"] and layer["expected"] for layer in body["layers"])
    assert body["total"] is not None or any("could not be measured" in note for note in body["notes"])
    assert ">measured</th>" in found.to_html()


def test_a_loaded_model_keeps_its_kind(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "bert", "vit"):
        made = tiny_model(f"tiny:{name}")
        held: LoadedModel = as_loaded(made.model)
        assert held.kind == made.kind
