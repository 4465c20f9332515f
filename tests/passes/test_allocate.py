"""Allocators: what they keep (the mean, or the time), whom they spare, and that the model is as it was afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsec.errors import BadRecipe, NonFinite, UnprunableLayer
from sparsec.passes.masks import method_class
from sparsec.passes.masks.allocate.besa import BESA, _error, _Layer
from sparsec.passes.masks.allocate.budget import GRID, Time
from sparsec.passes.masks.allocate.contract import Allocator, Dense, Learns, Measured, Measures
from sparsec.passes.masks.allocate.owl import OWL
from sparsec.passes.masks.allocate.spread import counts_of, importance, keep_of_m, shift_to_mean
from sparsec.passes.masks.allocate.uniform import Uniform
from sparsec.passes.masks.block import Batch, LayerState
from sparsec.passes.masks.magnitude import Magnitude
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector, select

unhurried = settings(deadline=None, max_examples=60)
Seconds = Callable[[str, float], float]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_layer(name: str, n: int = 12, k: int = 20, seed: int = 0, heavy: float = 0.0) -> Dense:
    """A layer; ``heavy`` is the share of its inputs that are thirty times as large as the others."""
    generator = seeded(seed)
    x = torch.randn(64, k, generator=generator)
    x[:, : int(heavy * k)] *= 30
    weight = torch.randn(n, k, generator=generator)
    return Dense(name, weight, {"sum_x2": x.square().sum(0)})


def owl_blocks(ratios: Sequence[float], sizes: Sequence[int]) -> list[Measured]:
    return [
        Measured(f"b{i}", ((f"b{i}.q", size // 2), (f"b{i}.up", size - size // 2)), {"outliers": ratio})
        for i, (ratio, size) in enumerate(zip(ratios, sizes, strict=True))
    ]


def mean_of(spread: Mapping[str, float], blocks: Sequence[Measured]) -> float:
    sizes = {name: size for block in blocks for name, size in block.layers}
    assert set(spread) == set(sizes)
    return math.fsum(spread[name] * size for name, size in sizes.items()) / sum(sizes.values())


# ---- registration


@pytest.mark.parametrize("name", ["uniform", "owl", "besa", "time"])
def test_every_allocator_is_registered_and_is_one_of_the_two_kinds(name: str) -> None:
    cls: type[Allocator] = method_class(name)
    assert cls.role == "allocate"
    assert cls.keeps in ("mean", "time")
    method = cls()
    assert isinstance(method, Learns) != isinstance(method, Measures)
    assert len((cls.__doc__ or "").splitlines()[0]) <= 75
    assert set(cls.needs) <= {"sum_x2"}


def test_uniform_gives_every_layer_what_was_asked() -> None:
    blocks = owl_blocks([1, 2], [100, 300])
    assert Uniform().measure([dense_layer("x")]) == {}
    assert set(Uniform().allocate(blocks, 0.3).sparsity.values()) == {0.3}


# ---- exact means


@unhurried
@given(
    st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 10**6)), min_size=1, max_size=30),
    st.floats(0, 0.999),
)
def test_shifted_shares_have_the_mean_and_stay_in_bounds(pairs: list[tuple[float, int]], mean: float) -> None:
    values, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    shares = shift_to_mean(values, weights, mean)
    assert float(shares @ weights / weights.sum()) == pytest.approx(mean, abs=1e-12)
    assert min(0.01, mean) - 1e-12 <= float(shares.min())
    assert float(shares.max()) <= max(0.99, mean) + 1e-12
    order = values.argsort(stable=True)
    assert bool((shares[order].diff() >= -1e-15).all())


def test_shares_inside_the_bounds_are_only_shifted() -> None:
    values = torch.tensor([0.0, 0.1, -0.05])
    shares = shift_to_mean(values, torch.ones(3), 0.5)
    assert torch.allclose(shares.diff(), values.double().diff(), atol=1e-15)


@unhurried
@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(1, 400)), min_size=1, max_size=40))
def test_counts_add_up_and_are_within_one_of_their_share(pairs: list[tuple[float, int]]) -> None:
    shares, sizes = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    mean = float(shares @ sizes / sizes.sum())
    counts = counts_of(shares, sizes, mean)
    assert int(counts.sum()) == math.floor(mean * int(sizes.sum()) + 0.5)
    assert float((counts - shares * sizes).abs().max()) <= 1.0
    assert bool((counts >= 0).all())
    assert bool((counts <= sizes).all())


@unhurried
@given(
    st.lists(st.tuples(st.floats(0.05, 0.95), st.integers(10, 1000)), min_size=1, max_size=20),
    st.sampled_from([2, 4, 8, 16, 32]),
)
def test_n_of_m_keeps_the_mean_within_half_a_step_of_one_layer(pairs: list[tuple[float, int]], m: int) -> None:
    sparsity = {str(i): share for i, (share, _) in enumerate(pairs)}
    weights = {str(i): size for i, (_, size) in enumerate(pairs)}
    kept = keep_of_m(sparsity, weights, m)
    off = sum(weights[n] * (kept[n] / m - (1 - sparsity[n])) for n in sparsity)
    assert all(1 <= n <= m for n in kept.values())
    movable = [weights[n] for n in kept if 1 <= kept[n] + (-1 if off > 0 else 1) <= m]
    assert not movable or abs(off) <= min(movable) / (2 * m) + 1e-9


def test_n_of_m_keeps_the_order_of_equal_layers() -> None:
    spread = {"a": 0.42, "b": 0.47, "c": 0.5, "d": 0.53, "e": 0.58}
    kept = keep_of_m(spread, dict.fromkeys(spread, 100), 16)
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    assert sum(kept.values()) == 5 * 8
    assert set(keep_of_m(spread, dict.fromkeys(spread, 100), 4).values()) == {2}


# ---- owl


def outlier_ratio_by_loops(layers: Sequence[Dense], m: float) -> float:
    """A_l as the paper writes it, weight by weight."""
    scores = [
        abs(float(layer.weight[i, j])) * math.sqrt(float(layer.stats["sum_x2"][j]))
        for layer in layers
        for i in range(layer.weight.shape[0])
        for j in range(layer.weight.shape[1])
    ]
    mean = sum(scores) / len(scores)
    return 100.0 * sum(score > m * mean for score in scores) / len(scores)


@pytest.mark.parametrize("m", [1.5, 3.0, 5.0])
def test_owl_counts_the_outliers_of_all_layers_of_a_block_together(m: float) -> None:
    layers = [dense_layer("q", heavy=0.2), dense_layer("up", n=30, seed=1), dense_layer("down", k=7, seed=2)]
    expected = outlier_ratio_by_loops(layers, m)
    assert 0 < expected < 100
    assert OWL(m=m).measure(layers) == {"outliers": pytest.approx(expected, abs=1e-9)}


def test_owl_of_a_block_of_zeros_has_no_outliers() -> None:
    layer = dense_layer("q")
    zero = Dense("q", torch.zeros_like(layer.weight), layer.stats)
    assert OWL().measure([zero, zero]) == {"outliers": 0.0}


@unhurried
@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(10, 10**5)), min_size=2, max_size=12),
    st.floats(0.2, 0.8),
)
def test_owl_keeps_the_mean_the_range_and_the_order(pairs: list[tuple[float, int]], sparsity: float) -> None:
    ratios, sizes = zip(*pairs, strict=True)
    blocks = owl_blocks(ratios, sizes)
    spread = OWL(flat=1.0, lam=0.08).allocate(blocks, sparsity).sparsity
    assert mean_of(spread, blocks) == pytest.approx(sparsity, abs=1e-12)
    shares = [spread[f"b{i}.q"] for i in range(len(ratios))]
    assert all(spread[f"b{i}.up"] == share for i, share in enumerate(shares))
    if max(ratios) == min(ratios):
        assert set(shares) == {sparsity}
        return
    assert max(shares) - min(shares) == pytest.approx(0.16, abs=1e-12)
    for i, share in enumerate(shares):
        density = 0.16 * ((ratios[i] - min(ratios)) / (max(ratios) - min(ratios)))
        assert share == pytest.approx(max(shares) - density, abs=1e-12)


def test_owl_clips_without_losing_the_mean_and_says_so() -> None:
    blocks = owl_blocks([1.0, 2.0, 10.0], [100, 100, 200])
    found = OWL(lam=0.3).allocate(blocks, 0.8)
    assert mean_of(found.sparsity, blocks) == pytest.approx(0.8, abs=1e-12)
    assert max(found.sparsity.values()) == pytest.approx(0.99)
    assert "clipped" in found.notes[0]


@pytest.mark.parametrize(
    ("ratios", "is_flat"), [((1.09, 1.56, 1.2), True), ((1.0, 4.5, 2.0), False), ((0, 0, 0), True), ((0, 0, 1), False)]
)
def test_owl_spreads_nothing_where_the_ratios_are_flat(ratios: tuple[float, ...], is_flat: bool) -> None:
    blocks = owl_blocks(ratios, [64, 64, 64])
    found = OWL().allocate(blocks, 0.7)
    assert (set(found.sparsity.values()) == {0.7}) == is_flat
    assert any("flat" in note for note in found.notes) == is_flat


def test_owl_beats_the_reversed_allocation_where_one_block_has_outliers() -> None:
    """Two chained blocks: one writes through few heavy inputs, one through many alike that say the same."""
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    x[:, :8] *= 30
    with_outliers = torch.randn(64, 64)
    factors = torch.randn(64, 64)
    even = factors / factors.abs()  # all weights alike: no outlier anywhere
    errors: dict[str, float] = {}
    inputs = {"a": x, "b": torch.randn(256, 64)}
    weights = {"a": with_outliers, "b": even}
    blocks = []
    for name, weight in weights.items():
        layer = Dense(name, weight, {"sum_x2": inputs[name].square().sum(0)})
        blocks.append(Measured(name, ((name, weight.numel()),), OWL().measure([layer])))
    spread = OWL(lam=0.15).allocate(blocks, 0.7).sparsity
    assert spread["a"] < 0.7 < spread["b"]
    for label, shares in (("owl", spread), ("reversed", {n: 1.4 - s for n, s in spread.items()})):
        errors[label] = 0.0
        for name, weight in weights.items():
            score = importance("wanda", weight, {"sum_x2": inputs[name].square().sum(0)})
            keep = select(score, MaskPattern(), shares[name], "layer")
            errors[label] += float((inputs[name] @ (weight * ~keep).t()).square().sum())
    assert errors["owl"] < 0.9 * errors["reversed"]


def test_inputs_that_are_not_finite_are_refused() -> None:
    layer = dense_layer("q")
    stats = {"sum_x2": torch.full((20,), math.inf)}
    for method in (OWL(), Time()):
        with pytest.raises(NonFinite):
            method.measure([Dense("q", layer.weight, stats)])


# ---- time


def staircase(dense: Mapping[str, float], breaks: Mapping[str, float]) -> Seconds:
    """Dense up to a layer's break-even share, from there down to 5 % of dense at 100 %."""

    def seconds(name: str, sparsity: float) -> float:
        at = breaks[name]
        part = max(sparsity - at, 0.0) / (1.0 - at) if at < 1 else 0.0
        return dense[name] * (1.0 - 0.95 * part)

    return seconds


