"""Scores of mask methods against slow transcriptions of their formulas, element by element in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsec.errors import NonFinite
from sparsec.passes.masks import method_class
from sparsec.passes.masks.contract import GRADIENTS, Method, Scores, Statistics, prune
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector
from sparsec.passes.masks.statistics import BINS, Collector

Rows = list[list[float]]
NAMES = ("wanda", "wanda-alpha", "ria", "gblm", "esparse", "minillm")


def layer(n: int, k: int, tokens: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [N, K], inputs [tokens, K] and gradients of three samples [3, N, K]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(tokens, k, generator=generator) * torch.logspace(-1, 1, k) + 0.1
    return weight, x, torch.randn(3, n, k, generator=generator) * 0.01


def statistics(x: torch.Tensor, grads: torch.Tensor) -> Statistics:
    collector = Collector(x.shape[1], ("sum_x2", "entropy"))
    collector.add(x)
    return {**collector.result(), "grad2": grads.square().sum(0), "spsa": grads.sum(0)}


def norms(x: Rows) -> list[float]:
    return [math.sqrt(sum(token[j] ** 2 for token in x)) for j in range(len(x[0]))]


def wanda(w: Rows, x: Rows, grads: list[Rows]) -> Rows:
    size = norms(x)
    return [[abs(w[i][j]) * size[j] for j in range(len(w[0]))] for i in range(len(w))]


def ria(w: Rows, x: Rows, grads: list[Rows]) -> Rows:
    size = norms(x)
    scores: Rows = []
    for row in w:
        scores.append([])
        for j, value in enumerate(row):
            of_column = abs(value) / sum(abs(other[j]) for other in w)
            of_row = abs(value) / sum(abs(other) for other in row)
            scores[-1].append((of_column + of_row) * math.sqrt(size[j]))
    return scores


def gblm(w: Rows, x: Rows, grads: list[Rows]) -> Rows:
    size = norms(x)
    scores = []
    for i, row in enumerate(w):
        found = [math.sqrt(sum((100 * g[i][j]) ** 2 for g in grads)) for j in range(len(row))]
        scores.append([abs(value) * (size[j] + found[j]) for j, value in enumerate(row)])
    return scores


def esparse(w: Rows, x: Rows, grads: list[Rows]) -> Rows:
    size, entropies = norms(x), []
    for j in range(len(w[0])):
        column = [token[j] for token in x]
        width = 2.0 ** math.frexp(max(map(abs, column)))[1] / (BINS // 2)
        counts: dict[int, int] = {}
        for value in column:
            counts[math.floor(value / width)] = counts.get(math.floor(value / width), 0) + 1
        entropies.append(-sum(c / len(x) * math.log(c / len(x)) for c in counts.values()))
    return [[abs(value) * (entropies[j] + size[j]) for j, value in enumerate(row)] for row in w]


def minillm(w: Rows, x: Rows, grads: list[Rows]) -> Rows:
    size = norms(x)
    return [
        [abs(value) * size[j] * abs(sum(g[i][j] for g in grads)) for j, value in enumerate(row)]
        for i, row in enumerate(w)
    ]


FORMULAS: dict[str, Callable[[Rows, Rows, list[Rows]], Rows]] = {
    "wanda": wanda,
    "ria": ria,
    "gblm": gblm,
    "esparse": esparse,
    "minillm": minillm,
}


def method(name: str) -> Scores:
    made = method_class(name)()
    assert isinstance(made, Scores)
    return made


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(sorted(FORMULAS)), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_a_score_is_its_formula(name: str, n: int, k: int, seed: int) -> None:
    weight, x, grads = layer(n, k, seed=seed)
    expected = torch.tensor(FORMULAS[name](weight.tolist(), x.tolist(), grads.tolist()), dtype=torch.float64)
    score = method(name).score(weight, statistics(x, grads))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected, rtol=2e-5, atol=0)


def by_bisection(score: Rows, pruned: int) -> list[list[bool]]:
    """Wanda's variant as its authors run it: rows prune while what is lost stays below alpha of their total."""
    low, high = 0.0, 1.0
    for _ in range(200):
        alpha = (low + high) / 2
        gone = [[False] * len(row) for row in score]
        for i, row in enumerate(score):
            lost = 0.0
            for j in sorted(range(len(row)), key=lambda j: row[j]):
                lost += row[j]
                gone[i][j] = lost <= alpha * sum(row)
        count = sum(map(sum, gone))
        if count == pruned:
            break
        low, high = (low, alpha) if count > pruned else (alpha, high)
    return [[not g for g in row] for row in gone]


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(2, 12), st.integers(0, 2**31), st.floats(0.05, 0.8))
def test_the_variant_of_wanda_is_the_bisection_of_alpha(n: int, k: int, seed: int, sparsity: float) -> None:
    weight, x, grads = layer(n, k, seed=seed)
    variant = method("wanda-alpha")
    keep = Selector(MaskPattern(), sparsity, "layer")(variant.score(weight, statistics(x, grads)))
    pruned = int((~keep).sum())
    assume(pruned <= n * (k - 1))  # only alpha = 1 takes the best weight of a row, and then of every row
    assert keep.tolist() == by_bisection(wanda(weight.tolist(), x.tolist(), []), pruned)


