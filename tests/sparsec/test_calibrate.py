"""``sparsec.calibrate``: the counts, where they are kept, what is said of bad data, and what explain makes of them."""

from __future__ import annotations

import json
import math
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec import cli
from sparsec.activation_rates import FOLDER, keep, rate_of
from sparsec.cache import sealed
from sparsec.calibrate import Count, calibrate
from sparsec.errors import InputError, SparsecWarning, TuningNotKept, UnreadableCalibration
from sparsec.facts import Rates
from sparsec.passes.profile.weights import content_key

K = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    return tmp_path / "cache"


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, 32), nn.Linear(K, 32), nn.Linear(32, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(F.relu(self.gate(x)) * self.up(x))
        return y


def data(samples: int = 4, tokens: int = 96) -> list[torch.Tensor]:
    return [torch.randn(1, tokens, K) for _ in range(samples)]


def quietly(model: nn.Module, samples: Any, **said: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        return calibrate(model, samples, **said)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5]), min_size=3, max_size=3), min_size=1, max_size=20),
    cut=st.integers(0, 20),
)
def test_zeros_are_counted_by_channel_and_over_tokens_in_a_row(rows: list[list[float]], cut: int) -> None:
    count = Count(torch.zeros(3, dtype=torch.int64))
    calls = [part for part in (rows[:cut], rows[cut:]) if part]
    for part in calls:
        count.add(torch.tensor(part))
    zero = [[value == 0 for value in row] for row in rows]
    assert count.tokens == len(rows)
    assert count.shares == [sum(column) / len(rows) for column in zip(*zero, strict=True)]
    assert math.isclose(count.zeros, sum(map(sum, zero)) / (3 * len(rows)))
    for m in (2, 4, 8):
        groups = [part[i : i + m] for part in calls for i in range(0, len(part) - m + 1, m)]
        if not groups:
            assert m not in dict(count.rows)
            continue
        common = sum(all(row[k] == 0 for row in group) for group in groups for k in range(3))
        assert math.isclose(dict(count.rows)[m], common / (3 * len(groups)))


def test_the_rate_of_more_rows_is_never_more_than_of_fewer() -> None:
    rates = Rates("k", "relu", 100, 0.8, ((2, 0.7), (8, 0.4)), (1.0, 0.9, 0.5, 0.8))
    assert [rates.at(m) for m in (0, 1, 2, 3, 8)] == [0.8, 0.8, 0.7, 0.4, 0.4]
    assert math.isclose(rates.at(20), min((1 + 0.9**20 + 0.5**20 + 0.8**20) / 4, 0.4))
    found = [rates.at(m) for m in range(1, 64)]
    assert found == sorted(found, reverse=True)


def test_a_gated_model_is_counted_and_the_rates_are_found_by_the_weight() -> None:
    model, samples = Gated(), data()
    report = quietly(model, samples)
    by = {layer.name: layer for layer in report.layers}
    assert list(by) == ["gate", "up", "down"]
    hidden = torch.cat([(F.relu(model.gate(x)) * model.up(x)).reshape(-1, 32) for x in samples])
    assert math.isclose(by["down"].zeros, float((hidden == 0).double().mean()))
    assert (by["down"].origin, by["down"].tokens) == ("product with relu(gate)", 4 * 96)
    assert by["gate"].zeros == by["up"].zeros == 0
    assert not by["gate"].key
    key = content_key(model.down.weight)
    found = rate_of(key)
    assert found is not None
    assert by["down"].key == found.key == key
    assert (found.zeros, found.rows, found.origin) == (by["down"].zeros, by["down"].rows, by["down"].origin)
    shares = (hidden == 0).double().mean(0)
    assert torch.allclose(torch.tensor(found.channels).double(), shares, atol=1.1e-4)
    assert all(share <= exact + 1e-12 for share, exact in zip(found.channels, shares.tolist(), strict=True))
    assert rate_of(key, "threshold") is None  # counted of other zeros than those of now
    assert rate_of(key, "product with relu(gate)") == found
    assert "2 more layers read no zeros" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["tokens"] == 4 * 96


