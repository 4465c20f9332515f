"""Gates as modules: each form against a few lines of plain Python, and that a gated model stays plain PyTorch."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsec.passes.gates.forms import KINDS, Centred, Gate, GroupTopK, Threshold, TopK, made, tokens_of
from sparsec.passes.gates.histogram import Histogram
from sparsec.passes.gates.layers import (
    GatedActivation,
    GatedLinear,
    described,
    gated_tokens,
    gates_of,
    linked,
    put,
    refusal,
    removed,
    restored,
)
from sparsec.passes.gates.neurons import CoreNeurons, FirstNeurons, Shadow, ToldNeurons, reset_neurons
from sparsec.passes.gates.predictor import LowRank, Signs, seeded
from sparsec.passes.quantize.inputs import quantize_inputs, quantized

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
ROWS = st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8), min_size=1, max_size=4)


def low_rank() -> LowRank:
    gate = LowRank(8, 6, 3)
    seeded(gate, 0)
    return gate


# ------------------------------------------------------------------------------------------------------------- forms


@SETTINGS
@given(rows=ROWS, t=st.floats(0, 1e3, width=32))
def test_a_threshold_keeps_what_is_larger_and_nothing_else(rows: list[list[float]], t: float) -> None:
    found = Threshold.at(t)(torch.tensor(rows))
    assert found.tolist() == [[x if abs(x) > t else 0.0 for x in row] for row in rows]


@SETTINGS
@given(rows=ROWS, seed=st.integers(0, 99))
def test_a_threshold_of_each_channel_is_compared_with_its_own_channel(rows: list[list[float]], seed: int) -> None:
    t = torch.rand(8, generator=torch.Generator().manual_seed(seed)) * 500
    found = Threshold.at(t)(torch.tensor(rows))
    assert found.tolist() == [[x if abs(x) > u else 0.0 for x, u in zip(row, t.tolist(), strict=True)] for row in rows]


@SETTINGS
@given(rows=ROWS, c=st.floats(-10, 10, width=32), t=st.floats(0, 100, width=32))
def test_a_centred_gate_and_its_folded_bias_are_the_layer_where_nothing_is_near(
    rows: list[list[float]], c: float, t: float
) -> None:
    x = torch.tensor(rows)
    layer = nn.Linear(8, 3)
    dense = copy.deepcopy(layer).double()
    put(layer, "", "input", Centred.at(c, t))
    off = [[v if abs(v) > t else 0.0 for v in (x[i] - torch.tensor(c)).tolist()] for i in range(len(x))]
    told = dense(torch.tensor(off).double() + c)  # zero stands for the centre
    assert torch.allclose(layer(x).double(), told, atol=1e-5 * float(x.abs().max() + abs(c) + 1))


@SETTINGS
@given(rows=ROWS, k=st.integers(1, 8))
def test_top_k_keeps_the_k_largest_of_each_token(rows: list[list[float]], k: int) -> None:
    x = torch.tensor(rows)
    found = TopK(k)(x)
    for row, kept in zip(rows, found.tolist(), strict=True):
        limit = sorted(map(abs, row))[-k]
        assert all(a in (0.0, b) for a, b in zip(kept, row, strict=True))
        assert sum(a != 0 for a in kept) <= k
        assert all(a == b for a, b in zip(kept, row, strict=True) if abs(b) > limit)
        assert sum(a == b for a, b in zip(kept, row, strict=True)) >= k


@SETTINGS
@given(rows=ROWS, pattern=st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8), (8, 8)]))
def test_n_of_m_is_top_n_of_each_group_alone(rows: list[list[float]], pattern: tuple[int, int]) -> None:
    n, m = pattern
    x = torch.tensor(rows)
    found = GroupTopK(n, m)(x)
    for start in range(0, 8, m):
        part = slice(start, start + m)
        assert torch.equal(found[:, part], TopK(n)(x[:, part].contiguous()))


def test_n_of_m_reads_inputs_of_any_strides() -> None:
    x = torch.randn(4, 6, 16)[:, ::2].transpose(0, 1)
    assert torch.equal(GroupTopK(2, 4)(x), GroupTopK(2, 4)(x.contiguous()))


@SETTINGS
@given(
    k=st.integers(1, 21),
    n=st.integers(1, 5),
    seed=st.integers(0, 99),
    alpha=st.sampled_from([0.5, 1.0, 1.5]),
)
def test_signs_count_what_a_loop_over_sign_bits_counts(k: int, n: int, seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(n, k, generator=generator), torch.randn(3, k, generator=generator)
    x[0, ::2] = 0.0
    gate = Signs.of(weight, alpha)
    y = torch.ones(3, n)
    told = []
    for row in x.tolist():
        counts = [sum((a < 0) != (b < 0) for a, b in zip(row, w, strict=True)) for w in weight.tolist()]
        told.append([0.0 if c > alpha * (k - c) else 1.0 for c in counts])
    assert gate(y, x).tolist() == told


def test_a_low_rank_gate_zeroes_the_neurons_whose_logit_is_not_above() -> None:
    gate = low_rank()
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    logits = (x @ gate.down.weight.t()) @ gate.out.weight.t()
    gate.threshold.fill_(float(logits.detach().median()))
    assert torch.equal(gate(y, x) == 0, logits <= gate.threshold)


def test_nan_is_not_above_any_threshold_and_stays_out() -> None:
    x = torch.tensor([[float("nan"), 2.0, -2.0, 0.5]])
    assert Threshold.at(1.0)(x).tolist() == [[0.0, 2.0, -2.0, 0.0]]
    assert bool(TopK(2)(x).isnan().any())  # nor is it small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_stay_fp32_when_a_model_is_cast_and_outputs_have_its_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
    put(model, "0", "input", Centred.at(0.1, 0.3))
    put(model, "0", "output", low_rank())
    put(model, "1", "activation", Threshold.at(torch.full((6,), 0.123456789)))
    put(model, "2", "input", FirstNeurons(6, 2))
    model.to(dtype)
    kept = {name: b.dtype for name, b in model.named_buffers()}
    assert set(kept.values()) == {torch.float32, torch.bool}
    assert model[1].gate.threshold[0] == torch.tensor(0.123456789)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 3, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_number_of_zero_or_more_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="number"):
        Threshold.at(bad)
    with pytest.raises(ValueError, match="number"):
        Centred.at(0.0, bad)
    with pytest.raises(ValueError, match="finite"):
        Centred.at(float("nan"), 1.0)


def test_a_top_k_wider_than_its_input_says_both_numbers() -> None:
    with pytest.raises(ValueError, match="k is 9, and activations are only 8 wide"):
        TopK(9)(torch.randn(2, 8))
    with pytest.raises(ValueError, match="1 or more"):
        TopK(0)
    with pytest.raises(ValueError, match="keeps 5 of 4"):
        GroupTopK(5, 4)


# ------------------------------------------------------------------------------------------------------ phase, tokens


def test_a_phase_gates_calls_with_one_token_or_those_with_more() -> None:
    gate = Threshold.at(1e9)
    prompt, token = torch.ones(2, 5, 4), torch.ones(2, 1, 4)
    for phase, of_prompt, of_token in (("all", 0, 0), ("decode", 1, 0), ("prefill", 0, 1)):
        gate.phase = phase
        assert float(gate(prompt).max()) == of_prompt
        assert float(gate(token).max()) == of_token
    assert tokens_of(torch.ones(4)) == 1


def test_the_last_half_leaves_the_first_half_dense_and_is_undone() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    dense = copy.deepcopy(model)
    put(model, "0", "input", Threshold.at(0.7))
    put(model, "0", "output", low_rank())
    x = torch.randn(2, 7, 8)
    whole = model(x)
    with gated_tokens(model, "last-half"):
        half = model(x)
    assert torch.equal(half[:, :3], dense(x)[:, :3])
    assert torch.equal(half[:, 3:], whole[:, 3:])
    assert torch.equal(model(x), whole)
    with pytest.raises(ValueError, match="last-half"), gated_tokens(model, "first"):
        pass


# -------------------------------------------------------------------------------------------------------- neuron sets


def test_core_neurons_are_those_most_often_among_the_largest_of_a_token() -> None:
    gate = CoreNeurons(6, kept=2, each=2)
    prompt = torch.tensor([[[9, 8, 0, 0, 0, 1], [9, 0, 0, 7, 0, 1], [0, 0, 0, -7, 6, 1], [3, 0, 0, 2, 0, 1.0]]])
    assert torch.equal(gate(prompt), prompt)  # the prompt itself is dense
    assert gate.neurons.nonzero().flatten().tolist() == [0, 3]
    token = torch.ones(1, 1, 6)
    assert gate(token).flatten().tolist() == [1, 0, 0, 1, 0, 0]


def test_zeros_are_never_core_neurons_while_others_are_active() -> None:
    gate = CoreNeurons(8, kept=2, each=6)
    prompt = torch.zeros(1, 4, 8)
    prompt[..., 5] = 1.0
    prompt[:, :2, 7] = 0.5
    gate(prompt)
    assert gate.neurons.nonzero().flatten().tolist() == [5, 7]


def test_first_neurons_are_frozen_after_the_first_tokens_however_these_come() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, 9, 5) * torch.tensor([0.1, 1.0, 2.0, 0.5, 3.0])
    whole, split = FirstNeurons(5, 4), FirstNeurons(5, 4)
    for gate in (whole, split):
        gate.threshold.fill_(0.9)
    rms = tokens[0, :4].square().mean(0).sqrt()
    told = tokens.clone()
    told[:, 4:, rms <= 0.9] = 0.0
    assert torch.equal(whole(tokens), told)
    parts = [split(tokens[:, :2]), *(split(tokens[:, i : i + 1]) for i in range(2, 9))]
    assert torch.equal(torch.cat(parts, 1), told)
    assert torch.equal(whole.neurons, rms > 0.9)


def test_another_request_and_another_batch_give_another_set_in_the_same_buffer() -> None:
    gate = CoreNeurons(16, kept=4, each=4)
    place = gate.neurons.data_ptr()
    sets = []
    for seed, batch in ((0, 1), (1, 3), (2, 2)):
        gate(torch.randn(batch, 6, 16, generator=torch.Generator().manual_seed(seed)))
        sets.append(gate.neurons.clone())
        assert int(gate.neurons.sum()) == 4
        assert int(gate(torch.ones(batch + 1, 1, 16)).count_nonzero()) == 4 * (batch + 1)
    assert gate.neurons.data_ptr() == place
    assert not torch.equal(sets[0], sets[1])
    reset_neurons(nn.Sequential(gate))
    assert bool(gate.neurons.all())


def chain() -> nn.Sequential:
    """Two layers whose second one is told its neurons at the first."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3))
    gate = Shadow(8, 4, ["3"], [6], [2])
    seeded(gate, 0)
    put(model, "3", "input", ToldNeurons(6))
    put(model, "0", "output", gate)
    linked(model)
    return model


