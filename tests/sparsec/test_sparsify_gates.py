"""Gate steps of ``sparsify``: quotas on tokens that calibration did not see, saving and loading, order, mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec import sparsify_gates
from sparsec.cli import run
from sparsec.errors import BadModelFile, BadRecipe, NonFinite, SparsecError
from sparsec.forecast import forecast, forecast_table
from sparsec.gated_report import GatedLayer
from sparsec.passes.gates.layers import described, gates_of
from sparsec.passes.masks import METHODS, method_class
from sparsec.recipe import Recipe
from sparsec.sparsify import prepare, sparsify
from sparsec.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::sparsec.errors.SparsecWarning")
TEXT = "the quick brown fox jumps over the lazy dog and reads " * 400
GATES = [name for name in METHODS if method_class(name).role == "gate"]
QUICK: dict[str, dict[str, Any]] = {"dejavu": {"epochs": 2}, "shadowllm": {"epochs": 2, "segment": 8}}
MLPS = {"llama": 2, "opt": 2, "bert": 2, "gpt2": 2}


def tokens(count: int = 8, length: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 256, (1, length), generator=generator) for _ in range(count)]


def seen_twice(count: int = 8) -> list[torch.Tensor]:
    """The last quarter, which is held out, is the first quarter again."""
    once = tokens(count)
    return [*once, *once, *once, *once]


def step(method: str, **options: Any) -> dict[str, Any]:
    return {"method": method, **QUICK.get(method, {}), **options}


def llama(**changes: Any) -> nn.Module:
    model = tiny_model("tiny:llama").model
    return relu(model) if changes.get("relu") else model


def relu(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.act_fn = nn.ReLU()  # type: ignore[union-attr]
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False) if hasattr(model, "lm_head") else model(input_ids=ids)
    first: torch.Tensor = found[0]
    return first


# ------------------------------------------------------------------------------------------------------------- quotas


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("method", ["teal", "cats", "chess", "scap", "dejavu", "coreinfer", "shadowllm"])
def test_the_asked_share_is_reached_on_the_calibration_tokens(method: str, share: float) -> None:
    report = sparsify(llama(), step(method, sparsity=share), seen_twice(), progress=False)
    measured = [row for row in report.gates if row.achieved is not None]
    assert measured
    for row in measured:
        assert row.asked == share
        assert row.achieved == pytest.approx(share, abs=0.02), row.name
        assert row.tokens >= 8 * 32


def test_what_is_reported_is_what_tokens_show_that_were_not_seen() -> None:
    model = llama()
    report = sparsify(model, step("teal"), tokens(8), progress=False)
    row = next(row for row in report.gates if row.name == "model.layers.0.mlp.down_proj")
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(row.name).gate.register_forward_hook(lambda m, a, y: seen.append(y))
    for ids in tokens(8)[6:]:
        logits(model, ids)
    hook.remove()
    assert row.achieved == pytest.approx(float((torch.cat(seen, 1) == 0).float().mean()))
    assert row.tokens == 2 * 64


@pytest.mark.parametrize("method", ["qsparse", "amber"])
def test_what_keeps_a_fixed_number_reaches_it_exactly(method: str) -> None:
    report = sparsify(llama(), step(method), tokens(), progress=False)
    assert {row.achieved or row.asked for row in report.gates if row.form} == {0.5}


def test_greedy_shares_differ_and_their_mean_over_weights_is_what_was_asked() -> None:
    model = llama()
    report = sparsify(model, step("teal", greedy=True, sparsity=0.4, step=0.2), seen_twice(4), progress=False)
    for block in ("model.layers.0.", "model.layers.1."):
        rows = [row for row in report.gates if row.name.startswith(block)]
        sizes = [model.get_submodule(row.name).weight.numel() for row in rows]
        mean = sum(float(row.asked or 0) * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(0.4, abs=1e-6)
        assert len({row.asked for row in rows}) > 1
        for row in rows:
            assert row.achieved == pytest.approx(row.asked, abs=0.02)


def test_thresholds_are_the_quantiles_of_what_each_layer_reads_after_the_gates_before_it() -> None:
    model = llama()
    data = tokens(9)
    sparsify(model, step("teal", sparsity=0.5), data, progress=False)
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    seen: list[torch.Tensor] = []
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for ids in data[:7]:  # a quarter is held out
        logits(model, ids)
    hook.remove()
    below = (torch.cat(seen, 1).abs() <= down.gate.threshold).float().mean()
    assert float(below) == pytest.approx(0.5, abs=0.002)


def test_overrides_targets_and_ignore_are_those_of_every_step() -> None:
    recipe = step(
        "teal",
        sparsity=0.4,
        targets=["*.mlp.*"],
        ignore=["*.up_proj"],
        overrides={"*.layers.1.mlp.down_proj": {"sparsity": 0.7}, "*.layers.0.mlp.gate_proj": "skip"},
    )
    report = sparsify(llama(), recipe, tokens(), progress=False)
    asked = {row.name.removeprefix("model.layers."): row.asked for row in report.gates}
    assert asked == {"0.mlp.down_proj": 0.4, "1.mlp.gate_proj": 0.4, "1.mlp.down_proj": 0.7}


# -------------------------------------------------------------------------------------------------------- the formulas


def test_cats_is_its_formula_in_a_gated_mlp() -> None:
    model = llama()
    plain = copy.deepcopy(model).model.layers[0].mlp  # type: ignore[union-attr]
    sparsify(model, step("cats"), tokens(), progress=False)
    mlp = model.model.layers[0].mlp  # type: ignore[union-attr]
    x = torch.randn(2, 5, 64)
    g = plain.act_fn(plain.gate_proj(x))
    kept = torch.where(g.abs() > mlp.act_fn.gate.threshold, g, 0)
    assert 0.2 < float((kept == 0).float().mean()) < 0.8
    assert torch.equal(mlp(x), plain.down_proj(kept * plain.up_proj(x)))


def test_chess_thresholds_are_inverse_to_the_mean_size_of_up_and_attention_gates_queries_and_outputs() -> None:
    model = llama()
    data = tokens()
    report = sparsify(model, step("chess"), data, progress=False)
    inside = {row.name.rpartition(".")[2] for row in report.gates}
    assert inside == {"q_proj", "o_proj", "act_fn"}
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    hook = mlp.up_proj.register_forward_hook(lambda m, a, y: seen.append(y))
    gates = mlp.act_fn.gate
    kept = gates.threshold.clone()
    gates.threshold.zero_()  # up does not depend on it
    for ids in data[:6]:
        logits(model, ids)
    hook.remove()
    up = torch.cat(seen, 1).abs().mean((0, 1))
    assert torch.allclose(kept * up, (kept * up).mean().expand_as(up), rtol=1e-3)
    only = sparsify(llama(), step("chess", attention=False), tokens(), progress=False)
    assert {row.place for row in only.gates} == {"activation"}


@pytest.mark.parametrize("mode", ["median", "kde", "zero"])
def test_scap_folds_its_mode_so_that_a_gate_which_zeroes_nothing_changes_nothing(mode: str) -> None:
    model = tiny_model("tiny:bert").model
    dense = copy.deepcopy(model)
    report = sparsify(model, step("scap", mode=mode, sparsity=0.0), tokens(), progress=False)
    assert {row.gate["kind"] for row in report.gates if row.gate} <= {"mode", "threshold"}
    assert any(row.gate and row.gate["kind"] == "mode" for row in report.gates) == (mode != "zero")
    ids = tokens(1)[0]
    assert torch.allclose(logits(model, ids), logits(dense, ids), atol=1e-4)


def test_sparseinfer_never_touches_what_relu_keeps_when_alpha_is_large_and_skips_what_it_would_zero() -> None:
    model = llama(relu=True)
    dense = copy.deepcopy(model)
    ids = tokens(1)[0]
    report = sparsify(model, step("sparseinfer", alpha=1e9), tokens(), progress=False)
    assert all(row.asked is None for row in report.gates)
    assert torch.equal(logits(model, ids), logits(dense, ids))
    asked = sparsify(llama(relu=True), step("sparseinfer", sparsity=0.6), tokens(24), progress=False)
    for row in asked.gates:
        assert row.achieved == pytest.approx(0.6, abs=0.06)  # counts of 64 signs move in steps
        assert "active neurons" in row.notes[0]


def test_a_trained_predictor_keeps_more_of_the_active_neurons_than_chance() -> None:
    model = llama(relu=True)
    recipe = {"method": "dejavu", "sparsity": 0.6, "epochs": 30, "rank": 32}
    report = sparsify(model, recipe, tokens(32), progress=False)
    for row in report.gates:
        recall = float(row.notes[0].split("keeps ")[1].split("%")[0]) / 100
        assert recall > 0.4 + 0.15


def test_a_shadow_tells_sets_that_hold_more_importance_than_chance() -> None:
    report = sparsify(llama(relu=True), step("shadowllm", epochs=5), tokens(16), progress=False)
    row = next(row for row in report.gates if row.notes)
    held = float(row.notes[0].split("hold ")[1].split("%")[0]) / 100
    assert held > 0.6
    assert [row.achieved is None for row in report.gates] == [False, False, True]


def test_two_runs_give_the_same_bits() -> None:
    for method in ("dejavu", "shadowllm"):
        states = []
        for _ in range(2):
            model = llama()
            sparsify(model, step(method), tokens(), progress=False)
            states.append(model.state_dict())
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# -------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize("method", GATES)
def test_every_method_gates_every_kind_of_model_and_saves_and_loads_to_the_same_bits(
    method: str, kind: str, tmp_path: Path
) -> None:
    if method == "shadowllm" and kind == "bert":
        pytest.skip("an encoder has no loss")
    model = tiny_model(f"tiny:{kind}").model
    report = sparsify(model, step(method), tokens(), progress=False)
    assert any(row.form for row in report.gates)
    ids = tokens(1, 16)[0]
    told = logits(model, ids)
    sparsec.save(model, tmp_path / "out", report)
    fresh = tiny_model(f"tiny:{kind}", seed=1).model
    sparsec.load(tmp_path / "out", fresh)
    assert described(fresh) == described(model)
    assert torch.equal(logits(fresh, ids), told)
    sparsec.load(tmp_path / "out", fresh)  # again, into a model that is gated already
    assert torch.equal(logits(copy.deepcopy(fresh), ids), told)
    for batch in (1, 3, 2):
        assert logits(fresh, ids.repeat(batch, 1)).shape[0] == batch


def test_gates_go_with_bfloat16_models() -> None:
    model = llama().to(torch.bfloat16)
    for method in ("teal", "scap", "dejavu", "shadowllm", "coreinfer"):
        gated = copy.deepcopy(model)
        report = sparsify(gated, step(method), seen_twice(), progress=False)
        shares = [row.achieved for row in report.gates if row.achieved is not None]
        assert all(share == pytest.approx(0.5, abs=0.02) for share in shares)
        assert logits(gated, tokens(1)[0]).dtype == torch.bfloat16


def test_masks_values_and_gates_compose_in_one_recipe(tmp_path: Path) -> None:
    model = llama()
    recipe = ["wanda", {"method": "rtn", "activations": "int8"}, step("teal", targets=["*.mlp.*"]), step("cats")]
    report = sparsify(model, recipe, tokens(), progress=False)
    assert report.achieved == pytest.approx(0.5, abs=0.01)
    assert {row.step for row in report.gates} == {3, 4}
    mlp = model.model.layers[0].mlp  # type: ignore[union-attr]
    assert type(mlp.down_proj).__name__ == "GatedQuantizedLinear"
    text = str(report)
    assert "act_fn" in text
    assert "wanda + rtn + teal + cats" in text
    ids = tokens(1)[0]
    told = logits(model, ids)
    sparsec.save(model, tmp_path / "out", report)
    fresh = llama()
    sparsec.load(tmp_path / "out", fresh)
    assert torch.equal(logits(fresh, ids), told)


@pytest.mark.parametrize("packed", [False, True])
def test_gates_of_an_earlier_recipe_are_saved_with_or_without_a_report(packed: bool, tmp_path: Path) -> None:
    model = llama()
    sparsify(model, step("chess"), tokens(), progress=False)
    report = sparsify(model, {"method": "magnitude", "sparsity": 0.7, "targets": ["*.v_proj"]}, progress=False)
    if packed:
        sparsec.pack_(model, target="reference")
    ids = tokens(1)[0]
    told = logits(model, ids)
    for name, said in (("with", report), ("without", None)):
        sparsec.save(model, tmp_path / name, said)
        fresh = llama()
        sparsec.load(tmp_path / name, fresh)
        assert described(fresh) == described(model)
        assert torch.equal(logits(fresh, ids), told)


def test_rows_survive_json_and_the_dry_run_shows_the_step() -> None:
    report = sparsify(llama(), step("chess"), tokens(), progress=False)
    assert [GatedLayer.from_dict(row.to_dict()) for row in report.gates] == list(report.gates)
    assert report.to_dict()["gates"][0]["gate"]["kind"] == "threshold"
    assert Recipe.load(report.recipe.to_dict()).sha == report.recipe.sha
    lines = forecast_table(forecast(prepare(llama(), ["wanda", step("teal", phase="decode")]), 512))
    row = next(line for line in lines if "2 teal" in line)
    assert "activations, decode" in row
    assert "50.0%" in row


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return y


@pytest.mark.parametrize("method", ["teal", "scap", "sparseinfer", "coreinfer"])
def test_compiled_by_sparsec_a_gated_model_gives_what_eager_gives(method: str) -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    data = [torch.randn(1, 8, 64) for _ in range(4)]
    sparsify(model, ["magnitude", step(method)], data, progress=False)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sparsec")
    with torch.no_grad():
        for tokens_ in (8, 1):
            x = torch.randn(1, tokens_, 64)
            assert torch.allclose(compiled(x), twin(x), atol=1e-5)


def test_a_request_of_generate_keeps_the_set_of_its_prompt() -> None:
    model: Any = llama()
    sparsify(model, step("coreinfer", sparsity=0.75), tokens(), progress=False)
    gates = [gate for _, _, gate in gates_of(model)]
    sets = []
    for seed in (1, 2):
        prompt = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(seed))
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        sets.append([gate.neurons.clone() for gate in gates])
        with torch.no_grad():
            model(input_ids=prompt)
        assert all(torch.equal(a, gate.neurons) for a, gate in zip(sets[-1], gates, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*sets, strict=True))
    assert {int(s.sum()) for s in sets[0]} == {40}


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("method", ["scap", "dejavu"])
def test_a_killed_run_goes_on_to_the_same_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = llama()
    sparsify(told, step(method), tokens(), progress=False)
    model = llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    block = sparsify_gates.GateRun._block

    def breaks(self: Any, run: Any, *args: Any) -> Any:
        if run.name.endswith(".1"):
            raise KeyboardInterrupt
        return block(self, run, *args)

    monkeypatch.setattr(sparsify_gates.GateRun, "_block", breaks)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, step(method), tokens(), progress=False, resume=tmp_path / "state")
    monkeypatch.setattr(sparsify_gates.GateRun, "_block", block)
    fresh = llama()
    fresh.load_state_dict(before)
    report = sparsify(fresh, step(method), tokens(), progress=False, resume=tmp_path / "state")
    assert any("1 block came from" in note for note in report.notes)
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in told.state_dict().items())


def test_a_block_that_fails_leaves_no_gate_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    told = logits(model, tokens(1)[0])
    cls = method_class("scap")
    gate = cls.gate

    def fails(self: Any, block: Any) -> None:
        gate(self, block)
        raise KeyboardInterrupt

    monkeypatch.setattr(cls, "gate", fails)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, step("scap"), tokens(), progress=False)
    assert list(gates_of(model)) == []
    assert torch.equal(logits(model, tokens(1)[0]), told)


# ----------------------------------------------------------------------------------------------------------- mistakes


BAD: dict[str, tuple[Any, str]] = {
    "masks after gates": (["teal", "wanda"], "put wanda first"),
    "values after gates": (["teal", "rtn"], "put rtn first"),
    "repairs after gates": (["wanda", "teal", "variance"], "put variance first"),
    "an allocator for gates": (["owl", "teal"], "owl changes weights, and teal has none"),
    "a rewrite for gates": (["equalize", "teal"], "equalize changes weights"),
    "all of it": (step("teal", sparsity=1.0), "less than 1"),
    "a pattern of weights": (step("teal", pattern="2:4"), "pattern"),
    "top-k larger than the width": (step("qsparse", k=65), "k is 65, but .* reads only 64 features"),
    "k and sparsity": (step("qsparse", k=8, sparsity=0.5), "give one of them"),
    "a pattern and another sparsity": (step("amber", sparsity=0.7), "means sparsity 0.5"),
    "blocks of activations": (step("amber", pattern="block:4x4"), "amber keeps N of M"),
    "another phase": (step("teal", phase="training"), "phase"),
    "a key of another method": (step("cats", greedy=True), "greedy"),
    "no such layer": (step("teal", targets=["*.gat_proj"]), "gat_proj"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_gate_step_is_one_sentence_and_changes_nothing(name: str) -> None:
    recipe, words = BAD[name]
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SparsecError, match=words):
        sparsify(model, recipe, tokens(), progress=False)
    assert list(gates_of(model)) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_an_mlp_is_refused_by_methods_of_mlps() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(BadRecipe, match="cats finds nothing to gate"):
        sparsify(model, "cats", [torch.randn(4, 8) for _ in range(4)], progress=False)


def test_data_that_is_missing_is_asked_for_and_methods_without_need_run() -> None:
    with pytest.raises(BadRecipe, match="teal needs calibration data"):
        sparsify(llama(), "teal", progress=False)
    report = sparsify(llama(), step("amber", skip=0), progress=False)
    assert {row.asked for row in report.gates} == {0.5}
    assert {row.achieved for row in report.gates} == {None}


class Skips(nn.Module):
    """Its second branch is never reached, and its third reads zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a(x)
        if x.shape[0] == 99:
            y = y + self.b(x)
        return y + self.c(torch.zeros_like(x))


