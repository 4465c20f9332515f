"""PGB: planted blocks come back, reassignments are exact optima, the quota holds, the repair lowers the error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.errors import BadRecipe, SingularHessian
from sparsec.passes.masks import method_class, obs
from sparsec.passes.masks.contract import Updates, prune
from sparsec.passes.masks.outliers import Outliers, with_outliers
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.pgb import PGB, balance, capacity, importance, regroup
from sparsec.passes.masks.select import Selector

unhurried = settings(deadline=None, max_examples=40)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unstructured(sparsity: float | torch.Tensor, scope: str = "layer") -> Selector:
    return Selector(MaskPattern(), sparsity, scope, "sum")


def labels(count: int, groups: int, seed: int) -> torch.Tensor:
    """Groups of sizes that differ by at most one, the first ones larger, in a random order."""
    return (torch.arange(count) % groups)[torch.randperm(count, generator=seeded(seed))]


def planted(n: int, k: int, groups: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with blocks whose rows and columns are shuffled, ``noise`` elsewhere; and where the blocks are."""
    blocks = labels(n, groups, seed)[:, None] == labels(k, groups, seed + 1)
    weight = torch.randn(n, k, generator=seeded(seed + 2))
    weight = weight.sign() * (0.5 + weight.abs())
    return weight * torch.where(blocks, 1.0, noise), blocks


def inputs(k: int, seed: int, tokens: int | None = None) -> torch.Tensor:
    """Inputs [tokens, K] that are mixed with each other and of unequal size, as a model's are."""
    mixing = torch.randn(k, k, generator=seeded(seed)) / math.sqrt(k) + 0.5 * torch.eye(k)
    mixed = torch.randn(tokens or 8 * k, k, generator=seeded(seed + 1)) @ mixing
    return mixed * (0.2 + torch.rand(k, generator=seeded(seed + 2)))