def measured_time(layers: Sequence[Dense], seconds: Seconds | None, method: Time | None = None) -> list[Measured]:
    value = (method or Time()).measure(layers)
    return [Measured("b", tuple((layer.name, layer.weight.numel()) for layer in layers), value, seconds)]


def lost_at(layer: Dense, sparsity: float) -> float:
    """The squared Wanda scores pruned by the selector itself, scaled to a mean of one in the layer."""
    score = importance("wanda", layer.weight, layer.stats)
    keep = select(score, MaskPattern(), sparsity, "row")
    return float((score.square() * ~keep).sum() / score.square().mean())


def test_the_importance_curve_is_what_the_selector_prunes() -> None:
    layer = dense_layer("q", n=9, k=50)
    curve = Time().measure([layer])["q"]
    assert isinstance(curve, list)
    assert curve[0] == 0.0
    assert curve[-1] == 9 * 50
    for share, lost in zip(GRID[:-1], curve[:-1], strict=True):
        assert lost == pytest.approx(lost_at(layer, share), rel=1e-5)


def test_the_magnitude_curve_has_one_quota_a_layer() -> None:
    layer = dense_layer("q", n=9, k=50)
    curve = Time(judge="magnitude").measure([layer])["q"]
    assert isinstance(curve, list)
    keep = select(layer.weight.abs(), MaskPattern(), GRID[30], "layer")
    lost = float((layer.weight * ~keep).square().sum() / layer.weight.square().mean())
    assert curve[30] == pytest.approx(lost, rel=1e-5)