@pytest.mark.parametrize("method", ["teal", "scap"])
def test_a_layer_that_the_data_never_reaches_stays_dense_and_one_that_reads_zeros_stays_exact(method: str) -> None:
    model = Skips()
    dense = copy.deepcopy(model)
    data = [torch.randn(4, 8) for _ in range(4)]
    report = sparsify(model, step(method), data, progress=False)
    said = {row.name: row for row in report.gates}
    assert said["b"].form == ""
    assert "no token reached it" in said["b"].notes[0]
    assert type(model.b) is nn.Linear
    assert "nothing but zeros" in said["c"].notes[0]
    assert said["c"].achieved == 1.0
    x = torch.randn(3, 8)
    assert torch.equal(model.c(x), dense.c(x))
    assert "no token reached it" in str(report)


@pytest.mark.parametrize("method", ["teal", "cats", "first-activations", "dejavu"])
def test_calibration_data_that_gives_nan_is_one_sentence(method: str) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight")[3] = float("nan")
    with pytest.raises(NonFinite, match=r"model\.layers\.1\.mlp\.\w+.* became NaN"):
        sparsify(model, step(method), tokens(), progress=False)
    assert not [name for name, _, _ in gates_of(model) if ".1." in name and method != "teal"]


def test_gates_of_another_model_are_refused_and_leave_it_as_it_was(tmp_path: Path) -> None:
    model = llama()
    report = sparsify(model, step("chess"), tokens(), progress=False)
    sparsec.save(model, tmp_path / "out", report)
    for other, words in ((tiny_model("tiny:opt").model, "gates do not fit"), (llama(), "not those that the model has")):
        if words.startswith("not"):
            sparsify(other, step("teal"), tokens(), progress=False)
        before = described(other)
        with pytest.raises(BadModelFile, match=words):
            sparsec.load(tmp_path / "out", other)
        assert described(other) == before


