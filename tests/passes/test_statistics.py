"""Statistics of a layer's inputs: what they are, whatever way the tokens come in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import NonFinite
from sparsec.passes.masks.contract import GRADIENTS, STATISTICS
from sparsec.passes.masks.norms import column_norm
from sparsec.passes.masks.statistics import BINS, SAMPLE, Collector

OF_INPUTS = tuple(name for name in STATISTICS if name not in GRADIENTS)
SUMS = ("tokens", "sum_x2", "sum_x4", "xxt", "absmax", "histogram", "entropy")  # the order of batches does not matter


def collected(x: torch.Tensor, cuts: list[int], needs: tuple[str, ...] = OF_INPUTS) -> dict[str, torch.Tensor]:
    collector = Collector(x.shape[1], needs)
    for piece in torch.tensor_split(x, cuts):
        collector.add(piece)
    return collector.result()


def inputs(tokens: int, k: int, seed: int = 0) -> torch.Tensor:
    """Columns of very different sizes, one dead, one that is one-sided."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, k)
    x[:, 0] = 0.0
    x[:, 1] = x[:, 1].abs()
    return x


def counted(column: list[float]) -> list[int]:
    """A histogram with the final range known: bins of equal width over [-r, r), value by value."""
    peak = max(map(abs, column), default=0.0)
    r = 2.0 ** max(math.frexp(peak)[1], -100)
    counts = [0] * BINS
    for value in column:
        counts[math.floor(value / r * (BINS // 2)) + BINS // 2] += 1
    return counts


def test_every_statistic_of_inputs_is_what_its_name_says() -> None:
    x = inputs(300, 6)
    found = collected(x, [7, 100, 101])
    exact = x.double()
    assert int(found["tokens"]) == 300
    torch.testing.assert_close(found["sum_x2"].double(), exact.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["sum_x4"].double(), exact.pow(4).sum(0), rtol=1e-6, atol=0)
    scale = exact.square().sum(0).sqrt()
    error = (found["xxt"].double() - exact.t() @ exact).abs()
    assert bool((error <= 1e-6 * scale[:, None] * scale).all())
    assert torch.equal(found["absmax"], x.abs().amax(0))
    for j in range(6):
        counts = counted(x[:, j].tolist())
        assert found["histogram"][j].tolist() == counts
        entropy = -sum(c / 300 * math.log(c / 300) for c in counts if c)
        assert float(found["entropy"][j]) == pytest.approx(entropy, rel=1e-6, abs=1e-7)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in found.items()}
    wide = {"tokens": (), "xxt": (6, 6), "histogram": (6, BINS), "sample": (300, 6)}
    whole = {"tokens", "histogram"}
    assert shapes == {
        name: (wide.get(name, (6,)), torch.int64 if name in whole else torch.float32) for name in OF_INPUTS
    }


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 120), max_size=6), st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16"]))
def test_neither_the_order_of_batches_nor_their_size_matters(cuts: list[int], seed: int, dtype: str) -> None:
    x = inputs(120, 5, seed).to(getattr(torch, dtype))
    at_once = collected(x, [], SUMS)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
    pieces = collected(x[order], sorted(cuts), SUMS)
    for name in SUMS:
        if name in ("tokens", "absmax", "histogram", "entropy"):
            assert torch.equal(at_once[name], pieces[name]), name
        else:
            scale = at_once["xxt"].diagonal().sqrt()
            unit = scale[:, None] * scale if name == "xxt" else at_once[name]
            assert bool(((at_once[name] - pieces[name]).abs() <= 1e-6 * unit).all()), name


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12))
def test_a_histogram_that_grew_equals_one_that_knew_its_range(values: list[float]) -> None:
    column = torch.tensor(values)
    collector = Collector(1, ("histogram",))
    for value in column:
        collector.add(value.view(1, 1))
    assert collector.result()["histogram"][0].tolist() == counted(column.tolist())


