"""The bench of quantised weights: grid and targets, packed files, engines against floats, the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import cases, quantised_cases, quantised_targets
from benchmarks.__main__ import choose
from benchmarks.cases import Case, packed_bytes
from benchmarks.coordinator import Result, largest_error, measure
from benchmarks.engines import ENGINES, Declines, weights
from benchmarks.quantised_engines import on_grid
from benchmarks.quantised_onnx import GROUP, int4, packed
from benchmarks.quantised_report import REACHED, columns
from benchmarks.quantised_weights import Quantised, quantised, stack, stack_reference, stack_weights, token
from benchmarks.report import markdown, tables, write_report
from sparsec.passes.quantize.contract import Grid
from sparsec.timing import Samples

SMALL = Case("linear", 1, "fp32", 0.5, n=256, k=256, m=2, matrices=3, weights="int8", x8=True)
STACK = Case("stack", 1, "fp32", 0.5, n=384, k=256, weights="int8", x8=True, blocks=2)
DENSE = [name for name, e in ENGINES.items() if e.dense and e.takes(SMALL)]
GRIDS = ("standard", "full", "quick")


@pytest.mark.parametrize("grid", GRIDS)
def test_only_quantised_keeps_all_quantised_cases_and_no_other(grid: str) -> None:
    mine = [case.name for case in getattr(quantised_cases, grid)(2)]
    assert len(mine) == len(set(mine))
    chosen = choose(grid == "quick", grid == "full", "quantised", 2)
    assert sorted(case.name for case in chosen) == sorted(mine)
    assert not any("quantised" in case.name for case in getattr(cases, grid)(2))


def test_the_standard_grid_has_a_row_for_every_target() -> None:
    there = {(c.weights, c.pattern, c.m, c.sparsity) for c in quantised_cases.standard(2) if c.target}
    assert set(quantised_targets.TARGETS) <= there
    assert ("int4g128", "", 1, 0.8) in there


def test_the_standard_grid_holds_both_shapes_all_batches_one_thread_and_both_stacks() -> None:
    found = list(quantised_cases.standard(2))
    assert {(c.n, c.k) for c in found if c.kind == "linear"} == set(cases.SHAPES)
    assert {c.m for c in found} == {1, 8, 64}
    assert {c.threads for c in found} == {1, 2}
    assert {c.threads for c in quantised_cases.standard(1)} == {1}
    assert {c.weights for c in found if c.kind == "stack"} == {"int8", "int4g128"}
    assert {c.dtype for c in found if not c.x8} == {"fp32", "bf16"}


def test_int4_has_one_target_for_hot_and_one_for_cold_weights() -> None:
    hot, cold = (quantised_cases.linear((4096, 4096), "int4g128", 1, 0.8, c, 2) for c in (False, True))
    assert (hot.target, cold.target) == (1.1, 1.6)
    assert quantised_cases.linear((4096, 4096), "int4g128", 1, 0.8, True, 2, "fp32").target is None
    assert quantised_cases.stack("int8", 0.5, 2).target is None


def test_a_small_value_is_read_densely_where_a_bit_a_position_is_no_less() -> None:
    assert packed_bytes(8, 8, "ternary", 0.5) == 64 * 0.25
    assert packed_bytes(8, 8, "int8", 0.0) == 64
    assert packed_bytes(8, 8, "int8", 0.5) == 64 * 0.625


def test_dense_engines_see_one_case_for_all_densities_of_a_grid() -> None:
    found = [c for c in quantised_cases.standard(2) if c.name.startswith("quantised 4096x4096 int8 x=int8 M=1 cold")]
    assert len({c.dense_key for c in found if c.threads == 2}) == 1


@pytest.mark.parametrize("kind", ["int8", "int4g128", "ternary"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_weights_lie_on_their_grid_and_have_the_zeros_of_their_case(kind: str, sparsity: float) -> None:
    case = replace(SMALL, weights=kind, sparsity=sparsity)
    found = quantised(case)
    dense = found.dense()
    assert 1 - dense.count_nonzero().item() / dense.numel() >= sparsity - 0.01
    if kind == "ternary":
        assert set(found.q.unique().tolist()) <= {-1, 0, 1}
        return
    bits, group = (8, 0) if kind == "int8" else (4, 128)
    torch.testing.assert_close(Grid(bits, group).nearest(dense), dense)


def test_a_row_without_values_is_a_row_of_zeros() -> None:
    found = quantised(replace(SMALL, weights="ternary", sparsity=1 - 1e-12)).dense()
    assert not found.any()


def test_blocks_are_zero_or_full() -> None:
    q = quantised(replace(SMALL, pattern="block:16x16", sparsity=0.5)).q
    counts = (q != 0).reshape(16, 16, 16, 16).sum((1, 3))
    assert ((counts == 0) | (counts > 200)).all()
    assert 0.3 < (counts == 0).float().mean() < 0.7


def test_matrices_beyond_the_first_are_other_memory_on_the_same_grid() -> None:
    first, *others = weights(replace(SMALL, matrices=4), 1.0)
    assert len(others) == 3
    for other in others:
        assert other.data_ptr() != first.data_ptr()
        torch.testing.assert_close(other.sum(), first.sum())
        assert not torch.equal(other, first)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 4, 8]), st.integers(0, 2**16))
def test_packed_bits_unpack_to_their_values(rows: int, groups: int, bits: int, seed: int) -> None:
    top = 2 ** (bits - 1)
    q = np.random.default_rng(seed).integers(-top, top, (rows, groups * GROUP)).astype(np.int8)
    found = packed(q, bits)
    assert found.shape == (rows, groups, GROUP * bits // 8)
    for row, group, column in ((0, 0, 0), (rows - 1, groups - 1, GROUP - 1), (rows // 2, groups // 2, 37)):
        byte = int(found[row, group, column * bits // 8])
        value = (byte >> (column * bits % 8)) % 2**bits - top
        assert value == q[row, group * GROUP + column]


def test_a_tensor_of_int4_reads_back() -> None:
    from onnx import numpy_helper

    q = np.random.default_rng(0).integers(-8, 8, (6, 10)).astype(np.int8)
    assert (numpy_helper.to_array(int4(q, "q")).astype(np.int8) == q).all()


@pytest.mark.parametrize("kind", ["int8", "int4g128", "ternary"])
@pytest.mark.parametrize("x", ["int8", "fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in DENSE if name != "inductor"])
def test_dense_peers_differ_from_floats_by_their_rounding_only(name: str, x: str, kind: str) -> None:
    case = replace(SMALL, weights=kind, x8=x == "int8", dtype="bf16" if x == "bf16" else "fp32")
    with torch.no_grad():
        try:
            built = ENGINES[name].build(case)
        except Declines as why:
            pytest.skip(f"{name}: {why}")
    assert built.error < 0.02
    assert built.path


@pytest.mark.parametrize("kind", ["int8", "int4g128"])
@pytest.mark.parametrize("name", ["ort-int8", "ort-nbits", "openvino"])
def test_a_stack_in_onnx_is_the_stack_in_torch_but_for_rounding(name: str, kind: str) -> None:
    with torch.no_grad():
        try:
            built = ENGINES[name].build(replace(STACK, weights=kind))
        except Declines as why:
            pytest.skip(f"{name}: {why}")
    assert built.error < 0.05


def test_a_stack_that_rounds_nothing_is_its_float_reference() -> None:
    case = replace(STACK, x8=False)
    with torch.no_grad():
        torch.testing.assert_close(stack(case)(token(case)), stack_reference(case))
    assert len(list(stack_weights(case))) == case.blocks


@pytest.mark.parametrize("case", [SMALL, replace(STACK, weights="int4g128")], ids=["linear", "stack"])
def test_sparsec_runs_the_program_and_names_its_kernel(case: Case) -> None:
    with torch.no_grad():
        built = ENGINES["sparsec"].build(case)
        built.call()
    assert 1e-5 < built.error < 0.05  # x is rounded, and that shows
    assert case.weights in built.path


def test_a_compiler_that_changes_the_answer_is_refused() -> None:
    def wrong(module: nn.Module) -> Any:
        return lambda *xs: [y * 1.01 for y in module(*xs)]

    with torch.no_grad(), pytest.raises(RuntimeError, match="differs from the program"):
        on_grid(wrong, SMALL)
    with torch.no_grad():
        assert on_grid(lambda module: module, SMALL).error < 0.02


@pytest.mark.parametrize(
    ("name", "case", "why"),
    [
        ("ort-int8", replace(SMALL, x8=False), "rounds x"),
        ("ort-int8", replace(SMALL, weights="int4g128"), "no groups"),
        ("ort-nbits", replace(SMALL, x8=False, dtype="bf16"), "bf16"),
        ("ort-nbits", replace(SMALL, k=192), "multiple"),
        ("torch-int", replace(SMALL, weights="ternary", x8=False), "ternary"),
        ("torch-int", STACK, "stacks"),
    ],
)
def test_peers_decline_what_they_have_no_product_for(name: str, case: Case, why: str) -> None:
    with pytest.raises(Declines, match=why):
        ENGINES[name].build(case)


class Idle:
    """A worker that only notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request["op"])
        return {"declined": "idle"}