def five_layers() -> tuple[list[Dense], Seconds]:
    layers = [dense_layer(f"l{i}", n=10 + 6 * i, k=300, seed=i, heavy=0.1 * i) for i in range(5)]
    dense = {layer.name: layer.weight.numel() * 1e-9 for layer in layers}
    breaks = {"l0": 0.3, "l1": 0.6, "l2": 1.0, "l3": 0.1, "l4": 0.45}
    return layers, staircase(dense, breaks)


@pytest.mark.parametrize("sparsity", [0.35, 0.5, 0.7, 0.9, 0.95])
def test_time_loses_less_than_uniform_in_exactly_its_time(sparsity: float) -> None:
    layers, seconds = five_layers()
    spread = Time().allocate(measured_time(layers, seconds), sparsity).sparsity
    asked = sum(seconds(layer.name, sparsity) for layer in layers)
    assert sum(seconds(layer.name, spread[layer.name]) for layer in layers) == pytest.approx(asked, rel=1e-6)
    ours = sum(lost_at(layer, spread[layer.name]) for layer in layers)
    assert ours < sum(lost_at(layer, sparsity) for layer in layers)
    assert spread["l2"] == 0.0  # no sparse kernel serves it


def test_time_is_as_good_as_trying_every_pair_of_sparsities() -> None:
    layers = [dense_layer("a", n=8, k=50), dense_layer("b", n=24, k=50, seed=1, heavy=0.2)]
    seconds = staircase({"a": 1.0, "b": 3.0}, {"a": 0.2, "b": 0.5})
    method = Time(most=0.98)
    curves = method.measure(layers)
    spread = method.allocate(measured_time(layers, seconds), 0.7).sparsity
    budget = seconds("a", 0.7) + seconds("b", 0.7)
    best = min(
        curves["a"][i] + curves["b"][j]  # type: ignore[index]
        for i, s in enumerate(GRID[:50])
        for j, t in enumerate(GRID[:50])
        if seconds("a", s) + seconds("b", t) <= budget
    )
    assert lost_at(layers[0], spread["a"]) + lost_at(layers[1], spread["b"]) <= best * 1.02


