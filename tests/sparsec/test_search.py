"""``sparsec search``: budgets, fronts, proposals that go on after a kill, and the model as it was."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsec import explain, sparsify
from sparsec.cli import run
from sparsec.errors import BadOptionValue, BadPattern, InputError, MissingPackage, OtherRun, UnknownMethod
from sparsec.expected_time import cost_now
from sparsec.models import LoadedModel
from sparsec.prunable import survey
from sparsec.search import Found, explore, need_optuna, search
from sparsec.search_front import Budget, Check, Trial, dominates, fastest, front
from sparsec.search_report import draw
from sparsec.search_space import METHODS, REPAIRS, Space, key_of
from sparsec.search_store import FILE, Store
from sparsec.search_trial import Bench, Weights
from sparsec.tiny import tiny_model

WORDS = "the weights of a layer that are zero need no time where the kernel knows of them, and are silent elsewhere. "
TEXT = ["".join(WORDS[(7 * i) % 90 :] + str(i * i) for i in range(400))]
SMALL: dict[str, Any] = {"samples": 100, "seqlen": 64, "windows": 8, "progress": False}
A = {"method": "wanda", "pattern": "2:4", "sparsity": None, "allocator": "none", "repair": "none"}


# ------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("ppl<=1.02x", Budget("ppl", 1.02, True)),
        (" ppl <= 12.9 ", Budget("ppl", 12.9)),
        ("cos>=0.95", Budget("cos", 0.95)),
        ("cos >= .5", Budget("cos", 0.5)),
    ],
)
def test_a_budget_is_read_and_written(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ppl<=0.9x", "the dense model itself would miss it"),
        ("ppl<=0.5", "no perplexity is below 1"),
        ("cos>=1.2", "between 0 and 1"),
        ("cos>=0", "between 0 and 1"),
        *((text, "a budget is written") for text in ("", "ppl", "ppl<1.02x", "ppl>=1.02x", "cos<=0.9", "cos>=0.9x")),
        *((text, "a budget is written") for text in ("acc>=0.9", "ppl<=-1", "ppl<=nan", "ppl<=1e9", "ppl<=1.02xx")),
        *((text, "a budget is written") for text in ("1.02x", "ppl<=1.0.2", "ppl<=1.02x or so", "ppl==1.02x")),
    ],
)
def test_nonsense_is_no_budget(text: str, why: str) -> None:
    with pytest.raises(BadOptionValue, match=why) as raised:
        Budget.parse(text)
    assert repr(text) in str(raised.value)


def test_limits_are_losses_whatever_the_spelling() -> None:
    assert Budget.parse("ppl<=1.02x").limit(10.0) == pytest.approx(0.02)
    assert Budget.parse("ppl<=12.9").limit(12.0) == pytest.approx(0.075)
    assert Budget.parse("cos>=0.95").limit(1.0) == pytest.approx(0.05)


# -------------------------------------------------------------------------------------------------------------- fronts

numbers = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10))
some_trials = st.lists(
    st.builds(lambda i, x, y, bad: Trial({**A, "sparsity": i}, x, y, failed="no" * bad),
              st.integers(), numbers, numbers, st.booleans()),
    max_size=14,
)  # fmt: skip


@given(some_trials)
def test_the_front_is_what_nothing_dominates(trials: list[Trial]) -> None:
    good = [t for t in trials if not t.failed]
    slow = {(t.loss, t.seconds) for t in good if not any(dominates(other, t) for other in good)}
    found = front(trials)
    assert {(t.loss, t.seconds) for t in found} == slow
    assert len(found) == len(slow)
    assert [t.seconds for t in found] == sorted((t.seconds for t in found), reverse=True)
    assert [t.loss for t in found] == sorted(t.loss for t in found)


def test_equals_do_not_dominate_each_other() -> None:
    assert not dominates(Trial(A, 1.0, 1.0), Trial(A, 1.0, 1.0))
    assert dominates(Trial(A, 1.0, 1.0), Trial(A, 1.0, 2.0))
    assert not dominates(Trial(A, 1.0, 2.0), Trial(A, 2.0, 1.0))


@given(some_trials, st.floats(0, 10), st.floats(0, 10))
def test_the_fastest_is_within_the_limit_and_faster_than_dense(trials: list[Trial], limit: float, dense: float) -> None:
    found = fastest(trials, limit, dense)
    good = [t for t in trials if not t.failed and t.loss <= limit and t.seconds < dense]
    assert (found is None) == (not good)
    if found:
        assert found in good
        assert not any(dominates(other, found) for other in good)
        assert all(found.seconds <= other.seconds for other in good)


def test_a_check_says_only_what_its_interval_supports() -> None:
    assert Check(0.01, 0.005, 0.015).verdict(0.02) == "within"
    assert Check(0.01, 0.005, 0.025).verdict(0.02) == "not separable"
    assert Check(0.05, 0.03, 0.07).verdict(0.02) == "over"


def test_trials_survive_json() -> None:
    for trial in (Trial(A, 0.1, 2e-6, 0.5, Check(0.1, 0.0, 0.2), 1.5), Trial(A, failed="cannot be inverted")):
        assert Trial.from_dict(json.loads(json.dumps(trial.to_dict(), allow_nan=False))) == trial


# ----------------------------------------------------------------------------------------------- proposals, one by one


def fake(params: Mapping[str, Any]) -> Trial:
    """A loss that grows with sparsity at a rate of the method's own; N:M is slower than its sparsity."""
    share = params["sparsity"] or 0.5
    rate = 1.0 + METHODS.index(params["method"]) + REPAIRS.index(params["repair"]) / 10
    return Trial(params, rate * share**4, 1.0 - share * (0.9 if params["pattern"] == "unstructured" else 0.5))