@pytest.mark.parametrize(
    ("case", "taking", "others"),
    [
        (Case("linear", 1, "fp32", 0.9, n=64, k=64), {"eager", "csr"}, {"ort-int8", "ort-nbits", "torch-int"}),
        (SMALL, {"ort-int8", "inductor", "sparsec"}, {"eager", "csr", "freezing"}),
        (STACK, {"ort-nbits", "sparsec"}, {"inductor", "onnxruntime"}),
    ],
)
def test_an_engine_prepares_only_cases_that_it_takes_and_frees_its_memory_for_others(
    case: Case, taking: set[str], others: set[str]
) -> None:
    remotes: dict[str, Any] = {name: Idle() for name in taking | others}
    found = measure(case, remotes, rounds=1, budget_s=0.0, step=lambda what: None)
    assert set(found.declined) == taking
    assert all(remotes[name].asked == ["prepare"] for name in taking)
    assert all(remotes[name].asked == ["release"] for name in others)


def test_a_stack_that_does_not_fit_into_memory_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quantised_engines.available_bytes", lambda: 1e6)
    with pytest.raises(Declines, match="GB of memory"):
        on_grid(lambda module: module, STACK)


def test_errors_of_rounding_are_shown_and_those_of_floats_are_refused() -> None:
    assert largest_error(SMALL) > 0.05 > largest_error(Case("linear", 1, "fp32", 0.9, n=64, k=64))