def test_the_public_name_is_the_function_and_the_model_is_as_it_was() -> None:
    assert sparsec.calibrate is calibrate
    model = Gated().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quietly(model, data())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_is_not_counted() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(F.relu(self.inner(x)) * attention_mask[..., None])
            return y

    model, x = Padded(), torch.randn(2, 300, K)
    mask = torch.ones(2, 300, dtype=torch.int64)
    mask[1, 5:] = 0
    report = quietly(model, [{"x": x, "attention_mask": mask}])
    fc = report.layers[1]
    kept = F.relu(model.inner(x)).reshape(-1, K)[mask.flatten() != 0]
    assert fc.tokens == 305
    assert math.isclose(fc.zeros, float((kept == 0).double().mean()))


def test_a_weight_at_two_places_has_one_rate_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(F.relu(self.a(F.relu(x))))
            return y

    model = Twice()
    report = quietly(model, data())
    found = rate_of(content_key(model.a.weight))
    assert found is not None
    assert found.tokens == 2 * 4 * 96
    assert math.isclose(found.zeros, sum(layer.zeros for layer in report.layers) / 2)


def test_a_layer_that_is_never_activated_is_named_and_not_kept() -> None:
    model = Gated()
    nn.init.constant_(model.gate.bias, -100.0)
    with pytest.warns(SparsecWarning, match="down read nothing but zeros in 384 tokens; no rate is kept of that"):
        report = calibrate(model, data())
    assert report.layers[2].dead == 32
    assert rate_of(content_key(model.down.weight)) is None


def test_values_that_are_not_finite_are_named_and_not_kept() -> None:
    model = Gated()
    model.up.bias.data[3] = float("nan")
    with pytest.warns(SparsecWarning, match="down read NaN or infinite values; no rate is kept of that"):
        report = calibrate(model, data())
    assert report.layers[2].nonfinite == 4 * 96
    assert rate_of(content_key(model.down.weight)) is None


def test_data_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UnreadableCalibration, match="NaN"):
        calibrate(Gated(), [torch.full((1, 4, K), float("nan"))])


def test_few_tokens_no_zeros_and_layers_that_nobody_calls_are_said() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.GELU(), nn.Linear(K, K))
    with pytest.warns(SparsecWarning) as said:
        calibrate(model, [torch.randn(1, 8, K)])
    texts = [str(w.message) for w in said]
    assert any("8 tokens are few" in text for text in texts)
    assert any("no layer reads exact zeros" in text for text in texts)
    left_out = Gated()
    left_out.spare = nn.Linear(K, K)
    with pytest.warns(SparsecWarning, match="spare got no call from these samples"):
        calibrate(left_out, data())


def test_a_model_without_layers_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"ReLU has no nn\.Linear"):
        calibrate(nn.ReLU(), data())


def test_what_cannot_be_captured_is_counted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Dynamo does not know this\nmore lines")

    monkeypatch.setattr("sparsec.pipeline.sites_of", fails)
    model = Gated()
    with pytest.warns(SparsecWarning, match=r"could not be captured \(Dynamo does not know this\)"):
        report = calibrate(model, data())
    assert report.layers[2].origin == ""
    assert rate_of(content_key(model.down.weight), "relu") is not None  # unknown then, so it may be the same


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningNotKept, match="file"):
        calibrate(Gated(), data(), cache_dir=str(tmp_path / "file"))


RATES = Rates("abc", "relu", 4096, 0.75, ((2, 0.5),), (0.5, 1.0), 1.0)


@pytest.mark.parametrize("damage", ["cut", "edited", "another weight", "no number", "a list", "empty"])
def test_a_damaged_file_is_a_sentence_and_ignored(damage: str) -> None:
    path = keep(RATES)
    assert rate_of("abc") == RATES
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "edited":
        path.write_text(text.replace("4096", "9999"))
    elif damage == "another weight":
        path.rename(path.with_name("def.json"))
    elif damage == "no number":
        path.write_bytes(sealed({"key": "abc", "origin": 1}))
    else:
        path.write_text({"a list": "[1]", "empty": ""}[damage])
    key = "def" if damage == "another weight" else "abc"
    with pytest.warns(SparsecWarning, match=r"activation rates in .* are damaged .* sparsec.calibrate\(model, data\)"):
        assert rate_of(key) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        assert rate_of(key) is None  # said once
    keep(RATES)
    assert rate_of("abc") == RATES


