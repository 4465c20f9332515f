"""The OBS solver, SparseGPT and reconstruction: against one rank-1 update a column, and against least squares."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsec.errors import SingularHessian
from sparsec.passes.masks import method_class, obs
from sparsec.passes.masks.contract import Choose, Updates, pattern_of, prune
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.post.reconstruct import Reconstruct, least_squares
from sparsec.passes.masks.select import Selector
from sparsec.passes.masks.sparsegpt import SparseGPT

unhurried = settings(deadline=None, max_examples=25)


def correlated(k: int, tokens: int, seed: int) -> torch.Tensor:
    """Inputs [tokens, K] that are mixed with each other and of unequal size, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / math.sqrt(k) + 0.5 * torch.eye(k)
    return torch.randn(tokens, k, generator=generator) @ mixing * (0.1 + 2 * torch.rand(k, generator=generator))


def layer(n: int, k: int, seed: int = 0, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [n, k] and its inputs."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed + 1000))
    return weight, correlated(k, tokens or 8 * k, seed)


def output_error(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() @ (weight.double() - values.double()).t()))


def unstructured(sparsity: float) -> Selector:
    return Selector(MaskPattern(), sparsity, "layer", "sum")


def of(text: str, sparsity: float = 0.5) -> Selector:
    return Selector(MaskPattern.parse(text), sparsity, "layer", "sum")