def test_a_layer_whose_bias_holds_a_shift_is_not_changed_by_later_recipes() -> None:
    model = tiny_model("tiny:bert").model
    sparsify(model, "scap", tokens(), progress=False)
    for recipe in ("wanda", "teal", "scap"):
        with pytest.raises(BadRecipe, match="load the model again"):
            sparsify(model, recipe, tokens(), progress=False)


def test_a_second_recipe_replaces_gates_of_the_first() -> None:
    model = llama()
    sparsify(model, step("teal", sparsity=0.3), tokens(), progress=False)
    report = sparsify(model, step("qsparse"), tokens(), progress=False)
    assert {gate.kind for _, _, gate in gates_of(model)} == {"top-k"}
    assert len(report.gates) == 14


def test_gating_an_activation_again_calibrates_on_what_it_gives_without_the_first_gate() -> None:
    once, twice = llama(), llama()
    sparsify(twice, step("cats", sparsity=0.8), tokens(), progress=False)
    for model in (once, twice):
        sparsify(model, step("cats", sparsity=0.4, targets=["*.layers.0.*"]), tokens(), progress=False)
    name = "model.layers.0.mlp.act_fn"
    assert torch.equal(once.get_submodule(name).gate.threshold, twice.get_submodule(name).gate.threshold)


