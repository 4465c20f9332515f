"""Structured methods: what is cut is what was masked, dead units are found, and what is left is a plain dense model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sparsec.errors import BadRecipe, ModelWouldGrow, NonFinite, UnfitCalibration, UnfitModel
from sparsec.passes.masks import method_class
from sparsec.passes.masks.structure.bonsai import Bonsai, activity, fit
from sparsec.passes.masks.structure.choose import choose
from sparsec.passes.masks.structure.contract import parameters
from sparsec.passes.masks.structure.find import find_units
from sparsec.passes.masks.structure.loraprune import Adapter, LoraPrune
from sparsec.passes.masks.structure.objective import Objective
from sparsec.passes.masks.structure.slicegpt import SlicedLayer, SliceGPT
from sparsec.passes.masks.structure.units import Family, Part, Units, masked, remove, zero
from sparsec.recipe import Recipe

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    )


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=24,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )


def bert() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=64,
        )
    )


def neox() -> GPTNeoXForCausalLM:
    changed = {**TINY, "num_attention_heads": 4}
    del changed["num_key_value_heads"]
    return GPTNeoXForCausalLM(GPTNeoXConfig(**changed))


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "opt": opt, "bert": bert, "neox": neox}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lively(model: nn.Module) -> Any:
    """With weights large enough for every unit to matter, biases and norms that are not trivial."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif "norm" in name.lower() or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def batches(count: int = 2, size: int = 2, tokens: int = 12) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, 64, (size, tokens))} for _ in range(count)]


@torch.no_grad()
def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(**batch)[0]
    return found


def loaded(cls: Any, path: Path) -> Any:
    return cls.from_pretrained(path).eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def every_second(units: Units) -> dict[str, torch.Tensor]:
    return {family.key: torch.arange(family.count) % 2 == 0 for family in units.families}


def trained(data: list[dict[str, torch.Tensor]]) -> Any:
    """A Llama that knows its data by heart, so that what it learned is worth something to its loss."""
    model: Any = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for batch in itertools.chain.from_iterable([data] * 60):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def plant_dead(model: nn.Module, units: Units) -> dict[str, torch.Tensor]:
    """Kill every fourth unit; gives what is alive."""
    alive = {family.key: torch.arange(family.count) % 4 != 1 for family in units.families}
    zero(model, units, alive)
    return alive


# finding, masking, cutting


@pytest.mark.parametrize("name", MODELS)
def test_cut_units_are_masked_units_and_the_model_traces_again(name: str) -> None:
    model, (batch, other) = lively(MODELS[name]()), batches()
    units = find_units(model, batch)
    assert [family.kind for family in units.families].count("head") == 2
    assert [family.kind for family in units.families].count("neuron") == 2
    assert not units.declined
    keep = every_second(units)
    with masked(model, units, keep):
        hidden = outputs(model, other)
    assert relative(hidden, outputs(model, other)) > 1e-2
    zeroed = copy.deepcopy(model)
    zero(zeroed, units, keep)
    before = parameters(model)
    remove(model, units, keep)
    torch.testing.assert_close(outputs(zeroed, other), hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(model, other), hidden, rtol=1e-5, atol=1e-5)
    assert before - parameters(model) == units.removed(keep)
    again = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(again, other), hidden, rtol=1e-5, atol=1e-5)


def test_query_heads_that_share_a_key_value_head_are_one_unit() -> None:
    units = find_units(llama(), batches()[0])
    attention = units.families[0]
    assert (attention.name, attention.kind, attention.count, attention.heads) == (
        "model.layers.0.self_attn",
        "head",
        4,
        2,
    )
    assert [part.size for part in attention.parts] == [8, 4, 4, 8]
    assert attention.cost == 2 * 8 * 32 + 2 * 4 * 32
    last = torch.tensor([3])
    assert attention.parts[1].features(last).tolist() == [12, 13, 14, 15]