def _write(folder: str, number: int) -> None:
    for i in range(25):
        keep(Rates("same", "relu", number, i / 25, (), (number / 10,) * 512), folder)


def test_processes_that_write_at_the_same_time_leave_a_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(str(tmp_path), n)) for n in (1, 2, 3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        with warnings.catch_warnings():
            warnings.simplefilter("error", SparsecWarning)
            found = rate_of("same", cache=str(tmp_path))
        assert found is None or found.channels == (found.tokens / 10,) * 512
    assert all(process.exitcode == 0 for process in processes)
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == ["same.json"]


# ------------------------------------------------------------------------------------------------------------ explain

REFERENCE = {"target": "reference"}


def explained(model: nn.Module, x: torch.Tensor) -> sparsec.Explanation:
    with torch.no_grad():
        return sparsec.explain(model, x, options=REFERENCE)


def test_explain_says_where_zeros_come_from_and_how_to_measure_them() -> None:
    model = Gated()
    before = explained(model, torch.randn(1, 1, K))
    text = " ".join(before.text().split())
    asked = "rate unknown; sparsec.calibrate(model, data) measures it"
    assert f"x: zeros from a product with relu(gate), {asked}" in text
    assert "y: not read where relu is zero" in text
    layers = {layer["name"]: layer["activation"] for layer in before.to_dict()["layers"]}
    assert layers["gate"] is None
    assert (layers["down"]["state"], layers["down"]["rate"], layers["down"]["measured"]) == ("likely", None, None)
    assert (layers["up"]["state"], layers["up"]["needed_origin"]) == ("top", "relu")
    assert layers["up"]["needed"]


def test_explain_has_the_measured_rate_in_table_dict_and_page() -> None:
    model = Gated()
    report = quietly(model, data())
    found = explained(model, torch.randn(1, 1, K))
    share = report.layers[2].zeros
    said = f"x: {100 * share:.0f} % zeros from a product with relu(gate) (measured on 384 tokens)"
    text = " ".join(found.text().split())
    assert said in text
    assert f"y: not read where relu is zero, {100 * share:.0f} % of it (measured on 384 tokens)" in text
    assert said in found.to_html()
    layers = {layer["name"]: layer["activation"] for layer in found.to_dict()["layers"]}
    assert math.isclose(layers["down"]["rate"], share, rel_tol=1e-3)
    assert layers["down"]["measured"]["tokens"] == layers["up"]["needed_measured"]["tokens"] == 384
    assert set(layers["down"]["measured"]["rows"]) == {"1", "2", "4", "8"}
    json.dumps(found.to_dict())


def test_explain_names_patterns_and_says_nothing_of_layers_without_zeros() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, places = x.abs().topk(4, -1)
            top = torch.zeros_like(x).scatter(-1, places, x.gather(-1, places))
            y: torch.Tensor = self.second(F.gelu(self.first(top)))
            return y

    found = explained(Sparse(), torch.randn(1, 1, K))
    text = " ".join(found.text().split())
    assert "x: at least 75 % zeros from top-k, 4 kept in a row" in text
    assert text.count("x: ") == 1
    second = found.to_dict()["layers"][1]
    assert second["activation"] is None


def test_the_command_counts_and_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("sparse activations skip what is zero. " * 60)
    words = ["calibrate", "tiny:opt", "--data", str(text), "--samples", "2", "--seqlen", "64"]
    assert cli.run(words) == 0
    assert "model.decoder.layers.0.fc2  64x160  relu" in capsys.readouterr().out
    assert cli.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 128
    assert len(list((cache / FOLDER).iterdir())) == 2
    assert cli.run(["calibrate", "tiny:opt", "--data", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