def test_no_recipe_is_measured_twice_and_a_small_space_ends() -> None:
    asked: list[str] = []

    def measure(params: Mapping[str, Any]) -> Trial:
        asked.append(key_of(params))
        return fake(params)

    space = Space(methods=("sparsegpt",), allocators=("none",), lowest=0.4, highest=0.6)
    found = explore(measure, space, 0.1, 30)
    assert len(asked) == len(set(asked)) == len(found) == 5 + 3  # five sparsities, three patterns
    assert {key_of(params) for params in space.all()} == set(asked)
    shares = {t.params["sparsity"] for t in found} - {None}
    assert shares == {0.4, 0.45, 0.5, 0.55, 0.6}


def test_proposals_depend_on_the_seed_alone() -> None:
    one, same, other = (explore(fake, Space(), 0.1, 15, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one != other


def test_five_trials_find_a_recipe_within_a_strict_budget_by_halving() -> None:
    trials = explore(fake, Space(), 0.02, 5)
    shares = [t.params["sparsity"] for t in trials if t.params["pattern"] == "unstructured"]
    assert shares[:3] == [0.5, 0.25, 0.35]
    assert fastest(trials, 0.02, 1.0) is not None
    wide = explore(fake, Space(), 0.5, 5)
    assert [t.params["sparsity"] for t in wide if t.params["pattern"] == "unstructured"][:3] == [0.5, 0.7, 0.8]


@given(st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_what_is_tried_next_lies_between_what_kept_and_what_missed(kept: float, missed: float) -> None:
    found = Space().between(kept, missed)
    if found is None:
        assert not [x for x in Space().shares if kept < x < missed]
    else:
        assert kept < found < missed


def test_the_sampler_finds_better_recipes_than_its_first_ones() -> None:
    trials = explore(fake, Space(methods=METHODS[::-1]), 0.2, 40, seed=0)  # the starts are of the worst method
    chosen = fastest(trials, 0.2, 1.0)
    best_of_starts = fastest(trials[:8], 0.2, 1.0)
    assert chosen is not None
    assert best_of_starts is not None
    assert chosen.seconds < best_of_starts.seconds
    assert chosen.params["method"] == "sparsegpt"


def test_a_killed_search_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    whole = explore(fake, Space(), 0.2, 14, seed=1)
    count = 0

    def killed(params: Mapping[str, Any]) -> Trial:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return fake(params)

    about = {"model": "a", "data": "b", "search space": "c"}
    with pytest.raises(KeyboardInterrupt):
        explore(killed, Space(), 0.2, 14, seed=1, store=Store.at(tmp_path, about))
    assert len((tmp_path / FILE).read_text().splitlines()) == 1 + 6
    measured: list[Trial] = []

    def rest(params: Mapping[str, Any]) -> Trial:
        measured.append(fake(params))
        return measured[-1]

    again = explore(rest, Space(), 0.2, 14, seed=1, store=Store.at(tmp_path, about))
    assert again == whole
    assert measured == whole[6:]
    none_left = explore(killed, Space(), 0.2, 14, seed=1, store=Store.at(tmp_path, about))
    assert none_left == whole


@pytest.mark.parametrize(("key", "said"), [("model", "another model"), ("data", "another data")])
def test_trials_of_another_search_are_refused(tmp_path: Path, key: str, said: str) -> None:
    about = {"model": "a", "data": "b", "search space": "c"}
    Store.at(tmp_path, about).add(key_of(A), Trial(A, 1.0, 1.0))
    with pytest.raises(OtherRun, match=said):
        Store.at(tmp_path, {**about, key: "other"})
    assert Store.at(tmp_path, about).get(key_of(A)) == Trial(A, 1.0, 1.0)
    assert Store.at(tmp_path, about, 3.0).inductor == 1.0  # as the first process counted


def test_a_damaged_file_of_trials_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(OtherRun, match="remove"):
        Store.at(tmp_path, {})


def test_a_recipe_that_fails_is_kept_with_its_reason_and_not_tried_again(tmp_path: Path) -> None:
    def measure(params: Mapping[str, Any]) -> Trial:
        return Trial(params, failed="no") if params["method"] == "ria" else fake(params)

    store = Store.at(tmp_path, {})
    trials = explore(measure, Space(), 0.1, 20, seed=2, store=store)
    assert {t.failed for t in trials if t.params["method"] == "ria"} == {"no"}
    assert Store.at(tmp_path, {}).trials == store.trials


def test_after_the_deadline_no_trial_begins() -> None:
    assert len(explore(fake, Space(), 0.1, 20, deadline=-math.inf)) == 1


# ----------------------------------------------------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"methods": ("wandas",)}, UnknownMethod, "wanda"),
        ({"methods": ()}, BadOptionValue, "at least one"),
        ({"patterns": ("block:16x1",)}, BadOptionValue, "N:M"),
        ({"patterns": ("often",)}, BadPattern, "often"),
        ({"allocators": ("besa",)}, BadOptionValue, "none, owl, time"),
        ({"repairs": ("ebft",)}, BadOptionValue, "reconstruct"),
        ({"lowest": 0.9, "highest": 0.3}, BadOptionValue, "between 0 and 1"),
    ],
)
def test_a_wrong_space_is_a_sentence(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Space(**wrong)


# ---------------------------------------------------------------------------------------------------- the model itself


def llama(hidden: int = 256) -> LoadedModel:
    """Wide enough that the reference target gains from zeros."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.05, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return LoadedModel(model.eval(), None, "causal", "", "llama")


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def same_bits(model: nn.Module, before: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


def test_every_method_and_repair_is_undone_to_the_bit() -> None:
    loaded = tiny_model("tiny:llama")
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, :4] = -0.0
    before, homes = bits(loaded.model), {name: p.data_ptr() for name, p in loaded.model.named_parameters()}
    bench = Bench.of(loaded, TEXT, Space(target="reference"), 0, 100, 64, None, 8)
    recipes: list[dict[str, Any]] = [{**A, "method": method} for method in METHODS]
    recipes += [{**A, "repair": repair} for repair in REPAIRS]
    recipes += [{**A, "pattern": "unstructured", "sparsity": 0.6, "allocator": name} for name in ("owl", "time")]
    for params in recipes:
        trial = bench.trial(params)
        if params["allocator"] == "time":
            assert "no layer is expected to be faster" in trial.failed  # it fails in the middle of its work
        else:
            assert not trial.failed, params
            assert trial.zeros > 0.0
            assert trial.loss != 0.0
        assert same_bits(loaded.model, before), params
    assert {name: p.data_ptr() for name, p in loaded.model.named_parameters()} == homes


def test_whatever_stops_a_trial_leaves_the_dense_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False))
    before = bits(model)
    weights = Weights(model)

    def stopped() -> None:
        with weights.borrowed(), torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert same_bits(model, before)


def test_costs_are_those_that_explain_expects() -> None:
    loaded = llama()
    sparsify(loaded.model, {"method": "magnitude", "sparsity": 0.8}, progress=False)
    layers = {name: layer.matrix for name, layer in survey(loaded.model).layers.items()}
    with torch.no_grad():
        told = explain(loaded.model, **loaded.inputs(1, 1), options={"target": "reference"}).expected()
    found = cost_now(layers, "reference", rows=1)
    assert told is not None
    assert (found.dense_s, found.ours_s) == pytest.approx((told.dense_s, told.ours_s))
    assert found.ours_s < found.dense_s
    halves = {name: weight.half() for name, weight in layers.items()}
    assert cost_now(halves, "reference").dense_s == 0.0


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Found, Path]:
    loaded, folder = llama(), tmp_path_factory.mktemp("search")
    text = folder / "text.txt"
    text.write_text(TEXT[0])
    space = Space(target="reference", methods=("wanda", "magnitude"))
    before = bits(loaded.model)
    made = search(loaded, text, "ppl<=50x", space=space, trials=4, output=folder, **SMALL)
    assert same_bits(loaded.model, before)
    return loaded, made, folder


def test_a_search_chooses_the_fastest_within_the_budget(found: tuple[LoadedModel, Found, Path]) -> None:
    _, made, _ = found
    assert len(made.trials) == 4
    assert made.chosen is not None
    assert made.chosen in made.front
    assert made.chosen.seconds == min(t.seconds for t in made.trials)
    assert made.speedup(made.chosen) > made.speedup(made.dense) >= 1.0
    assert made.chosen.check is not None
    assert made.chosen.check.low <= made.chosen.check.loss <= made.chosen.check.high
    text = str(made)
    assert f"chosen: {made.chosen.name}" in text
    assert "keeps the budget" in text
    assert all(trial.name in text for trial in made.front)


def test_the_chosen_recipe_runs_and_gives_what_was_measured(found: tuple[LoadedModel, Found, Path]) -> None:
    loaded, made, folder = found
    files = made.save(folder)
    assert [f.name for f in files] == ["search.json", "recipe.yaml", "pareto.png"]
    assert made.chosen is not None
    model = llama().model
    assert same_bits(model, bits(loaded.model))
    report = sparsify(model, folder / "recipe.yaml", progress=False)
    layers = {name: layer.matrix for name, layer in survey(model).layers.items()}
    assert report.achieved == made.chosen.zeros
    bench = Bench.of(loaded, folder / "text.txt", Space(target="reference"), 0, 100, 64, None, 8)
    with bench.weights.borrowed():
        again = bench.prune(made.chosen.params)
        assert again.recipe.to_dict()["steps"] == report.recipe.to_dict()["steps"]
        assert same_bits(loaded.model, bits(model))
    cost = cost_now(layers, "reference")
    assert cost.ours_s == pytest.approx(made.chosen.seconds)
    assert cost.speedup == pytest.approx(made.speedup(made.chosen))
    said = json.loads((folder / "search.json").read_text())
    assert said["chosen"]["speedup"] == made.speedup(made.chosen)
    assert said["recipe"] == made.recipe
    assert len(said["trials"]) == 4
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_another_budget_reads_the_trials_that_are_there(
    found: tuple[LoadedModel, Found, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded, made, folder = found
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    monkeypatch.setattr(Bench, "trial", lambda *_: pytest.fail("measured again"))
    space = Space(target="reference", methods=("wanda", "magnitude"))
    strict = search(
        loaded, folder / "text.txt", "ppl<=1.0x", space=space, trials=2, output=tmp_path, **SMALL
    )  # the first two are its starts, whatever the budget
    assert strict.trials == made.trials[:2]
    other = Space(target="reference", methods=("wanda",))
    with pytest.raises(OtherRun, match="another search space"):
        search(loaded, folder / "text.txt", "ppl<=50x", space=other, trials=3, output=tmp_path, **SMALL)


def test_where_all_miss_the_budget_the_flag_is_named_and_the_table_says_what_it_leaves_out(
    found: tuple[LoadedModel, Found, Path],
) -> None:
    _, made, _ = found
    missed = replace(made, chosen=None, trials=tuple(replace(t, loss=2000.0) for t in made.trials))
    text = str(missed)
    assert "let the search try lower sparsities: --sparsity 0.05-" in text
    assert "4 recipes, " in text
    assert "of them on the front, which is what is listed (all 4 are in search.json)" in text


def test_nothing_is_chosen_where_nothing_is_faster_and_an_old_recipe_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space(target="reference", methods=("magnitude",), patterns=("2:4",), repairs=("none",))
    made = search(tiny_model("tiny:llama"), TEXT, "ppl<=90x", space=space, trials=3, **SMALL)
    assert made.chosen is None
    assert made.recipe is None
    assert len(made.trials) == 1
    assert "is expected to be faster than dense here" in str(made)
    (tmp_path / "recipe.yaml").write_text("{}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(made, tmp_path / "pareto.png")
    assert [f.name for f in made.save(tmp_path)] == ["search.json"]
    assert not (tmp_path / "recipe.yaml").exists()


def test_encoders_are_measured_by_cosine() -> None:
    space = Space(target="reference", methods=("magnitude",), patterns=("2:4",), repairs=("none",))
    paragraphs = [f"{WORDS}{i}" * 3 for i in range(40)]
    made = search(tiny_model("tiny:bert"), paragraphs, "cos>=0.1", space=space, trials=1, **SMALL)
    assert 0.0 < made.trials[0].loss < 0.9
    assert "cosine" in str(made)
    with pytest.raises(BadOptionValue, match="measured by cos"):
        search(tiny_model("tiny:bert"), paragraphs, "ppl<=1.1x", space=space, **SMALL)


def test_bad_input_is_a_sentence() -> None:
    model = tiny_model("tiny:llama")
    with pytest.raises(BadOptionValue, match="the dense model itself has perplexity"):
        search(model, TEXT, "ppl<=1.5", space=Space(target="reference"), **SMALL)
    with pytest.raises(InputError, match="4 are the least"):
        search(model, ["a" * 7000], "ppl<=1.5x", space=Space(target="reference"), **{**SMALL, "samples": 106})
    with pytest.raises(InputError, match="takes no text"):
        search(nn.Linear(4, 4), TEXT, "ppl<=1.5x", **SMALL)
    with pytest.raises(InputError, match="name text to measure on"):
        search(model, [torch.zeros(1, 64, dtype=torch.long)] * 8, "ppl<=1.5x", **SMALL)
    with pytest.raises(BadOptionValue, match="at least 1"):
        search(model, TEXT, "ppl<=1.5x", trials=0, **SMALL)


# ---------------------------------------------------------------------------------------------------- the command line


def test_the_command_writes_its_folder_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["search", "tiny:llama", "--budget", "ppl<=1.02x", "--methods", "magnitude", "--repairs", "none"]
    line += ["--target", "reference", "--windows", "8", "--samples", "100", "--seqlen", "64", "-o", "found"]
    assert run([*line, "--trials", "1"]) == 0
    out = capsys.readouterr().out
    assert "search tiny:llama: 1 recipe, " in out
    assert "saved: found/search.json" in out
    first = Path("found", FILE).read_text().splitlines()
    assert run([*line, "--trials", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["trials"]) == 2
    assert Path("found", FILE).read_text().splitlines()[:2] == first
    assert run([*line, "--trials", "2", "--seed", "5"]) == 2
    assert "another data and search space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--budget", "fast"], "a budget is written"),
        (["--budget", "ppl<=1.1x", "--sparsity", "low"], "a range such as 0.1-0.9"),
        (["--budget", "ppl<=1.1x", "--methods", "wandas"], "did you mean 'wanda'"),
        ([], "--budget"),
    ],
)
def test_what_is_wrong_shows_before_a_model_is_loaded(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", "no/such/model", *flags]) == 2
    assert said in capsys.readouterr().err


def test_without_optuna_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackage, match=r"pip install 'sparsec\[search\]'"):
        need_optuna()


def test_neither_help_nor_the_module_imports_optuna_or_torch() -> None:
    code = (
        "import sys, sparsec.search, sparsec.cli.search; sys.exit(any(m in sys.modules for m in ('optuna', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