def test_features_of_a_fused_linear_lie_in_three_places() -> None:
    attention = find_units(gpt2(), batches()[0]).families[0]
    assert [part.features(torch.tensor([1]))[0].item() for part in attention.parts] == [8, 40, 72, 8]


def test_linears_that_only_look_like_an_ffn_are_declined() -> None:
    class Mixed(nn.Module):
        """Its hidden features do not stay apart: a softmax runs over them."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(x).softmax(-1))  # type: ignore[no-any-return]

    model = nn.Sequential(Mixed())
    units = find_units(model, {"input": torch.randn(3, 8)})
    assert not units.families
    assert units.declined == {"0": "its output without some neurons is not that of zeros in their place"}


def test_heads_that_a_forward_counts_by_its_config_are_declined() -> None:
    model, (batch, other) = lively(Phi3ForCausalLM(Phi3Config(**TINY))), batches()
    units = find_units(model, batch)
    assert {family.kind for family in units.families} == {"neuron"}
    assert set(units.declined) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    keep = every_second(units)  # gate and up are one linear
    with masked(model, units, keep):
        hidden = outputs(model, other)
    remove(model, units, keep)
    torch.testing.assert_close(outputs(model, other), hidden, rtol=1e-5, atol=1e-5)


def test_tied_linears_and_unused_ones_are_declined() -> None:
    model = llama()
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    units = find_units(model, batches()[0])
    assert set(units.declined) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert "tied" in units.declined["model.layers.1.mlp"]
    unused = nn.ModuleDict({"mlp": llama().model.layers[0].mlp})
    unused.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert find_units(unused, {"x": torch.ones(1)}).declined == {"mlp": "it does not run on the calibration data"}


def test_a_single_key_value_head_stays() -> None:
    units = find_units(llama(num_key_value_heads=1), batches()[0])
    assert {family.kind for family in units.families} == {"neuron"}
    assert "8 query heads on 1 key-value head" in units.declined["model.layers.0.self_attn"]


def test_half_precision_units_are_proven_in_fp32() -> None:
    model, batch = lively(llama()).bfloat16(), batches()[0]
    units = find_units(model, batch)
    assert len(units.families) == 4
    remove(model, units, every_second(units))
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16


def test_an_even_cut_is_a_plain_checkpoint(tmp_path: Path) -> None:
    model, batch = lively(llama()), batches()[0]
    units = find_units(model, batch)
    assert remove(model, units, every_second(units)) == ""
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 4)
    assert model.config.intermediate_size == 12
    model.save_pretrained(tmp_path)
    again = loaded(LlamaForCausalLM, tmp_path)
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch))


def test_a_head_size_that_a_config_does_not_declare_is_said(tmp_path: Path) -> None:
    model, batch = lively(Qwen2ForCausalLM(Qwen2Config(**TINY))), batches()[0]
    units = find_units(model, batch)
    assert remove(model, units, every_second(units)) == ""
    model.save_pretrained(tmp_path)
    again = loaded(Qwen2ForCausalLM, tmp_path)
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch))


def test_what_no_config_can_say_is_said_and_leaves_the_config_alone() -> None:
    model, batch = lively(llama()), batches()[0]
    units = find_units(model, batch)
    keep = units.all()
    keep["model.layers.0.mlp:neuron"][3] = False
    assert "different numbers of neurons" in remove(model, units, keep)
    assert model.config.intermediate_size == 24
    model = lively(bert())
    units = find_units(model, batch)
    assert "BertConfig cannot say this shape" in remove(model, units, every_second(units))
    assert model.config.num_attention_heads == 4


def test_as_zeros_keeps_the_shape_and_the_checkpoint(tmp_path: Path) -> None:
    model, batch = lively(bert()), batches()[0]
    units = find_units(model, batch)
    keep = every_second(units)
    before = parameters(model)
    assert remove(model, units, keep, as_zeros=True) == ""
    assert parameters(model) == before
    query = model.encoder.layer[0].attention.self.query
    assert not query.weight[8:16].any()
    assert not query.bias[8:16].any()
    assert not model.encoder.layer[0].output.dense.weight[:, 1::2].any()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(loaded(BertModel, tmp_path), batch), outputs(model, batch))


def test_the_last_unit_of_a_family_cannot_go() -> None:
    model = llama()
    units = find_units(model, batches()[0])
    keep = units.all()
    keep["model.layers.0.mlp:neuron"][:] = False
    with pytest.raises(ValueError, match=r"no unit of model\.layers\.0\.mlp would be left"):
        remove(model, units, keep)


# choosing


def family(name: str, kind: str, count: int, cost: int) -> Family:
    return Family(name, kind, count, (Part(name, "in", 1),), cost)


def test_the_lowest_go_until_the_share_is_reached_and_one_always_stays() -> None:
    units = Units((family("a", "head", 3, 10), family("b", "neuron", 5, 2)), {})
    worth = {"a:head": torch.tensor([0.0, 1.0, 2.0]), "b:neuron": torch.tensor([5.0, 5.0, 5.0, 0.5, 9.0])}
    keep = choose(units, worth, 0.3)  # 12 of 40: a[0] and b[3]
    assert keep["a:head"].tolist() == [False, True, True]
    assert keep["b:neuron"].tolist() == [True, True, True, False, True]
    keep = choose(units, worth, 0.99)
    assert keep["a:head"].tolist() == [False, False, True]
    assert keep["b:neuron"].tolist() == [False] * 4 + [True]


def test_equals_go_from_the_end_and_layers_stay_alike_when_asked() -> None:
    units = Units((family("a", "neuron", 5, 1), family("b", "neuron", 5, 1)), {})
    worth = {"a:neuron": torch.zeros(5), "b:neuron": torch.zeros(5)}
    assert choose(units, worth, 0.3)["b:neuron"].tolist() == [True, True, False, False, False]
    keep = choose(units, worth, 0.4, uniform=True)
    assert keep["a:neuron"].tolist() == keep["b:neuron"].tolist() == [True, True, True, False, False]
    keep = choose(units, worth, 0.4, uniform=True, multiple=4, frozen={"b:neuron"})
    assert keep["a:neuron"].tolist() == [True, True, True, True, False]
    assert keep["b:neuron"].all()


# the objective


def test_the_loss_is_that_of_the_next_token_without_padding() -> None:
    model, batch = lively(llama()), batches(1)[0]
    expected = model(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(Objective(model, [batch])(model, 0), expected)
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(2, 3, dtype=torch.int64)], 1),
        "attention_mask": torch.cat([torch.ones(2, 12), torch.zeros(2, 3)], 1).long(),
    }
    torch.testing.assert_close(Objective(model, [padded])(model, 0), expected)


def test_calibration_that_gives_no_number_is_refused() -> None:
    model, data = llama(), batches()
    with pytest.raises(UnfitCalibration, match="there is none"):
        Objective(model, [])
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(UnfitCalibration, match="batch 0 is not a number"):
        Objective(model, data)


# Bonsai


def test_bonsai_finds_planted_dead_units_exactly() -> None:
    data = batches(2, 4, 16)
    model = trained(data)
    units = find_units(model, data[0])
    alive = plant_dead(model, units)
    expected = outputs(model, data[0])
    bonsai = Bonsai(samples=60, fraction=0.1, multiple=1, utility="match")
    report = bonsai.apply(model, units, data, 0.25, 0)
    torch.testing.assert_close(outputs(model, data[0]), expected, rtol=1e-5, atol=1e-5)
    assert [row.after for row in report.rows] == [int(alive[f.key].sum()) for f in units.families] == [3, 18, 3, 18]
    assert report.parameters_before - report.parameters_after == units.removed(alive)
    assert report.sparsity == 0.25
    again = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(again, data[0]), expected, rtol=1e-5, atol=1e-5)


def test_bonsai_is_better_than_taking_the_other_units() -> None:
    data = batches(2, 4, 16)
    model = trained(data)
    units = find_units(model, data[0])
    worse = copy.deepcopy(model)
    Bonsai(samples=60, fraction=0.1, multiple=1).apply(model, units, data, 0.3, 0)
    prior = activity(worse, units, units.all(), data)
    remove(worse, units, choose(units, {key: -value for key, value in prior.items()}, 0.3))
    assert Objective(model, data).dense_value < Objective(worse, data).dense_value


def test_bonsai_is_the_same_for_the_same_seed_and_takes_its_options() -> None:
    data = batches()
    start = lively(bert())
    units = find_units(start, data[0])
    bonsai = Bonsai(samples=20, rounds=2, uniform=True, multiple=8, as_zeros=True)
    models = [copy.deepcopy(start) for _ in range(3)]
    reports = [bonsai.apply(m, units, data, 0.5, seed) for m, seed in zip(models, (7, 7, 8), strict=True)]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert {row.after for row in reports[0].rows if row.kind == "head"} == {2}
    assert {row.after for row in reports[0].rows if row.kind == "neuron"} == {16}  # 12, rounded up to a multiple of 8
    assert reports[0].as_zeros  # (2 * 1048 + 8 * 65) of (4 * 1048 + 24 * 65) parameters
    assert any(note.startswith("45.5% went, 50.0% was asked") for note in reports[0].notes)
    assert any("utility is match" in note for note in reports[0].notes)


def test_bonsai_leaves_a_model_at_sparsity_zero() -> None:
    data, model = batches(), lively(llama())
    units = find_units(model, data[0])
    before = outputs(model, data[0])
    report = Bonsai().apply(model, units, data, 0.0, 0)
    assert report.sparsity == 0
    assert torch.equal(outputs(model, data[0]), before)


@pytest.mark.parametrize(("count", "size"), [(80, 10), (40, 100)])
def test_the_regression_recovers_a_linear_utility(count: int, size: int) -> None:
    kept = torch.randint(0, 2, (count // 2, size)).double() * 2 - 1
    kept = torch.stack([kept, -kept], 1).flatten(0, 1)
    true = torch.zeros(size, dtype=torch.float64)
    true[:3] = torch.tensor([5.0, -4.0, 3.0])
    found = fit(kept, kept @ true + 2.0)
    assert found[:3].abs().min() > found[3:].abs().max()
    assert found[:3].sign().tolist() == [1, -1, 1]


def test_activity_is_wandas_score_summed_over_the_columns_of_a_unit() -> None:
    model, data = lively(llama()), batches(2)
    units = find_units(model, data[0])
    attention = units.families[0]
    seen: list[torch.Tensor] = []
    reader = model.model.layers[0].self_attn.o_proj
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for batch in data:
        outputs(model, batch)
    handle.remove()
    x = torch.cat(seen)
    weight = reader.weight.detach()
    expected = []
    for u in range(4):
        columns = range(8 * u, 8 * u + 8)
        expected.append(sum(float(x[:, j].norm()) * float(weight[i, j].abs()) for j in columns for i in range(32)))
    with torch.no_grad():
        found = activity(model, units, units.all(), data)[attention.key]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


# LoRAPrune


def test_loraprune_finds_planted_dead_units_exactly() -> None:
    data = batches(2, 4, 16)
    model = trained(data)
    units = find_units(model, data[0])
    alive = plant_dead(model, units)
    expected = outputs(model, data[0])
    method = LoraPrune(frozen=0, steps=30, every=5, multiple=1, merge=False)
    report = method.apply(model, units, data, 0.25, 0)
    torch.testing.assert_close(outputs(model, data[0]), expected, rtol=1e-5, atol=1e-5)
    assert report.parameters_before - report.parameters_after == units.removed(alive)
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(again, data[0]), expected, rtol=1e-5, atol=1e-5)


def test_loraprune_merges_what_it_trained_and_is_seeded() -> None:
    data = batches(2, 4, 16)
    start = lively(llama())
    units = find_units(start, data[0])
    models = [copy.deepcopy(start) for _ in range(3)]
    for model, seed, merge in zip(models, (1, 1, 1), (True, True, False), strict=True):
        LoraPrune(steps=40, lr=1e-2, merge=merge).apply(model, units, data, 0.2, seed)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert Objective(models[0], data).dense_value < Objective(models[2], data).dense_value


def test_loraprune_leaves_the_last_layer_whole_and_reaches_the_share_in_the_others() -> None:
    data, model = batches(), lively(llama(num_hidden_layers=3))
    units = find_units(model, data[0])
    report = LoraPrune(steps=10, multiple=1).apply(model, units, data, 0.5, 0)
    assert [row.after for row in report.rows] == [1, 6, 1, 6, 4, 24]
    assert report.sparsity == 0.5
    assert not any("asked" in note for note in report.notes)
    with pytest.raises(BadRecipe, match="set frozen to 0"):
        LoraPrune().apply(model, find_units(model, data[0]), data, 0.9, 0)


def test_the_importance_is_that_of_the_formula() -> None:
    layer = nn.Linear(5, 4)
    adapter = Adapter(layer, 2, 6.0, torch.Generator().manual_seed(0))
    assert not adapter.importance().any()
    with torch.no_grad():
        adapter.b.normal_()
    adapter.a.grad, adapter.b.grad = torch.randn(2, 5), torch.randn(4, 2)
    found = adapter.importance()
    a, b, da, db = adapter.a.detach(), adapter.b.detach(), adapter.a.grad, adapter.b.grad
    for n in range(4):
        for k in range(5):
            slope = sum(float(db[n, r] * a[r, k] + b[n, r] * da[r, k] - db[n, r] * da[r, k]) for r in range(2))
            weight = float(layer.weight.detach()[n, k]) + 3.0 * sum(float(b[n, r] * a[r, k]) for r in range(2))
            assert float(found[n, k]) == pytest.approx(abs(slope * weight), rel=1e-4, abs=1e-6)


def test_loraprune_feels_gradients_too_small_for_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    data, found = batches(1, 8, 32), []
    start = lively(llama())
    for dtype in (torch.float32, torch.float16):
        model = copy.deepcopy(start)
        with torch.no_grad():
            model.lm_head.weight *= 2.0**-13
        model.to(dtype)
        slopes: list[torch.Tensor] = []

        def see(self: Adapter, to: list[torch.Tensor] = slopes) -> torch.Tensor:
            assert self.b.grad is not None
            to.append(self.b.grad.flatten().clone())
            return torch.ones(len(self.b), self.a.shape[1])

        monkeypatch.setattr(Adapter, "importance", see)
        LoraPrune(steps=1, merge=False).apply(model, find_units(model, data[0]), data, 0.2, 0)
        found.append(torch.cat(slopes))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


@pytest.mark.parametrize(("lr", "dtype"), [(1e37, torch.float32), (1e6, torch.float16)])
def test_adapters_that_are_not_finite_are_not_merged(lr: float, dtype: torch.dtype) -> None:
    data, model = batches(), lively(llama())
    units = find_units(model, data[0])
    model.to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFinite, match="the trained adapter of"):
        LoraPrune(steps=4, every=2, lr=lr).apply(model, units, data, 0.2, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_ramp_is_cubic_between_warm_up_and_cool_down() -> None:
    method = LoraPrune(steps=100)
    assert [method.ramp(step) for step in (0, 10, 50, 90, 100)] == [0, 0, 1 - 0.5**3, 1, 1]


def test_loraprune_needs_a_loss() -> None:
    data, model = batches(), bert()
    with pytest.raises(UnfitModel, match="no loss to take gradients of"):
        LoraPrune(frozen=0).apply(model, find_units(model, data[0]), data, 0.5, 0)


# SliceGPT

NO_UNITS = Units((), {})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        SliceGPT(allow_growth=True),
        SliceGPT(allow_growth=True, slice_head=True, orientation="random"),
        SliceGPT(allow_growth=True, rotation="shared"),
    ],
    ids=["block", "head", "shared"],
)
def test_slicing_nothing_changes_nothing(method: SliceGPT, tied: bool) -> None:
    model, data = lively(llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)), batches()
    expected = outputs(model, data[1])
    report = method.apply(model, NO_UNITS, data, 0.0, 0)
    torch.testing.assert_close(outputs(model, data[1]), expected, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    change = sum(row.parameters_after - row.parameters_before for row in report.rows)
    assert report.parameters_after - report.parameters_before == change + tied * 64 * 32


def test_directions_that_the_stream_never_takes_are_sliced_for_free() -> None:
    model, data = lively(llama()), batches(4)
    hidden = torch.linalg.qr(torch.randn(32, 32)).Q[:, :20]  # the stream lives in 20 of 32 dimensions
    project = hidden @ hidden.t()
    with torch.no_grad():
        embedding = model.model.embed_tokens
        embedding.weight.copy_(embedding.weight @ project)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(project @ writer.weight)
    expected, other = outputs(model, data[0]), copy.deepcopy(model)
    report = SliceGPT(slice_head=True).apply(model, NO_UNITS, data, 0.25, 0)
    torch.testing.assert_close(outputs(model, data[0]), expected, rtol=1e-3, atol=1e-3)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (24, 24)
    assert model.lm_head.weight.shape == (64, 24)
    assert isinstance(model.model.layers[0], SlicedLayer)
    assert "no config can say" in report.unsaved
    assert report.parameters_after < report.parameters_before
    SliceGPT(rotation="shared").apply(other, NO_UNITS, data, 0.25, 0)
    torch.testing.assert_close(outputs(other, data[0]), expected, rtol=1e-3, atol=1e-3)
    again = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(again, data[0]), outputs(model, data[0]), rtol=1e-5, atol=1e-5)


def test_pca_loses_less_than_cutting_the_last_features() -> None:
    data = batches(2, 4, 16)
    model = trained(data)
    cut = copy.deepcopy(model)
    with torch.no_grad():  # the same width, without a rotation
        cut.model.embed_tokens.weight[:, 24:] = 0
        for layer in cut.model.layers:
            layer.self_attn.o_proj.weight[24:] = 0
            layer.mlp.down_proj.weight[24:] = 0
    SliceGPT(allow_growth=True).apply(model, NO_UNITS, data, 0.25, 0)
    assert Objective(model, data).dense_value < Objective(cut, data).dense_value


def test_one_rotation_for_all_is_a_plain_checkpoint(tmp_path: Path) -> None:
    model, data = lively(llama(tie_word_embeddings=True)), batches()
    report = SliceGPT(rotation="shared").apply(model, NO_UNITS, data, 0.3, 0)
    assert report.unsaved == ""
    assert model.config.hidden_size == 16  # 22 rounded down to a multiple of 8
    model.save_pretrained(tmp_path)
    again = loaded(LlamaForCausalLM, tmp_path)
    torch.testing.assert_close(outputs(again, data[0]), outputs(model, data[0]))
    again = torch.compile(again, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(again, data[0]), outputs(model, data[0]), rtol=1e-5, atol=1e-5)


def test_slicegpt_is_the_same_for_the_same_seed() -> None:
    start, data = lively(llama()), batches()
    states = []
    for seed in (3, 3, 4):
        model = copy.deepcopy(start)
        SliceGPT(orientation="random").apply(model, NO_UNITS, data, 0.5, seed)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["model.embed_tokens.weight"], states[2]["model.embed_tokens.weight"])


def test_padding_does_not_move_the_rotation() -> None:
    start, data = lively(llama()), batches(2)
    padded = [
        {
            "input_ids": torch.cat([batch["input_ids"], torch.full((2, 5), 9)], 1),
            "attention_mask": torch.cat([torch.ones(2, 12), torch.zeros(2, 5)], 1).long(),
        }
        for batch in data
    ]
    models = [copy.deepcopy(start) for _ in range(2)]
    for model, given in zip(models, (data, padded), strict=True):
        SliceGPT().apply(model, NO_UNITS, given, 0.5, 0)
    torch.testing.assert_close(outputs(models[0], data[0]), outputs(models[1], data[0]), rtol=1e-3, atol=1e-3)


def test_a_model_that_would_grow_is_refused_and_untouched() -> None:
    model, data = lively(llama(tie_word_embeddings=True)), batches()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelWouldGrow, match="embeddings are untied and shortcuts hold two matrices a layer"):
        SliceGPT().apply(model, NO_UNITS, data, 0.25, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_that_a_rotation_does_not_pass_through_are_refused() -> None:
    data = batches()
    method = SliceGPT(allow_growth=True)
    with pytest.raises(UnfitModel, match="not built of embed_tokens, layers, norm and lm_head"):
        method.apply(gpt2(), NO_UNITS, data, 0.25, 0)
    gemma = GemmaForCausalLM(GemmaConfig(**TINY, head_dim=4))
    with pytest.raises(UnfitModel, match="not plain RMSNorms"):
        method.apply(lively(gemma), NO_UNITS, data, 0.25, 0)

    class Scaled(nn.Module):
        """A layer that adds half of what its attention gives, as Granite's does."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            for name, child in layer.named_children():
                self.add_module(name, child)

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            parts: Any = self
            added = parts.self_attn(hidden_states=parts.input_layernorm(hidden_states), **kwargs)[0]
            stream = hidden_states + 0.5 * added
            result: torch.Tensor = stream + parts.mlp(parts.post_attention_layernorm(stream))
            return result

    model = lively(llama())
    model.model.layers[1] = Scaled(model.model.layers[1])
    with pytest.raises(UnfitModel, match="its layers are not h \\+ attention"):
        method.apply(model, NO_UNITS, data, 0.25, 0)
    with pytest.raises(UnfitCalibration, match="there is none"):
        method.apply(llama(), NO_UNITS, [], 0.25, 0)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"method": "bonsai", "fraction": 0}, "fraction of step 1 is 0, but must be greater than 0"),
        ({"method": "bonsai", "rounds": -1}, "rounds"),
        ({"method": "bonsai", "samples": -3}, "samples"),
        ({"method": "bonsai", "batches": 0}, "batches"),
        ({"method": "bonsai", "multiple": 0}, "multiple"),
        ({"method": "bonsai", "utility": "lo"}, "'loss' or 'match'"),
        ({"method": "loraprune", "rank": 0}, "rank"),
        ({"method": "loraprune", "alpha": 0}, "alpha"),
        ({"method": "loraprune", "lr": 0}, "lr"),
        ({"method": "loraprune", "steps": 0}, "steps"),
        ({"method": "loraprune", "every": 0}, "every"),
        ({"method": "loraprune", "decay": 1}, "decay"),
        ({"method": "loraprune", "warm": 0.6}, "warm"),
        ({"method": "loraprune", "frozen": 2}, "frozen"),
        ({"method": "loraprune", "multiple": 0}, "multiple"),
        ({"method": "slicegpt", "rotation": "none"}, "'block' or 'shared'"),
        ({"method": "slicegpt", "orientation": "x"}, "'pca' or 'random'"),
        ({"method": "slicegpt", "multiple": 0}, "multiple"),
    ],
)
def test_options_out_of_bounds_are_refused_as_the_recipe_is_read(step: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRecipe, match=words):
        Recipe.load(step)


def test_structured_methods_are_registered_and_report_json() -> None:
    for name, cls in {"bonsai": Bonsai, "loraprune": LoraPrune, "slicegpt": SliceGPT}.items():
        assert method_class(name) is cls
        assert cls.role == "structure"
        assert len((cls.__doc__ or "").splitlines()[0]) <= 75
    model, data = lively(llama()), batches()
    report = SliceGPT(allow_growth=True).apply(model, NO_UNITS, data, 0.5, 0).to_dict()
    assert report["sparsity"] == 0.5
    assert report["rows"][1]["name"] == "layers.0"