def test_a_whole_speedup_can_be_asked_for() -> None:
    layers, seconds = five_layers()
    found = Time(speedup=1.5).allocate(measured_time(layers, seconds), 0.0)
    dense = sum(seconds(layer.name, 0.0) for layer in layers)
    taken = sum(seconds(name, share) for name, share in found.sparsity.items())
    assert dense / taken == pytest.approx(1.5, rel=1e-6)
    assert "1.5 times as fast" in found.notes[0]


def test_no_layer_gets_sparser_than_most_unless_asked() -> None:
    layers, seconds = five_layers()
    assert max(Time(most=0.8).allocate(measured_time(layers, seconds), 0.7).sparsity.values()) <= 0.8
    with pytest.raises(BadRecipe, match=r"speedup 50 is out of reach: [\d.]+ is expected"):
        Time(speedup=50.0).allocate(measured_time(layers, seconds), 0.5)


def test_time_needs_times_and_something_to_gain() -> None:
    layers, seconds = five_layers()
    with pytest.raises(BadRecipe, match="none are known"):
        Time().allocate(measured_time(layers, None), 0.5)
    with pytest.raises(BadRecipe, match="no time to spread"):
        Time().allocate(measured_time(layers, seconds), 0.05)


def test_time_takes_layers_of_zeros_first() -> None:
    layers, seconds = five_layers()
    layers[3] = Dense("l3", torch.zeros_like(layers[3].weight), layers[3].stats)
    spread = Time().allocate(measured_time(layers, seconds), 0.5).sparsity
    assert spread["l3"] == 0.9


# ---- besa


class TwoBranches(nn.Module):
    """x -> x + useful(x) + 0.001 * useless(x)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.useful = nn.Linear(width, width, bias=False)
        self.useless = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        found: torch.Tensor = self.useful(x) + 0.001 * self.useless(x)
        return found


class PlantedBlock:
    """The executor's block, as short as it can be."""

    name = "block"
    seed = 0

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor], transposed: bool = False) -> None:
        self.module = module.eval()
        self._inputs = inputs
        with torch.no_grad():
            self._targets = [module(x) for x in inputs]
        self.layers = [
            self._state(name, linear)
            for name, linear in module.named_modules()
            if hasattr(linear, "weight") and linear.weight.dim() == 2
        ]

    def _state(self, name: str, linear: nn.Module) -> LayerState:
        seen: list[torch.Tensor] = []
        handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
        with torch.no_grad():
            for x in self._inputs:
                self.module(x)
        handle.remove()
        weight = linear.get_parameter("weight").detach()
        weight = weight.t() if hasattr(linear, "nf") else weight
        stats = {"sum_x2": torch.cat(seen).float().square().sum(0)}
        return LayerState(name, weight, weight.float().clone(), stats, Selector(MaskPattern(), 0.5), Magnitude(), 0.5)

    def batches(self) -> Iterator[Batch]:
        return (Batch(x) for x in self._inputs)

    def targets(self) -> Iterator[torch.Tensor]:
        return iter(self._targets)

    def run(self, batch: Batch) -> torch.Tensor:
        found: torch.Tensor = self.module(batch.hidden)
        return found

    def error(self, spread: Mapping[str, float | torch.Tensor]) -> float:
        """Of the block pruned by Wanda scores, row by row; the weights are put back."""
        before = {k: v.clone() for k, v in self.module.state_dict().items()}
        for layer in self.layers:
            score = importance("wanda", layer.dense, layer.stats)
            share = spread[layer.name]
            shares = share if isinstance(share, torch.Tensor) else torch.full((len(score),), share)
            rows = [select(row[None], MaskPattern(), float(s), "row") for row, s in zip(score, shares, strict=True)]
            layer.weight.mul_(torch.cat(rows))
        with torch.no_grad():
            pairs = zip(self.batches(), self.targets(), strict=True)
            found = sum(float(_error(self.run(batch), target)) for batch, target in pairs)
        self.module.load_state_dict(before)
        return found


