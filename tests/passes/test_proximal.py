"""Proximal 2:4: the operator against a search of its whole domain, the path against a scalar transcription."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.errors import BadRecipe, SingularHessian
from sparsec.passes.masks import method_class
from sparsec.passes.masks.contract import Updates
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.proximal import Proximal, masked_descent, prox
from sparsec.passes.masks.select import Selector
from sparsec.passes.masks.sparsegpt import SparseGPT

TWO_FOUR = Selector(MaskPattern("nm", (2, 4)), 0.5)


def layer(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / math.sqrt(k) + 0.5 * torch.eye(k)
    x = torch.randn(8 * k, k, generator=generator) @ mixing * (0.1 + 2 * torch.rand(k, generator=generator))
    return torch.randn(n, k, generator=generator), x


def error(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor | None) -> float:
    assert values is not None
    return float(torch.linalg.vector_norm(x.double() @ (weight.double() - values.double()).t()))


def triples(z: list[float]) -> float:
    return sum(abs(a * b * c) for a, b, c in itertools.combinations(z, 3))


def cost(z: list[float], w: list[float], strength: float) -> float:
    return sum((a - b) ** 2 for a, b in zip(z, w, strict=True)) / 2 + strength * triples(z)


def slow_prox(w: list[float], strength: float) -> list[float]:
    """The best of a grid over [0, |w|]^4, then made better by ever smaller steps of one coordinate."""
    sizes = [abs(a) for a in w]
    axes = [[i * size / 6 for i in range(7)] for size in sizes]
    best = list(min(itertools.product(*axes), key=lambda z: cost(list(z), sizes, strength)))
    step = 0.1 * max(sizes, default=1.0) + 1e-9
    while step > 1e-7:
        moved = False
        for i, sign in itertools.product(range(4), (-1, 1)):
            trial = [max(0.0, a + sign * step) if j == i else a for j, a in enumerate(best)]
            if cost(trial, sizes, strength) < cost(best, sizes, strength) - 1e-15:
                best, moved = trial, True
        step = step if moved else step / 2
    return [math.copysign(a, b) for a, b in zip(best, w, strict=True)]


@settings(deadline=None, max_examples=60, derandomize=True)  # descent may miss by more in a group in many thousands
@example([0.0, 1.75, 1.75, 1.75], 0.625)
@given(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.floats(1e-3, 30))
def test_no_point_of_a_search_has_a_lower_objective_than_the_operator(w: list[float], strength: float) -> None:
    found = prox(torch.tensor([w]), strength)[0].tolist()
    sizes = [abs(a) for a in found]
    searched = cost(slow_prox(w, strength), w, strength)
    assert cost(found, w, strength) <= searched + 2e-3 * max(1.0, sum(a * a for a in w))
    assert all(a * b >= 0 for a, b in zip(found, w, strict=True))
    assert all(size <= abs(b) + 1e-6 for size, b in zip(sizes, w, strict=True))


def test_groups_with_two_weights_are_left_as_they_are() -> None:
    weight = torch.tensor([[0.0, -2.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0]])
    assert torch.equal(prox(weight, 5.0), weight)


def test_a_strong_regulariser_leaves_the_two_largest_and_a_weak_one_everything() -> None:
    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    strong = prox(weight, 1e3)
    assert torch.equal(strong != 0, TWO_FOUR(weight.abs()))
    assert torch.equal(strong[strong != 0], weight[strong != 0])
    torch.testing.assert_close(prox(weight, 0.0), weight)


def test_a_last_group_that_is_not_full_is_served() -> None:
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert prox(weight, 2.0).shape == (5, 6)
    assert torch.equal(prox(weight, 2.0)[:, 4:], weight[:, 4:])


def slow_proximal(w: list[float], h: list[list[float]], steps: int) -> tuple[list[bool], torch.Tensor]:
    """One row: normalise, ISTA with lambda growing from 1e-3 to 30, two largest of each group, least squares."""
    k = len(w)
    unit = [[h[i][j] / math.sqrt(h[i][i] * h[j][j]) for j in range(k)] for i in range(k)]
    t = [w[j] * math.sqrt(h[j][j]) for j in range(k)]
    rms = math.sqrt(sum(a * a for a in t) / k)
    t = [a / rms for a in t]
    step = 1 / (1.05 * torch.linalg.eigvalsh(torch.tensor(unit, dtype=torch.float64))[-1].item())
    v = list(t)
    for i in range(steps):
        strength = 1e-3 * (30 / 1e-3) ** (i / (steps - 1))
        grad = [sum((v[a] - t[a]) * unit[a][b] for a in range(k)) for b in range(k)]
        moved = [v[b] - step * grad[b] for b in range(k)]
        v = [z for g in range(0, k, 4) for z in slow_prox(moved[g : g + 4], strength)]
    keep = [False] * k
    for g in range(0, k, 4):
        for j in sorted(range(g, g + 4), key=lambda j: -abs(v[j]))[:2]:
            keep[j] = True
    kept = [j for j in range(k) if keep[j]]
    full = torch.tensor(h, dtype=torch.float64)
    right = (full @ torch.tensor(w, dtype=torch.float64))[kept]
    values = torch.zeros(k, dtype=torch.float64)
    values[kept] = torch.linalg.solve(full[kept][:, kept], right)
    return keep, values


@pytest.mark.parametrize("seed", range(4))
def test_the_method_is_its_formula(seed: int) -> None:
    weight, x = layer(2, 12, seed)
    xxt = x.t() @ x
    h = xxt.double() + 0.01 * xxt.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    found = Proximal(steps=12, descent=12).update(weight, {"xxt": xxt}, TWO_FOUR)
    assert found.values is not None
    for r in range(2):
        keep, values = slow_proximal(weight[r].tolist(), h.tolist(), 12)
        assert found.keep[r].tolist() == keep
        torch.testing.assert_close(found.values[r].double(), values, rtol=1e-3, atol=1e-3)


def test_descent_never_raises_the_loss_and_ends_at_least_squares() -> None:
    weight, x = layer(8, 24)
    hessian = (x.t() @ x) / len(x)
    keep = TWO_FOUR(weight.abs())
    errors = [error(x, weight, masked_descent(weight, hessian, keep, steps)) for steps in range(13)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    for r in range(8):
        inside = keep[r].nonzero().flatten()
        solved = torch.linalg.lstsq(x[:, inside], (x @ weight[r])[:, None]).solution[:, 0]
        torch.testing.assert_close(masked_descent(weight, hessian, keep, 30)[r, inside], solved, rtol=1e-3, atol=1e-3)


def test_the_loss_is_below_that_of_wanda_and_sparsegpt_on_nearly_every_layer() -> None:
    below_wanda = below_sparsegpt = 0
    for seed in range(20):
        weight, x = layer(8, 32, seed)
        stats = {"xxt": x.t() @ x}
        found = Proximal().update(weight, stats, TWO_FOUR)
        assert bool((found.keep.view(8, 8, 4).sum(2) == 2).all())
        wanda = TWO_FOUR(weight.abs() * x.square().sum(0).sqrt())
        below_wanda += error(x, weight, found.values) < error(x, weight, weight * wanda)
        sparsegpt = SparseGPT().update(weight, stats, TWO_FOUR)
        below_sparsegpt += error(x, weight, found.values) < error(x, weight, sparsegpt.values)
    assert below_wanda >= 19
    assert below_sparsegpt >= 19


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "unstructured", "4:2:8", "block:1x4"])
def test_patterns_other_than_two_of_four_are_refused(pattern: str) -> None:
    weight, x = layer(8, 16)
    chosen = Selector(MaskPattern.parse(pattern), 0.5)
    with pytest.raises(BadRecipe, match=f"proximal makes 2:4 masks and no others, and the pattern is {pattern}"):
        Proximal().update(weight, {"xxt": x.t() @ x}, chosen)


def test_dead_inputs_zero_rows_and_odd_widths_are_served() -> None:
    weight, x = layer(6, 18)
    x[:, [1, 4, 5, 6, 7]] = 0.0
    weight[2] = 0.0
    before = weight.clone()
    found = Proximal().update(weight, {"xxt": x.t() @ x}, TWO_FOUR)
    again = Proximal().update(weight, {"xxt": x.t() @ x}, TWO_FOUR)
    assert found.values is not None
    assert again.values is not None
    assert bool(torch.isfinite(found.values).all())
    assert int(found.keep.sum()) == 6 * (2 * 4 + 2)
    assert not bool(found.keep[:2, 1].any())
    assert torch.equal(found.values[:, 4:8], weight[:, 4:8] * found.keep[:, 4:8])
    assert not bool(found.values[2].any())
    assert not bool(found.values[~found.keep].any())
    assert torch.equal(found.values, again.values)
    assert torch.equal(weight, before)


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SingularHessian):
        Proximal().update(torch.randn(2, 4), {"xxt": torch.full((4, 4), math.nan)}, TWO_FOUR)


def test_proximal_is_registered() -> None:
    assert method_class("proximal") is Proximal
    assert isinstance(Proximal(), Updates)