def test_padding_is_no_part_of_a_threshold() -> None:
    ids = torch.cat(tokens(8))
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    batch = {"input_ids": padded, "attention_mask": torch.cat([mask, torch.zeros_like(mask)], 1)}
    first, second = llama(), llama()
    sparsify(first, step("teal", sparsity=0.6), [{"input_ids": ids, "attention_mask": mask}], progress=False)
    sparsify(second, step("teal", sparsity=0.6), [batch], progress=False)
    for (_, _, a), (_, _, b) in zip(gates_of(first), gates_of(second), strict=True):
        assert torch.allclose(a.threshold, b.threshold, rtol=1e-3)


def test_the_command_line_gates_saves_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["sparsify", "tiny:llama", "--method", "teal", "--sparsity", "0.6", "--data", "text.txt", "-o", "out"]
    code = run([*words, "--calibration", "{samples: 8, seqlen: 64}"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "sparsify teal: 14 gates" in out
    page = (tmp_path / "out" / "sparsec_report.html").read_text()
    assert page.count("<td>input</td>") == 14
    assert "zero activations" in page
    assert "of 0 layers" not in page
    model = llama()
    sparsec.load(tmp_path / "out", model)
    assert len(list(gates_of(model))) == 14
    assert run(["methods"]) == 0
    table = capsys.readouterr()[0]
    assert "gates: which activations become zero" in table
    assert all(name in table for name in GATES)