def planted(module: nn.Module | None = None, width: int = 32, dtype: torch.dtype = torch.float32) -> PlantedBlock:
    torch.manual_seed(0)
    module = (module or TwoBranches(width)).to(dtype)
    scale = torch.linspace(0.2, 3, width)
    return PlantedBlock(module, [(torch.randn(2, 16, width) * scale).to(dtype) for _ in range(24)])


def pruned_by(block: PlantedBlock, spread: Mapping[str, float | torch.Tensor]) -> float:
    total = 0.0
    for layer in block.layers:
        share = spread[layer.name]
        total += (
            float(share.sum()) * layer.dense.shape[1]
            if isinstance(share, torch.Tensor)
            else share * layer.dense.numel()
        )
    return total


@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_besa_prunes_the_useless_layer_and_reaches_its_sparsity(per: str, sparsity: float) -> None:
    block = planted()
    spread = BESA(per=per, epochs=2).learn(block, sparsity)  # type: ignore[arg-type]
    assert pruned_by(block, spread) == pytest.approx(math.floor(sparsity * 2 * 32 * 32 + 0.5), abs=1e-6)
    useful, useless = (torch.as_tensor(spread[name]).double().mean() for name in ("useful", "useless"))
    assert useful < sparsity < useless
    assert block.error(spread) < block.error({"useful": sparsity, "useless": sparsity})


def test_besa_gives_a_row_a_sparsity_that_prunes_whole_weights() -> None:
    block = planted()
    spread = BESA().learn(block, 0.5)
    for layer in block.layers:
        rows = spread[layer.name]
        assert isinstance(rows, torch.Tensor)
        assert rows.shape == (32,)
        assert torch.allclose(rows * 32, (rows * 32).round(), atol=1e-9)
        assert bool((rows < 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_besa_leaves_the_model_bitwise_as_it_was(dtype: torch.dtype) -> None:
    block = planted(dtype=dtype)
    with torch.no_grad():
        block.layers[0].weight[0, 0] = -0.0
    block.layers[0].dense.copy_(block.layers[0].weight)
    block.module.get_parameter("useless.weight").requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in block.module.named_parameters()}
    BESA(per="layer").learn(block, 0.5)
    for name, p in block.module.named_parameters():
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(p.detach().view(bits), before[name][0].view(bits))
        assert p.requires_grad == before[name][1]
        assert p.grad is None


def test_besa_puts_the_weights_back_when_the_block_fails() -> None:
    block = planted()
    before = block.layers[0].weight.clone()
    runs = iter(range(3))
    block.run = lambda batch: block.module(batch.hidden[..., : 32 - next(runs)])  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="normalized_shape"):
        BESA().learn(block, 0.5)
    assert torch.equal(block.layers[0].weight, before)


def test_besa_gives_the_same_twice_and_also_without_gradients_around_it() -> None:
    first = BESA().learn(planted(), 0.6)
    with torch.no_grad():
        second = BESA().learn(planted(), 0.6)
    for name, rows in first.items():
        assert torch.equal(torch.as_tensor(rows), torch.as_tensor(second[name]))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("k", [32, 7, 130])