def slow_factor(xxt: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """The textbook: damp, invert, factor; fp64."""
    h = xxt.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    lower: torch.Tensor = torch.linalg.cholesky(torch.linalg.inv(h))
    return lower.t()


def slow_sparsegpt(
    weight: torch.Tensor, upper: torch.Tensor, width: int, quota: float | tuple[int, int] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One column at a time, all later columns updated at once, in fp64. ``quota``: share that goes, (n, m), a mask."""
    w = weight.double().clone()
    n, k = w.shape
    keep = torch.ones(n, k, dtype=torch.bool)
    for j in range(k):
        if j % width == 0:
            end = min(j + width, k)
            score = [[(w[r, c] / upper[c, c]).item() ** 2 for c in range(j, end)] for r in range(n)]
            if isinstance(quota, torch.Tensor):
                keep[:, j:end] = quota[:, j:end]
            elif isinstance(quota, tuple):
                for r in range(n):
                    worst_first = sorted((score[r][c], -c) for c in range(end - j))
                    for _, c in worst_first[: max(0, end - j - quota[0])]:
                        keep[r, j - c] = False
            else:
                places = sorted(
                    ((r, c) for r in range(n) for c in range(end - j)), key=lambda p: (score[p[0]][p[1]], -p[0], -p[1])
                )
                for r, c in places[: math.floor(quota * (n * end) + 0.5) - math.floor(quota * (n * j) + 0.5)]:
                    keep[r, j + c] = False
        pruned = torch.where(keep[:, j], w[:, j], 0.0)
        error = (w[:, j] - pruned) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] = pruned
    return keep, w


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 7, 64, 300])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(k: int) -> None:
    xxt = (x := correlated(k, 8 * k, 3)).t() @ x
    factor, dead = obs.inverse_factor(xxt, 0.01)
    expected = slow_factor(xxt)
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    assert not bool(dead.any())
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_damping_is_relative_also_beside_dead_inputs() -> None:
    x = correlated(24, 200, 0)
    x[:, 5] = 0.0
    xxt = x.t() @ x
    (small, dead), (large, _) = obs.inverse_factor(xxt, 0.01), obs.inverse_factor(xxt * 4.0**8, 0.01)
    assert torch.equal(dead.nonzero().flatten(), torch.tensor([5]))
    torch.testing.assert_close(large * 4.0**4, small, rtol=1e-5, atol=0)
    assert not bool(small[5, 6:].any())
    assert not bool(small[:5, 5].any())


def test_fewer_tokens_than_inputs_need_damping_and_the_error_says_so() -> None:
    x = correlated(32, 10, 0)
    xxt = x.t() @ x
    with pytest.raises(SingularHessian, match="raise damp, or use more calibration tokens"):
        obs.inverse_factor(xxt, 0.0)
    assert bool(torch.isfinite(obs.inverse_factor(xxt, 0.01)[0]).all())


def test_equal_inputs_are_singular_without_damping() -> None:
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).expand(100, 8)
    with pytest.raises(SingularHessian, match="singular at damp 0"):
        obs.inverse_factor(x.t() @ x, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    xxt = torch.eye(8)
    xxt[2, 3] = value
    with pytest.raises(SingularHessian, match="NaN or infinity: calibrate in float32"):
        obs.inverse_factor(xxt, 0.01)


def test_inputs_that_are_all_zero_are_refused_in_one_sentence() -> None:
    with pytest.raises(SingularHessian) as raised:
        SparseGPT().update(torch.randn(4, 8), {"xxt": torch.zeros(8, 8)}, unstructured(0.5))
    assert len(re.findall(r"\.(?:\s|$)", str(raised.value))) == 1


@unhurried
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_a_fixed_mask_gives_what_one_update_a_column_gives(
    n: int, k: int, width: int, density: float, seed: int
) -> None:
    weight, x = layer(n, k, seed)
    keep = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < density
    factor, _ = obs.inverse_factor(x.t() @ x, 0.01)
    pruned = obs.prune(weight, factor, keep, width=width)
    assert pruned.values is not None
    assert torch.equal(pruned.keep, keep)
    assert_close(pruned.values, slow_sparsegpt(weight, factor.double(), width, keep)[1])


@pytest.mark.parametrize(("n", "k", "blocksize", "sparsity"), [(6, 64, 16, 0.5), (5, 70, 32, 0.7), (1, 40, 7, 0.3)])
def test_sparsegpt_is_algorithm_1(n: int, k: int, blocksize: int, sparsity: float) -> None:
    weight, x = layer(n, k)
    xxt = x.t() @ x
    upper = slow_factor(xxt)
    keep, values = slow_sparsegpt(weight, upper, blocksize, sparsity)
    found = SparseGPT(blocksize=blocksize).update(weight, {"xxt": xxt}, unstructured(sparsity))
    assert found.values is not None
    assert torch.equal(found.keep, keep)
    assert_close(found.values, values)


@pytest.mark.parametrize(("pattern", "k"), [((2, 4), 64), ((1, 4), 30), ((8, 16), 80)])
def test_sparsegpt_chooses_n_of_m_on_updated_weights(pattern: tuple[int, int], k: int) -> None:
    weight, x = layer(8, k, seed=5)
    xxt = x.t() @ x
    upper = slow_factor(xxt)
    keep, values = slow_sparsegpt(weight, upper, pattern[1], pattern)
    chosen = of(f"{pattern[0]}:{pattern[1]}")
    found = SparseGPT().update(weight, {"xxt": xxt}, chosen)
    assert found.values is not None
    assert torch.equal(found.keep, keep)
    assert_close(found.values, values)
    assert torch.equal(SparseGPT(blocksize=32).update(weight, {"xxt": xxt}, chosen).keep, keep)
    without_updates = chosen((weight / upper.diagonal().float()).square())
    assert not torch.equal(without_updates, keep)


@unhurried
@given(st.integers(1, 20), st.integers(1, 90), st.floats(0, 0.99), st.integers(0, 99))
def test_the_quota_is_exact_up_to_the_end_of_each_column_block(n: int, k: int, sparsity: float, seed: int) -> None:
    weight, x = layer(n, k, seed)
    method = SparseGPT()
    found = method.update(weight, {"xxt": x.t() @ x}, unstructured(sparsity))
    assert found.values is not None
    width = method.width(k, MaskPattern())
    assert width == max(1, min(128, k // 8))
    for end in [*range(width, k, width), k]:
        assert int((~found.keep[:, :end]).sum()) == math.floor(sparsity * (n * end) + 0.5)
    assert not bool(found.values[~found.keep].any())
    assert bool(torch.isfinite(found.values).all())


def test_the_column_block_is_whole_groups_of_the_pattern() -> None:
    method = SparseGPT()
    assert [method.width(k, MaskPattern()) for k in (4, 128, 384, 4096)] == [1, 16, 48, 128]
    assert method.width(384, MaskPattern.parse("block:4x32")) == 32
    assert method.width(64, MaskPattern.parse("block:4x32")) == 32
    assert SparseGPT(blocksize=50).width(64, MaskPattern.parse("block:1x16")) == 48
    assert method.width(4096, MaskPattern.parse("2:4")) == 4
    assert method.width(64, MaskPattern.parse("64:2:8")) == 8


@pytest.mark.parametrize(
    ("pattern", "sparsity", "n", "k"),
    [("block:64x8", 0.5, 64, 64), ("block:128x32", 0.3, 128, 320), ("block:16x8", 0.3, 64, 64)],
)
def test_blocks_as_wide_as_a_column_block_meet_the_share_of_the_layer(
    pattern: str, sparsity: float, n: int, k: int
) -> None:
    weight, x = layer(n, k)
    found = SparseGPT().update(weight, {"xxt": x.t() @ x}, of(pattern, sparsity))
    high, wide = of(pattern).pattern.params
    blocks = (n // high) * (k // wide)
    assert int((~found.keep).sum()) == math.floor(sparsity * blocks + 0.5) * high * wide


@pytest.mark.parametrize("k", [32, 128, 384])
def test_rows_meet_their_share_over_all_column_blocks(k: int) -> None:
    weight, x = layer(4, k)
    for sparsity in (0.7, torch.tensor([0.7, 0.1, 0.55, 0.9], dtype=torch.float64)):
        choose = Selector(MaskPattern(), sparsity, "row", "sum")
        found = SparseGPT().update(weight, {"xxt": x.t() @ x}, choose)
        shares = torch.as_tensor(sparsity, dtype=torch.float64).expand(4).tolist()
        assert (~found.keep).sum(1).tolist() == [math.floor(share * k + 0.5) for share in shares]


@pytest.mark.parametrize("pattern", ["4:2:8", "block:4x8", "3:32"])
def test_sparsegpt_serves_patterns_through_choose(pattern: str) -> None:
    weight, x = layer(16, 64)
    chosen = of(pattern)
    found = SparseGPT().update(weight, {"xxt": x.t() @ x}, chosen)
    assert found.values is not None
    again = chosen(found.keep.float())  # a legal mask is its own best mask
    assert int(found.keep.sum()) == int(again.sum())
    if chosen.pattern.sparsity is not None:
        assert torch.equal(found.keep, again)
        assert found.keep.float().mean().item() == 1 - chosen.pattern.sparsity
    else:
        tiles = found.keep.view(4, 4, 8, 8).permute(0, 2, 1, 3).reshape(32, 32).float().mean(1)
        assert set(tiles.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)])
def test_sparsegpt_loses_less_than_wanda_on_nearly_every_layer(pattern: str, sparsity: float) -> None:
    won = 0
    for seed in range(40):
        weight, x = layer(24, 64, seed)
        chosen = of(pattern, sparsity)
        found = SparseGPT().update(weight, {"xxt": x.t() @ x}, chosen)
        assert found.values is not None
        wanda = replace(chosen, scope="row")(weight.abs() * x.square().sum(0).sqrt())
        won += output_error(x, weight, found.values) < output_error(x, weight, weight * wanda)
    assert won >= 38


def test_the_mask_does_not_depend_on_the_scale_of_inputs() -> None:
    weight, x = layer(12, 64)
    scale = 2.0 ** torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(1))
    plain = SparseGPT(damp=0.0).update(weight, {"xxt": x.t() @ x}, unstructured(0.5))
    y = x * scale
    scaled = SparseGPT(damp=0.0).update(weight / scale, {"xxt": y.t() @ y}, unstructured(0.5))
    assert plain.values is not None
    assert scaled.values is not None
    assert torch.equal(plain.keep, scaled.keep)
    assert_close(scaled.values * scale, plain.values)


def test_weights_of_dead_inputs_go_first_and_stay_as_they_are_where_they_are_kept() -> None:
    weight, x = layer(8, 32)
    x[:, 4:8] = 0.0
    x[:, 16] = 0.0
    found = SparseGPT().update(weight, {"xxt": x.t() @ x}, of("2:4"))
    assert found.values is not None
    assert not bool(found.keep[:, 16].any())
    assert bool((found.keep.view(8, 8, 4).sum(2) == 2).all())
    assert torch.equal(found.values[:, 4:8], weight[:, 4:8] * found.keep[:, 4:8])


def test_zero_weights_and_single_columns_are_pruned_like_others() -> None:
    xxt = (x := correlated(16, 64, 0)).t() @ x
    found = SparseGPT().update(torch.zeros(3, 16), {"xxt": xxt}, of("2:4"))
    assert found.values is not None
    assert not bool(found.values.any())
    assert int(found.keep.sum()) == 24
    one = SparseGPT().update(torch.ones(4, 1), {"xxt": torch.ones(1, 1)}, unstructured(0.5))
    assert int(one.keep.sum()) == 2


def test_nothing_given_is_written_and_twice_is_the_same() -> None:
    weight, x = layer(8, 48)
    weight = weight.t().contiguous().t()  # column-major: a transposed copy would be no copy
    xxt = x.t() @ x
    before = weight.clone(), xxt.clone()
    first = SparseGPT().update(weight, {"xxt": xxt}, unstructured(0.6))
    second = SparseGPT().update(weight, {"xxt": xxt}, unstructured(0.6))
    assert first.values is not None
    assert second.values is not None
    assert torch.equal(first.values, second.values)
    assert torch.equal(weight, before[0])
    assert torch.equal(xxt, before[1])


class _Grid:
    """Rounds to multiples of a step that it takes from the columns it is shown."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.step = torch.empty(0)

    def fit(self, columns: torch.Tensor, start: int) -> None:
        self.starts.append(start)
        self.step = columns.abs().amax(1) / 3

    def round(self, column: torch.Tensor, j: int) -> torch.Tensor:
        return (column / self.step).round() * self.step


def test_a_quantizer_rounds_what_is_kept_and_later_columns_repair_it() -> None:
    weight, x = layer(6, 32)
    xxt = x.t() @ x
    factor, _ = obs.inverse_factor(xxt, 0.01)
    keep = torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) < 0.6
    grid = _Grid()
    found = obs.prune(weight, factor, keep, width=8, quantizer=grid)
    w, upper = weight.double().clone(), factor.double()
    for j in range(32):
        if j % 8 == 0:
            step = w[:, j : j + 8].abs().amax(1) / 3
        rounded = (w[:, j] / step).round() * step * keep[:, j]
        w[:, j:] -= ((w[:, j] - rounded) / upper[j, j])[:, None] * upper[j, j:]
        w[:, j] = rounded
    assert found.values is not None
    assert grid.starts == [0, 8, 16, 24]
    assert_close(found.values, w)
    nearest = torch.cat([_rounded(group) for group in torch.split(weight, 8, 1)], 1)
    dense = obs.prune(weight, factor, torch.ones_like(keep), width=8, quantizer=_Grid()).values
    assert dense is not None
    assert output_error(x, weight, dense) < output_error(x, weight, nearest)


def _rounded(group: torch.Tensor) -> torch.Tensor:
    grid = _Grid()
    grid.fit(group, 0)
    return torch.stack([grid.round(column, 0) for column in group.unbind(1)], 1)


@unhurried
@given(st.integers(1, 8), st.integers(2, 40), st.floats(0.1, 0.9), st.integers(0, 999))
def test_no_other_values_on_a_mask_are_better_than_the_exact_ones(n: int, k: int, density: float, seed: int) -> None:
    weight, x = layer(n, k, seed)
    assume(float(torch.linalg.cond(x.double())) < 1e3)  # beyond it fp32 cannot invert X X^T without damping
    keep = unstructured(1 - density)(torch.rand(n, k, generator=torch.Generator().manual_seed(seed)))
    exact, repaired = (Reconstruct(exact=e, damp=0.0).values(weight, x.t() @ x, keep) for e in (True, False))
    slack = 1e-5 * torch.linalg.vector_norm(x @ weight.t()).item()
    least = output_error(x, weight, exact)
    assert least <= output_error(x, weight, repaired) + slack
    assert least <= output_error(x, weight, weight * keep) + slack
    assert not bool(exact[~keep].any())
    assert not bool(repaired[~keep].any())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_exact_is_better_than_obs_is_better_than_no_update(pattern: str) -> None:
    for seed in range(10):  # the second relation is no theorem: a column's repair may fall on weights pruned later
        weight, x = layer(32, 64, seed)
        xxt = x.t() @ x
        keep = of(pattern)(weight.abs() * x.square().sum(0).sqrt())
        exact, repaired = (Reconstruct(exact=e).values(weight, xxt, keep) for e in (True, False))
        errors = [output_error(x, weight, values) for values in (exact, repaired, weight * keep)]
        assert errors == sorted(errors)


def test_exact_is_least_squares_row_by_row() -> None:
    weight, x = layer(7, 20)
    keep = torch.rand(7, 20, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 7)[:, None]
    found = Reconstruct(exact=True, damp=0.0).values(weight, x.t() @ x, keep)
    for r in range(7):
        inside = keep[r].nonzero().flatten()
        if len(inside):
            wanted = x.double() @ weight[r].double()
            solved = torch.linalg.lstsq(x.double()[:, inside], wanted[:, None]).solution[:, 0]
            assert_close(found[r, inside], solved)
    assert not bool(found[0].any())


def test_rows_are_solved_in_chunks_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(9, 24)
    keep = torch.rand(9, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    hessian, _ = obs.damped_hessian(x.t() @ x, 0.01)
    together = least_squares(weight, hessian, keep)
    monkeypatch.setattr("sparsec.passes.masks.post.reconstruct._CHUNK", 8 * 24 * 24 * 2)
    torch.testing.assert_close(least_squares(weight, hessian, keep), together)


def test_exact_refuses_a_singular_hessian() -> None:
    x = torch.ones(10, 6)
    with pytest.raises(SingularHessian, match="raise damp"):
        Reconstruct(exact=True, damp=0.0).values(torch.randn(2, 6), x.t() @ x, torch.ones(2, 6, dtype=torch.bool))


@dataclass
class _Layer:
    weight: torch.Tensor
    dense: torch.Tensor
    keep: torch.Tensor | None
    stats: dict[str, torch.Tensor]


@dataclass
class _Block:
    layers: list[_Layer]


@pytest.mark.parametrize("exact", [False, True])
def test_reconstruction_writes_each_masked_layer_of_a_block(exact: bool) -> None:
    dense, x = layer(8, 32)
    keep = of("2:4")(dense.abs())
    stats = {"xxt": x.t() @ x}
    masked = torch.nn.Parameter((dense * keep).bfloat16())
    unseen = _Layer(dense * keep, dense, keep, {"xxt": torch.zeros(32, 32)})
    unmasked = _Layer(dense.clone(), dense, None, stats)
    block: Any = _Block([_Layer(masked, dense, keep, stats), unseen, unmasked])
    Reconstruct(exact=exact).refine(block)
    assert not bool(masked[~keep].any())
    assert not bool(torch.signbit(masked[~keep]).any())
    assert output_error(x, dense, masked.detach()) < output_error(x, dense, dense * keep)
    assert torch.equal(unseen.weight, dense * keep)
    assert torch.equal(unmasked.weight, dense)


def test_kept_weights_of_dead_inputs_are_not_reconstructed() -> None:
    dense, x = layer(5, 16)
    x[:, 3] = 0.0
    keep = torch.rand(5, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    keep[:, 3] = True
    for exact in (False, True):
        assert_close(Reconstruct(exact=exact).values(dense, x.t() @ x, keep)[:, 3], dense[:, 3])


def test_sparsegpt_and_reconstruction_are_registered() -> None:
    assert isinstance(SparseGPT(), Updates)
    assert method_class("sparsegpt") is SparseGPT
    assert method_class("reconstruct") is Reconstruct
    weight, x = layer(4, 16)
    assert prune(SparseGPT(), weight, {"xxt": x.t() @ x}, of("2:4")).values is not None


def test_a_choose_that_names_no_pattern_counts_as_unstructured() -> None:
    plain: Choose = obs.fixed(torch.ones(2, 2, dtype=torch.bool))
    assert pattern_of(plain) == MaskPattern()
    assert pattern_of(of("2:4")) == MaskPattern("nm", (2, 4))