def test_a_shadow_tells_the_neurons_of_another_layer_and_of_copies_their_own() -> None:
    model = chain()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 5, 8)
    model(x)
    scores = model[0].mask.net(x[0].mean(0))
    assert model[3].gate.neurons.nonzero().flatten().tolist() == sorted(scores.topk(2).indices.tolist())
    assert bool(twin[3].gate.neurons.all())  # the copy's set is its own
    fresh = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3))
    restored(fresh, described(twin))
    fresh.load_state_dict(twin.state_dict())
    for other in (twin, pickle.loads(pickle.dumps(twin)), fresh):
        assert torch.equal(other(x), model(x))
        assert torch.equal(other[3].gate.neurons, model[3].gate.neurons)


def test_a_shadow_whose_follower_is_missing_or_narrower_says_so() -> None:
    model = chain()
    with pytest.raises(ValueError, match="no set of 6 neurons"):
        model[0].mask.link({})
    with pytest.raises(ValueError, match="3 has no set of 6 neurons"):
        model[0].mask.link({"3": ToldNeurons(5)})


@pytest.mark.parametrize(("kept", "each"), [(9, 1), (1, 9), (0, 1)])
def test_more_core_neurons_than_there_are_is_refused(kept: int, each: int) -> None:
    with pytest.raises(ValueError, match="cannot be chosen from 8"):
        CoreNeurons(8, kept, each)