def result(case: Case) -> Result:
    seconds = {"ort-int8": 4e-4, "inductor": 9e-4, "sparsec": 2e-4}
    errors = {"ort-int8": 0.0123, "inductor": 0.0, "sparsec": 0.0045}
    paths = {"ort-int8": "DynamicQuantizeMatMul", "inductor": "Inductor", "sparsec": "bitmap+int8 dot/int8"}
    return Result(case, {name: Samples((s,) * 9) for name, s in seconds.items()}, paths, {"torch-int": "no"}, errors)


def test_the_table_says_ratio_target_errors_and_both_paths(tmp_path: Path) -> None:
    case = quantised_cases.linear((4096, 4096), "int8", 1, 0.5, True, 2)
    report = write_report([result(case)], [case], list(ENGINES), 1.0, tmp_path)
    ((headers, row),) = tables(report)
    told = dict(zip(headers, row, strict=True))
    assert told["quantised"] == "4096x4096 int8 x=int8 M=1 cold 50% t2"
    assert told["ort-int8"] == "400*"
    assert told["vs best peer"] == "2.00x (2.00-2.00)"
    assert told["target"] == "1.65 reached"
    assert (told["error"], told["peer's error"]) == ("4.5e-03", "1.2e-02")
    assert (told["path"], told["peer's path"]) == ("bitmap+int8 dot/int8", "DynamicQuantizeMatMul")
    assert told["tokens/s"] == ""
    assert "Not run: torch-int: no" in markdown(report)


def test_a_stack_is_told_in_tokens_per_second(tmp_path: Path) -> None:
    report = write_report([result(STACK)], [STACK], list(ENGINES), 1.0, tmp_path)
    ((headers, row),) = tables(report)
    assert dict(zip(headers, row, strict=True))["tokens/s"] == "5000.0 / 2500.0"


def test_plain_and_quantised_rows_have_a_table_each(tmp_path: Path) -> None:
    plain = Case("linear", 1, "fp32", 0.9, n=64, k=64)
    found = [replace(result(SMALL), case=plain), result(SMALL)]
    report = write_report(found, [plain, SMALL], list(ENGINES), 1.0, tmp_path)
    first, second = tables(report)
    assert [len(first), len(second)] == [2, 2]
    assert [first[0][0], second[0][0]] == ["case", "quantised"]
    assert columns([], list(ENGINES)) == ["quantised", *REACHED]


def test_a_case_that_sparsec_did_not_run_says_why(tmp_path: Path) -> None:
    found = replace(result(SMALL), samples={}, declined={"sparsec": "it broke"})
    report = write_report([found], [SMALL], list(ENGINES), 1.0, tmp_path)
    assert "it broke" in tables(report)[0][1]


def test_a_quantised_weight_multiplies_its_groups() -> None:
    weight = Quantised(torch.tensor([[1, -2, 3, 0]], dtype=torch.int8), torch.tensor([[0.5, 2.0]]))
    wanted: Tensor = torch.tensor([[0.5, -1.0, 6.0, 0.0]])
    assert torch.equal(weight.dense(), wanted)