def test_the_variant_orders_each_row_as_wanda_and_lets_rows_differ() -> None:
    weight, x, grads = layer(16, 64)
    weight[3, 8:] *= 1e-3  # a row whose score lies in few weights can lose more
    stats = statistics(x, grads)
    plain, variant = method("wanda").score(weight, stats), method("wanda-alpha").score(weight, stats)
    assert torch.equal(plain.argsort(dim=1), variant.argsort(dim=1))
    lost = (~Selector(MaskPattern(), 0.5, "layer")(variant)).sum(1)
    assert int(lost.sum()) == 16 * 32
    assert int(lost[3]) == int(lost.max()) > 40
    groups = MaskPattern("nm", (2, 4))
    assert torch.equal(Selector(groups, 0.5)(plain), Selector(groups, 0.5)(variant))


@pytest.mark.parametrize("name", ["wanda", "ria", "gblm", "esparse"])
def test_every_row_loses_the_same_number(name: str) -> None:
    weight, x, grads = layer(24, 50)
    made: Method = method_class(name)()
    assert made.scope == "row"
    kept = prune(made, weight, statistics(x, grads), Selector(MaskPattern(), 0.31, made.scope, made.norm)).keep
    assert kept.sum(1).tolist() == [50 - round(0.31 * 50)] * 24


@pytest.mark.parametrize("name", NAMES)
def test_scores_without_signal_are_finite_and_choose_an_exact_quota(name: str) -> None:
    """Dead inputs, zero rows and columns, weights all zero, nothing seen, no gradient: no NaN anywhere."""
    weight, x, grads = layer(6, 10)
    x[:, 2] = 0.0
    weight[1], weight[:, 4] = 0.0, 0.0
    dead = {
        "sum_x2": torch.zeros(10),
        "entropy": torch.zeros(10),
        "grad2": torch.zeros(6, 10),
        "spsa": torch.zeros(6, 10),
    }
    cases = [(weight, statistics(x, grads)), (weight * 0.0, statistics(x, grads)), (weight, dead), (weight[:1], dead)]
    made = method_class(name)()
    for w, stats in cases:
        stats = {key: value[: len(w)] if key in GRADIENTS else value for key, value in stats.items()}
        score = made.score(w, stats)
        assert bool(score.isfinite().all())
        for pattern in ("unstructured", "2:4", "block:2x2", "2:2:5"):
            keep = Selector(MaskPattern.parse(pattern), 0.5, made.scope, made.norm)(score)
            assert keep.any()
            if pattern == "unstructured":
                assert int(keep.sum()) == w.numel() // 2


@pytest.mark.parametrize("name", ["wanda", "wanda-alpha", "ria", "esparse", "minillm"])
def test_weights_on_dead_inputs_go_first(name: str) -> None:
    weight, x, grads = layer(8, 12)
    x[:, [0, 5]] = 0.0
    score = method(name).score(weight, statistics(x, grads))
    assert not score[:, [0, 5]].any()
    keep = Selector(MaskPattern(), 2 / 12, "row")(score)
    assert (~keep).sum(0).tolist() == [8 if j in (0, 5) else 0 for j in range(12)]


@pytest.mark.parametrize("name", ["wanda", "wanda-alpha", "ria", "esparse"])
def test_a_layer_that_saw_nothing_is_scored_by_its_weights(name: str) -> None:
    weight, _, _ = layer(8, 12)
    score = method(name).score(weight, {"sum_x2": torch.zeros(12), "entropy": torch.zeros(12)})
    assert float(score.min()) > 0
    if name in ("wanda", "esparse"):
        assert torch.equal(score, weight.abs())


@pytest.mark.parametrize("name", NAMES)
def test_scoring_is_deterministic_and_changes_nothing(name: str) -> None:
    weight, x, grads = layer(8, 12)
    stats = statistics(x, grads)
    before = [weight.clone(), *(value.clone() for value in stats.values())]
    first, second = method(name).score(weight, stats), method(name).score(weight.clone(), dict(stats))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, [weight, *stats.values()], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_statistics_that_are_not_finite_are_refused(name: str) -> None:
    weight, x, grads = layer(4, 6)
    stats = statistics(x, grads)
    for need in method_class(name).needs:
        broken = stats[need].clone()
        broken.view(-1)[2] = math.nan
        with pytest.raises(NonFinite, match=f"the statistic {need} of a layer became NaN"):
            method(name).score(weight, {**stats, need: broken})


def test_rescaling_a_channel_moves_magnitudes_mask_and_not_wandas() -> None:
    """Multiply in-feature j by c_j and divide column j by it: the layer computes the same."""
    weight, x, grads = layer(16, 32)
    scale = 2.0 ** torch.randint(-4, 5, (32,), generator=torch.Generator().manual_seed(1))

    def keep(name: str, w: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        made = method_class(name)()
        return prune(made, w, statistics(inputs, grads), Selector(MaskPattern(), 0.5, made.scope, made.norm)).keep

    for name in ("wanda", "wanda-alpha"):
        assert torch.equal(keep(name, weight, x), keep(name, weight / scale, x * scale))
    assert not torch.equal(keep("magnitude", weight, x), keep("magnitude", weight / scale, x * scale))


def test_options_weigh_the_terms_of_a_score() -> None:
    weight, x, grads = layer(5, 7)
    stats = statistics(x, grads)
    plain = method("wanda").score(weight, stats)
    assert torch.equal(method_class("gblm")(scale=0.0).score(weight, stats), plain)
    alone = method_class("esparse")(alpha=0.0).score(weight, stats)
    torch.testing.assert_close(alone, weight.abs() * stats["entropy"])
    blind = method_class("ria")(a=0.0).score(weight, stats)
    assert torch.equal(blind, method_class("ria")(a=0.0).score(weight, {"sum_x2": stats["sum_x2"] * 100}))