def layer(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A weight, its inputs and their statistics."""
    x = inputs(k, seed)
    return torch.randn(n, k, generator=seeded(seed + 9)), x, {"xxt": x.t() @ x}


def output_error(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() @ (weight.double() - values.double()).t()))


@pytest.mark.parametrize(("n", "k", "groups"), [(64, 64, 2), (64, 96, 4), (65, 98, 4), (30, 20, 7), (40, 24, 8)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_planted_blocks_are_recovered_exactly(n: int, k: int, groups: int, noise: float) -> None:
    weight, blocks = planted(n, k, groups, noise, seed=n + k)
    found = regroup(weight.square(), groups, rounds=20)
    assert torch.equal(found.blocks(), blocks)


def test_an_update_keeps_planted_blocks_as_they_are() -> None:
    weight, blocks = planted(48, 32, 4, 0.0, seed=3)
    x = inputs(32, 5)
    pruned = PGB().update(weight, {"xxt": x.t() @ x}, unstructured(0.75))
    assert torch.equal(pruned.keep, blocks)
    assert pruned.values is not None
    torch.testing.assert_close(pruned.values, weight)  # nothing was lost, so there is nothing to make up for


def test_the_orders_bring_the_blocks_to_the_diagonal() -> None:
    weight, _ = planted(10, 14, 4, 0.3, seed=0)
    found = regroup(weight.square(), 4, 20)
    rows, columns = found.orders()
    sorted_blocks = found.blocks()[rows][:, columns]
    corners = zip((3, 6, 8, 10), (4, 8, 11, 14), strict=True)
    expected = torch.zeros(10, 14, dtype=torch.bool)
    for (top, left), (bottom, right) in itertools.pairwise([(0, 0), *corners]):
        expected[top:bottom, left:right] = True
    assert torch.equal(sorted_blocks, expected)


def test_a_grouped_product_between_two_permutations_is_the_layer() -> None:
    weight, x, stats = layer(24, 36)
    values = PGB().update(weight, stats, unstructured(0.75)).values
    assert values is not None
    rows, columns = regroup(values.square(), 4, 20).orders()
    parts = zip(x[:, columns].chunk(4, 1), rows.chunk(4), columns.chunk(4), strict=True)
    grouped = torch.cat([part @ values[r][:, c].t() for part, r, c in parts], 1)
    torch.testing.assert_close(grouped[:, rows.argsort()], x @ values.t(), rtol=1e-4, atol=1e-4)


@unhurried
@given(st.integers(2, 6), st.integers(2, 3), st.integers(0, 10_000), st.booleans())
@example(6, 3, 0, True)
def test_no_assignment_of_these_sizes_is_worth_more(n: int, groups: int, seed: int, coarse: bool) -> None:
    benefit = torch.rand(n, groups, dtype=torch.float64, generator=seeded(seed))
    benefit = (4 * benefit).floor() if coarse else benefit  # ties
    start = labels(n, groups, seed)
    found = balance(benefit, start)
    assert torch.equal(found.bincount(minlength=groups), start.bincount(minlength=groups))
    best = max(
        sum(float(benefit[i, g]) for i, g in enumerate(order)) for order in itertools.permutations(start.tolist())
    )
    assert float(benefit.gather(1, found[:, None]).sum()) == pytest.approx(best, abs=1e-9)


def test_rings_of_three_are_found_where_no_swap_gains() -> None:
    benefit = torch.tensor([[0.0, 2.0, -9.0], [-9.0, 0.0, 2.0], [2.0, -9.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([0, 1, 2])
    for g, h in itertools.combinations(range(3), 2):
        assert float(benefit[g, h] + benefit[h, g]) < float(benefit[g, g] + benefit[h, h])
    assert balance(benefit, start).tolist() == [1, 2, 0]
    assert start.tolist() == [0, 1, 2]


@unhurried
@given(st.integers(4, 30), st.integers(4, 30), st.integers(1, 4), st.integers(0, 10_000))
def test_kept_importance_never_falls_from_round_to_round(n: int, k: int, groups: int, seed: int) -> None:
    worth = torch.randn(n, k, generator=seeded(seed)).square()
    sums = []
    for rounds in range(6):
        found = regroup(worth, groups, rounds)
        sums.append(float(worth.double()[found.blocks()].sum()))
        assert len(found.kept) <= rounds + 1
        assert int(found.blocks().sum()) == capacity(n, k, groups)
        torch.testing.assert_close(
            torch.tensor(found.kept[-1]) * worth.max(), torch.tensor(sums[-1], dtype=torch.float32)
        )
    assert sums == sorted(sums)
    assert list(found.kept) == sorted(found.kept)


def test_rounds_improve_on_the_start() -> None:
    worth = torch.randn(96, 96, generator=seeded(0)).square()
    kept = regroup(worth, 4, 20).kept
    assert len(kept) > 2
    assert kept[-1] > 1.02 * kept[0]


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_a_search_beats_every_one_of_twenty_random_groupings(groups: int) -> None:
    worth = torch.randn(64, 48, generator=seeded(1)).square()
    found = float(worth[regroup(worth, groups, 20).blocks()].sum())
    for seed in range(20):
        random = labels(64, groups, seed)[:, None] == labels(48, groups, seed + 100)
        assert found > 1.1 * float(worth[random].sum())


def test_importance_is_what_the_textbook_says() -> None:
    weight, _, stats = layer(3, 7)
    xxt = stats["xxt"].double()
    inverse = torch.linalg.inv(xxt + 0.01 * xxt.diagonal().mean() * torch.eye(7, dtype=torch.float64))
    factor, _ = obs.inverse_factor(stats["xxt"], 0.01)
    for i, j in itertools.product(range(3), range(7)):
        expected = float(weight[i, j]) ** 2 / float(inverse[j, j])
        assert float(importance(weight, factor)[i, j]) == pytest.approx(expected, rel=1e-4)


@unhurried
@given(
    st.integers(1, 24), st.integers(1, 24), st.floats(0, 0.98), st.integers(0, 100), st.sampled_from(["layer", "row"])
)
@example(5, 7, 0.5, 0, "layer")
@example(4, 8, 2 / 3, 0, "row")
def test_the_quota_is_exact(n: int, k: int, sparsity: float, seed: int, scope: str) -> None:
    weight, _, stats = layer(n, k, seed)
    choose = unstructured(sparsity, scope)
    pruned = PGB(rounds=3).update(weight, stats, choose)
    assert pruned.values is not None
    expected = choose(torch.ones(n, k))
    assert int(pruned.keep.sum()) == int(expected.sum())
    if scope == "row":
        assert torch.equal(pruned.keep.sum(1), expected.sum(1))
    assert not bool(pruned.values[~pruned.keep].any())
    assert bool(pruned.values.isfinite().all())


def test_rows_may_have_quotas_of_their_own() -> None:
    weight, _, stats = layer(12, 16)
    sparsity = torch.linspace(0.5, 0.9, 12)
    keep = PGB().update(weight, stats, unstructured(sparsity, "row")).keep
    assert keep.sum(1).tolist() == [16 - math.floor(s * 16 + 0.5) for s in sparsity.tolist()]
    assert groups_of(keep) >= 2


def groups_of(keep: torch.Tensor) -> int:
    """How many sets of rows and columns have weights in common: the connected parts of the mask."""
    n = len(keep)
    reach = torch.eye(n, dtype=torch.float64) + (keep.double() @ keep.double().t())
    for _ in range(n.bit_length()):
        reach = (reach @ reach).clamp_max(1.0)
    return len({tuple(row) for row in (reach > 0).tolist()})


@pytest.mark.parametrize(("sparsity", "groups"), [(0.3, 1), (0.5, 2), (0.6, 2), (0.75, 4), (0.8, 5)])
def test_the_sparsity_says_how_many_blocks_there_are(sparsity: float, groups: int) -> None:
    weight, _, stats = layer(40, 60)
    assert groups_of(PGB().update(weight, stats, unstructured(sparsity)).keep) == groups


def test_fewer_groups_than_the_sparsity_allows_lose_their_weakest_weights() -> None:
    weight, _, stats = layer(32, 32)
    keep = PGB(groups=2).update(weight, stats, unstructured(0.75)).keep
    worth = importance(weight, obs.inverse_factor(stats["xxt"], 0.01)[0])
    inside = regroup(worth, 2, 20).blocks()
    assert groups_of(keep) == 2
    assert not bool((keep & ~inside).any())
    assert float(worth[keep].min()) >= float(worth[inside & ~keep].max())


def test_the_update_lowers_the_output_error() -> None:
    for seed in range(5):
        weight, x, stats = layer(48, 64, seed)
        pruned = PGB().update(weight, stats, unstructured(0.5))
        assert pruned.values is not None
        assert output_error(x, weight, pruned.values) < 0.95 * output_error(x, weight, weight * pruned.keep)


def test_a_second_order_grouping_beats_random_blocks_in_the_output() -> None:
    weight, x, stats = layer(64, 64, 2)
    factor, _ = obs.inverse_factor(stats["xxt"], 0.01)
    ours = PGB().update(weight, stats, unstructured(0.5)).values
    assert ours is not None
    for seed in range(5):
        blocks = labels(64, 2, seed)[:, None] == labels(64, 2, seed + 50)
        random = obs.prune(weight, factor, blocks).values
        assert random is not None
        assert output_error(x, weight, ours) < output_error(x, weight, random)


def test_the_values_are_those_of_the_column_solver_for_this_mask() -> None:
    weight, _, stats = layer(20, 24)
    pruned = PGB().update(weight, stats, unstructured(0.5))
    expected = obs.prune(weight, obs.inverse_factor(stats["xxt"], 0.01)[0], pruned.keep)
    assert pruned.values is not None
    assert expected.values is not None
    torch.testing.assert_close(pruned.values, expected.values)


def test_the_weight_stays_as_it_is_and_the_result_is_the_same_again() -> None:
    weight, _, stats = layer(24, 36)
    copy = weight.clone()
    torch.manual_seed(1)
    first = PGB().update(weight, stats, unstructured(0.75))
    torch.manual_seed(2)
    second = PGB().update(weight, stats, unstructured(0.75))
    assert torch.equal(weight, copy)
    assert torch.equal(first.keep, second.keep)
    assert first.values is not None
    assert second.values is not None
    assert torch.equal(first.values, second.values)


def test_dead_inputs_go_first_and_keep_their_values_where_they_stay() -> None:
    weight, x, _ = layer(16, 16)
    x[:, 3] = 0.0
    stats = {"xxt": x.t() @ x}
    half = PGB().update(weight, stats, unstructured(0.5))
    most = PGB(groups=2).update(weight, stats, unstructured(0.6))
    assert half.values is not None
    kept = half.keep[:, 3]
    assert torch.equal(half.values[kept, 3], weight[kept, 3])
    assert not bool(most.keep[:, 3].any())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 17)])
def test_narrow_layers_and_zero_weights_are_served(shape: tuple[int, int]) -> None:
    _, _, stats = layer(*shape)
    pruned = PGB().update(torch.zeros(shape), stats, unstructured(0.75))
    assert int(pruned.keep.sum()) == int(unstructured(0.75)(torch.ones(shape)).sum())
    assert pruned.values is not None
    assert not bool(pruned.values.any())


def test_a_fixed_mask_is_kept_and_its_weights_are_updated() -> None:
    weight, x, stats = layer(12, 16)
    mask = torch.rand(12, 16, generator=seeded(0)) < 0.5
    pruned = PGB().update(weight, stats, obs.fixed(mask))
    assert torch.equal(pruned.keep, mask)
    assert pruned.values is not None
    assert output_error(x, weight, pruned.values) < output_error(x, weight, weight * mask)


def test_outliers_come_on_top_of_the_quota() -> None:
    weight, _, stats = layer(32, 32)
    pruned = PGB().update(weight, stats, with_outliers(unstructured(0.75), Outliers.parse(0.05)))
    assert int(pruned.keep.sum()) == 256 + round(0.05 * 1024)


@pytest.mark.parametrize("pattern", ["2:4", "64:2:8", "block:4x4"])
def test_other_patterns_are_refused(pattern: str) -> None:
    weight, _, stats = layer(8, 8)
    choose = Selector(MaskPattern.parse(pattern), 0.5, "layer", "sum")
    with pytest.raises(BadRecipe, match=f"needs pattern unstructured, not {pattern}"):
        PGB().update(weight, stats, choose)


@pytest.mark.parametrize(("groups", "sparsity"), [(4, 0.5), (9, 0.95)])
def test_more_groups_than_can_hold_the_quota_are_refused(groups: int, sparsity: float) -> None:
    weight, _, stats = layer(8, 8)
    with pytest.raises(BadRecipe, match=f"in {groups} diagonal blocks; give fewer groups, a higher sparsity"):
        PGB(groups=groups).update(weight, stats, unstructured(sparsity))


def test_inputs_that_were_never_seen_are_refused() -> None:
    with pytest.raises(SingularHessian, match="every input was zero"):
        PGB().update(torch.ones(4, 4), {"xxt": torch.zeros(4, 4)}, unstructured(0.5))


def test_pgb_is_registered_and_updates() -> None:
    assert method_class("pgb") is PGB
    assert isinstance(PGB(), Updates)
    weight, _, stats = layer(8, 8)
    assert int(prune(PGB(), weight, stats, unstructured(0.5)).keep.sum()) == 32