# ----------------------------------------------------------------------------------------------------- in the model


GATES: dict[str, Any] = {
    "threshold": lambda: Threshold.at(0.5),
    "mode": lambda: Centred.at(0.2, 0.5),
    "top-k": lambda: TopK(3),
    "n:m": lambda: GroupTopK(2, 4),
    "signs": lambda: Signs.of(torch.randn(6, 8)),
    "low rank": low_rank,
    "core neurons": lambda: CoreNeurons(8, 3, 3),
    "first neurons": lambda: FirstNeurons(8, 2),
    "told neurons": lambda: ToldNeurons(8),
}


def gated(kind: str, bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4))
    put(model, "0", "output" if kind in ("signs", "low rank") else "input", GATES[kind]())
    return model


def test_every_kind_of_gate_is_tried_here() -> None:
    assert {*GATES, "shadow"} == set(KINDS)  # that one has a follower, see ``chain``


@pytest.mark.parametrize("kind", GATES)
def test_a_gated_model_survives_copies_pickles_and_state_dicts(kind: str) -> None:
    torch.manual_seed(0)
    model = gated(kind)
    x = torch.randn(1, 5, 8)
    model(x)
    token = torch.randn(1, 1, 8)
    expected = copy.deepcopy(model)(token)
    fresh = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    restored(fresh, described(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(token), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(other(token), expected)
        assert described(other) == described(model)
        assert [gate.kind for _, _, gate in gates_of(other)] == [kind]


@pytest.mark.parametrize("kind", GATES)
def test_dynamo_traces_a_gate_without_a_graph_break_and_without_another_graph_for_other_values(kind: str) -> None:
    torch.manual_seed(0)
    model = gated(kind)
    prompts = [torch.randn(1, 5, 8) for _ in range(3)]
    token = torch.randn(1, 1, 8)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for prompt in prompts:
            assert torch.equal(compiled(prompt), twin(prompt))
            assert torch.equal(compiled(token), twin(token))
    assert graphs == 2  # prompts and tokens have different shapes


def test_a_shadow_and_its_follower_are_one_graph() -> None:
    model = chain()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(1, 5, 8)
            assert torch.equal(compiled(x), twin(x))
            assert torch.equal(model[3].gate.neurons, twin[3].gate.neurons)


def test_the_module_keeps_its_parameters_and_says_what_it_does() -> None:
    layer = nn.Linear(8, 4)
    weight = layer.weight
    put(layer, "", "input", Threshold.at(0.25))
    assert type(layer) is GatedLinear
    assert layer.weight is weight
    assert set(layer.state_dict()) == {"weight", "bias", "gate.threshold"}
    assert "|x| > 0.25" in repr(layer)


def test_an_activation_that_several_mlps_share_is_gated_in_one_of_them() -> None:
    act = nn.GELU()
    model = nn.ModuleDict({"a": nn.ModuleDict({"act": act}), "b": nn.ModuleDict({"act": act})})
    put(model, "b.act", "activation", Threshold.at(1.0))
    assert isinstance(model["b"]["act"], GatedActivation)
    assert model["a"]["act"] is act
    put(model, "b.act", "activation", Threshold.at(2.0))  # again: the gate changes, the activation stays
    assert model["b"]["act"].act is act
    removed(model)
    assert model["b"]["act"] is act


@pytest.mark.parametrize("bias", [True, False])
def test_what_puts_a_gate_in_can_take_it_out_again(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(3, 8)
    told = model(x)
    undo = [put(model, "0", "input", Centred.at(0.4, 0.2)), put(model, "1", "activation", Threshold.at(0.1))]
    assert not torch.equal(model(x), told)
    for one in reversed(undo):
        one()
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is nn.ReLU
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {n: t.tolist() for n, t in before.items()}
    assert torch.equal(model(x), told)


def test_gates_stand_before_the_rounding_of_inputs_and_their_zeros_stay() -> None:
    layer = nn.Linear(8, 4)
    quantize_inputs(layer)
    put(layer, "", "input", Threshold.at(0.8))
    x = torch.randn(3, 8)
    gated_x = torch.where(x.abs() > 0.8, x, 0.0)
    assert torch.equal(layer(x), nn.functional.linear(quantized(gated_x), layer.weight, layer.bias))


def test_the_conv1d_of_transformers_is_gated_too() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 8)
    x = torch.randn(2, 3, 8)
    expected = layer(torch.where(x.abs() > 0.5, x, 0.0))
    put(layer, "", "input", Threshold.at(0.5))
    assert torch.equal(layer(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    shifted = Conv1D(6, 8)
    put(shifted, "", "input", Centred.at(0.3, 0.0))
    plain = x @ shifted.weight + shifted.bias - 0.3 * shifted.weight.sum(0)
    assert torch.allclose(shifted(x), plain, atol=1e-5)


def test_layers_that_compute_something_of_their_own_are_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    own = nn.Linear(4, 4)
    own.forward = lambda x: x  # type: ignore[method-assign, assignment]
    for module, why in ((Scaled(4, 4), "Scaled"), (nn.Conv2d(4, 4, 1), "Conv2d"), (own, "replaced")):
        assert why in refusal(module, "input")
        with pytest.raises(ValueError, match=why):
            put(module, "", "input", Threshold.at(0.5))


@pytest.mark.parametrize(
    ("gate", "place", "words"),
    [
        (Threshold.at(torch.ones(7)), "input", "7 wide, and what it would act on is 8 wide: it is of another model"),
        (CoreNeurons(5, 2, 2), "input", "5 wide"),
        (Signs(8, 7), "output", "7 wide, and what it would act on is 6 wide"),
        (LowRank(9, 6, 2), "output", "reads 9 features, and the layer has 8: it is of another model"),
    ],
)
def test_a_gate_of_another_width_is_refused_in_a_sentence(gate: Gate, place: Any, words: str) -> None:
    layer = nn.Linear(8, 6)
    with pytest.raises(ValueError, match=words):
        put(layer, "", place, gate)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    "said",
    [
        {"kind": "sparkle"},
        {"kind": "top-k"},
        {"kind": "top-k", "k": 2, "n": 3},
        {"kind": "threshold", "channels": 0, "phase": "never"},
    ],
)
def test_what_tells_of_no_gate_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gate"):
        made(said)


def test_gates_that_do_not_fit_leave_the_model_as_it_was() -> None:
    rows = [
        {"name": "0", "place": "input", "gate": Threshold.at(0.1).said},
        {"name": "9", "place": "input", "gate": Threshold.at(0.1).said},
    ]
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no module '9'"):
        restored(model, rows)
    assert type(model[0]) is nn.Linear


# --------------------------------------------------------------------------------------------------------- histograms


@SETTINGS
@given(
    seed=st.integers(0, 999),
    share=st.floats(0, 1),
    centre=st.sampled_from([0.0, 0.3, -2.0]),
    zeros=st.floats(0, 0.9),
    power=st.integers(-8, 8),
)
def test_a_share_found_by_the_histogram_is_the_share_that_a_count_finds(
    seed: int, share: float, centre: float, zeros: float, power: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20_000, generator=generator) * 2.0**power
    x[torch.rand(20_000, generator=generator) < zeros] = 0.0
    x[0] = 1e30  # an outlier that would leave equal bins no resolution
    seen = Histogram()
    seen.add(x[:7000])
    seen.add(x[7000:])
    assert seen.count == 20_000
    t = seen.within(share, centre)
    found = float(((x - centre).abs() <= t).float().mean())
    at_zero = float(((x - centre).abs() < t).float().mean())  # a point mass may overshoot, never undershoot
    assert found >= share - 0.004
    assert at_zero <= share + 0.004


def test_exact_zeros_need_no_threshold() -> None:
    seen = Histogram()
    seen.add(torch.tensor([0.0] * 60 + [1.0] * 40))
    assert seen.within(0.6) == 0.0
    assert seen.within(0.0) == 0.0
    assert seen.within(0.8) == pytest.approx(1.0, rel=0.01)
    assert Histogram().within(0.5) == 0.0
    assert Histogram().peak() == 0.0


def test_quantiles_and_the_peak_of_a_density_are_where_they_are() -> None:
    torch.manual_seed(0)
    x = torch.cat([0.05 * torch.randn(60_000) - 0.17, 2.0 * torch.rand(40_000) ** 2])
    seen = Histogram()
    seen.add(x)
    for share in (0.1, 0.5, 0.9):
        assert seen.quantile(share) == pytest.approx(float(x.quantile(share)), abs=0.003)
    assert seen.peak() == pytest.approx(-0.17, abs=0.02)
    assert math.isfinite(seen.within(1.0))


def test_a_histogram_takes_no_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Histogram().add(torch.tensor([1.0, float("nan")]))