def test_a_million_tokens_lose_no_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    piece = torch.randn(10_000, 8, generator=generator) + 0.3
    collector = Collector(8, ("sum_x2", "sum_x4", "xxt"))
    for _ in range(100):
        collector.add(piece)
    exact = piece.double()
    for name, value in (("sum_x2", exact.square().sum(0)), ("sum_x4", exact.pow(4).sum(0)), ("xxt", exact.t() @ exact)):
        error = (collector.result()[name].double() - 100 * value).abs().max() / (100 * value.max())
        assert float(error) < 1e-6, name


def test_many_small_batches_after_a_large_token_are_not_lost() -> None:
    collector = Collector(1, ("sum_x2", "xxt"))
    collector.add(torch.tensor([[1000.0]]))
    for _ in range(2000):
        collector.add(torch.full((10, 1), 0.1))  # 0.1 a batch: a 1.6th of an ulp of 10^6 in fp32
    for value in collector.result().values():
        assert float(value) == pytest.approx(1_000_200, abs=0.07)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_products_of_sixteen_bit_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = collected(x, [100], ("xxt",))["xxt"]
    exact = x.double().t() @ x.double()
    assert found.dtype == torch.float32
    assert float((found.double() - exact).abs().max() / exact.max()) < 1e-6


@pytest.mark.parametrize("batches", [[], [0], [0, 0]])
def test_no_tokens_give_zeros_and_no_nan(batches: list[int]) -> None:
    collector = Collector(4, OF_INPUTS)
    for tokens in batches:
        collector.add(torch.empty(tokens, 4))
    found = collector.result()
    assert tuple(found) == OF_INPUTS
    assert all(not bool(value.any()) for value in found.values())
    assert found["histogram"].shape == (4, BINS)
    assert found["sample"].shape == (0, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_place(bad: float) -> None:
    x = torch.ones(5000, 3)
    x[4999, 1] = bad
    for needs in (("sum_x2",), ("tokens",), ("histogram",)):
        with pytest.raises(NonFinite, match=r"the inputs of 'blocks.0.up' became NaN or infinite in feature 1 of 3"):
            Collector(3, needs, "blocks.0.up").add(x)


def test_sums_that_overflow_are_refused() -> None:
    collector = Collector(2, ("sum_x4",))
    collector.add(torch.tensor([[1.0, 1e12]]))
    with pytest.raises(NonFinite, match="feature 1 of 2"):
        collector.result()


def test_the_sample_is_spread_evenly_over_all_tokens() -> None:
    tokens = 5 * SAMPLE + 3
    x = torch.arange(tokens).float()[:, None]
    for cuts in ([], [1, 700, 701], list(range(1, tokens, 61))):
        rows = collected(x, cuts, ("sample",))["sample"][:, 0]
        assert SAMPLE // 2 < len(rows) <= SAMPLE
        assert rows.tolist() == list(range(0, tokens, 8))


def test_only_what_is_asked_for_is_collected_and_gradients_are_left_out() -> None:
    collector = Collector(2, ("grad2", "sum_x2", "sum_x2", "spsa"))
    collector.add(torch.ones(3, 2))
    assert {name: value.tolist() for name, value in collector.result().items()} == {"sum_x2": [3.0, 3.0]}
    with pytest.raises(ValueError, match="no such statistics: sum_x3"):
        Collector(2, ("sum_x3",))
    with pytest.raises(ValueError, match="for 2 in-features"):
        collector.add(torch.ones(3, 4))


def test_collecting_changes_neither_inputs_nor_their_graph() -> None:
    x = torch.ones(4, 2, requires_grad=True)
    collector = Collector(2, OF_INPUTS)
    collector.add(x * 1.0)
    assert not any(value.requires_grad for value in collector.result().values())
    before = collector.result()["sample"].clone()
    collector.add(torch.zeros(4, 2))
    assert torch.equal(collector.result()["sample"][:4], before)


def test_the_column_norm_is_the_norm_over_all_tokens() -> None:
    x = inputs(64, 5)
    stats = collected(x, [10, 20], ("sum_x2",))
    torch.testing.assert_close(column_norm(stats), torch.linalg.vector_norm(x, dim=0))
    assert column_norm({"sum_x2": torch.zeros(3)}).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(NonFinite, match="the statistic sum_x2"):
        column_norm({"sum_x2": torch.tensor([1.0, math.inf])})