def test_besa_passes_gradients_through_the_probability_of_each_weight(rows: bool, k: int) -> None:
    """Against a mask of probabilities made weight by weight from the paper's sums, differentiated by autograd."""
    torch.manual_seed(1)
    linear = nn.Linear(k, 3, bias=False)
    block = planted(linear, width=k)
    state = block.layers[0]
    layer = _Layer(state, rows, importance("wanda", state.dense, state.stats), 0.4)
    layer.owner = linear.get_parameter("weight")
    assert torch.allclose(layer.shares(), torch.full((3 if rows else 1,), 0.4, dtype=torch.float64), atol=1e-6)
    with torch.no_grad():
        layer.logits += torch.randn(layer.logits.shape)
    pulled = torch.randn(3, k)
    stays = layer.prune()
    torch.autograd.backward(stays, layer.pull(pulled))
    logits = layer.logits.detach().clone().requires_grad_()
    betas = logits.softmax(1)
    score = importance("wanda", state.dense, state.stats)
    total = torch.zeros(())
    for i in range(3):
        for j in range(k):
            below = int((score[i] < score[i, j]).sum())
            goes = sum((betas[i if rows else 0, d] for d in range(101) if d * k > below * 100), start=torch.zeros(()))
            total = total + (1 - goes) * pulled[i, j] * state.dense[i, j]
            share = float(betas[i if rows else 0].detach().double() @ torch.linspace(0, 1, 101, dtype=torch.float64))
            is_pruned = below < math.floor(share * k + 0.5)
            assert float(state.weight[i, j]) == (0.0 if is_pruned else float(state.dense[i, j]))
    torch.autograd.backward(total)
    assert layer.logits.grad is not None
    assert logits.grad is not None
    assert torch.allclose(layer.logits.grad, logits.grad, atol=2e-5)


def test_besa_sees_through_transposed_weights() -> None:
    class Conv1D(nn.Module):
        """As in transformers: holds [K, N]."""

        def __init__(self) -> None:
            super().__init__()
            self.nf = 32
            self.weight = nn.Parameter(torch.randn(32, 32) / 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    torch.manual_seed(0)
    turned, straight = TwoBranches(), TwoBranches()
    straight.load_state_dict(turned.state_dict())
    for name in ("useful", "useless"):
        conv = Conv1D()
        conv.weight.data.copy_(turned.get_parameter(f"{name}.weight").t())
        setattr(turned, name, conv)
    ours, plain = (BESA().learn(planted(module), 0.5) for module in (turned, straight))
    for name in plain:
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(plain[name]))


def test_besa_copes_with_a_layer_that_no_token_reaches_and_with_sparsity_zero() -> None:
    class Idle(TwoBranches):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.useful(self.norm(x))
            return found

    block = planted()
    zero = BESA().learn(block, 0.0)
    assert all(not torch.as_tensor(rows).any() for rows in zero.values())
    idle = PlantedBlock.__new__(PlantedBlock)
    idle.__dict__.update(block.__dict__)
    idle.module = Idle()
    idle.module.load_state_dict(block.module.state_dict())
    for layer in idle.layers:
        layer.weight = idle.module.get_parameter(f"{layer.name}.weight").detach()
    idle.layers[1].stats = {"sum_x2": torch.zeros(32)}
    spread = BESA(per="layer").learn(idle, 0.5)
    assert pruned_by(idle, spread) == pytest.approx(1024)
    assert float(spread["useless"]) > float(spread["useful"])


def test_besa_learns_from_gradients_too_small_for_float16() -> None:
    found = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        module = TwoBranches()
        with torch.no_grad():
            module.useful.weight *= 4096  # an output's gradient is 1 / (its size * outputs): below 6e-8 here
        block = PlantedBlock(module.to(dtype), [torch.randn(8, 512, 32).to(dtype) for _ in range(4)])
        spread = BESA(per="layer", penalty=0, lr=0.1).learn(block, 0.5)
        found.append([float(spread["useful"]), float(spread["useless"])])
    assert found[0][0] < 0.46
    assert found[1] == pytest.approx(found[0], abs=0.01)


def test_besa_passes_over_batches_that_reach_no_layer() -> None:
    class Sometimes(TwoBranches):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.flatten()[0] > 0 else self.norm(x)

    spread = BESA(per="layer").learn(planted(Sometimes()), 0.5)
    assert float(spread["useful"]) < 0.5 < float(spread["useless"])


def test_besa_says_why_weights_of_inference_mode_cannot_be_learned() -> None:
    block = planted()
    with torch.inference_mode():
        block.layers[0].weight = torch.randn(32, 32)
    with pytest.raises(UnprunableLayer, match="inference mode"):
        BESA().learn(block, 0.5)
