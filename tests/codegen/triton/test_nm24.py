"""``nm24`` on GPUs: 2:4 on sparse tensor cores, by its twin without assembly and by a model of the assembly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import reference
from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import family, pack_verified
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.launch import run
from sparsec.codegen.triton.mma_sp import decode_text, fold_text, mma_text
from sparsec.codegen.triton.samples import sample_weight, x_dtype
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from tests.codegen.triton.checks import allowed, check
from tests.codegen.triton.fragment_model import execute

VALUES = ("bf16", "fp16", "int8", "int4g128")
CONFIG = {"rows": 1, "each": 1, "parts": 1, "splits": 1, "direct": 0}


def packed_of(weight: torch.Tensor, values: str) -> Packed:
    return pack_verified(weight, Format.parse(f"nm:2:4+{values}"), "test", "skinny")


def product(packed: Packed, x: torch.Tensor, bias: torch.Tensor | None = None, asm: bool = False, **config: int) -> Any:
    y = torch.full((x.shape[0], packed.shape[0]), float("nan"), dtype=x.dtype)
    launches = family("nm24").launches(packed, "skinny", Call(x, y, bias), {**CONFIG, **config})
    if asm:
        launches = [
            dataclasses.replace(launch, constants={**launch.constants, "ASM": True})
            if "ASM" in launch.constants
            else launch
            for launch in launches
        ]
    run(launches)
    return y


def sample(values: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    format = Format.parse(f"nm:2:4+{values}")
    torch.manual_seed(n + k)
    return sample_weight(format, n, k), torch.randn(m, k).to(x_dtype(format))


def assert_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    off = (y.float() - reference.linear(x, weight).float()).abs() - allowed(x, weight, None)
    assert bool((off <= 0).all())


@settings(max_examples=12, deadline=None)
@given(
    values=st.sampled_from(VALUES),
    m=st.sampled_from([1, 2, 3, 7, 8, 9, 17, 33, 64]),
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 600), st.sampled_from([256, 512])),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(values: str, m: int, n: int, k: int, act: str, bias: bool, seed: int) -> None:
    check(f"nm:2:4+{values}", "skinny", m, n, k, act=act, bias=bias, seed=seed, configs=1)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("splits", [1, 2])
def test_parts_and_splits_that_do_not_divide_the_blocks_read_zeros(parts: int, splits: int) -> None:
    weight, x = sample("int4g128", 2, 50, 700)
    assert_close(product(packed_of(weight, "int4g128"), x, rows=2, parts=parts, splits=splits), x, weight)


@pytest.mark.parametrize("values", ["bf16", "int4g128"])
def test_warps_with_two_row_tiles_share_x(values: str) -> None:
    weight, x = sample(values, 20, 70, 300)
    assert_close(product(packed_of(weight, values), x, rows=2, each=2), x, weight)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("m", [1, 3, 9])
def test_the_assembly_computes_what_the_reference_does(values: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_by_model(monkeypatch)
    weight, x = sample(values, m, 40, 512)
    assert_close(product(packed_of(weight, values), x, asm=True, rows=2, parts=2, direct=int(m < 9)), x, weight)


@pytest.mark.parametrize("half", [False, True])
def test_the_assembly_multiplies_integers_with_fp16_too(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_by_model(monkeypatch)
    weight, x = sample("int8", 1, 16, 256)
    x = x.half() if half else x
    y = product(packed_of(weight, "int8"), x, asm=True)
    assert_close(y, x, weight)
    assert bool((y == product(packed_of(weight, "int8"), x)).all())  # integers times x: no rounding but of the sums


def run_by_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs assembly by the model of it."""
    from triton.runtime import interpreter

    class Made:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def get_result(self, index: int) -> Any:
            return self.handle

    def run_assembly(self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Made:
        assert (pack, constraints.count("=")) == (4, 4)
        inputs = [np.ascontiguousarray(v.data).view(np.uint32).reshape(-1, 32, 4) for v in values]
        made = np.ascontiguousarray(execute(text, inputs)).reshape(-1)
        like = values[-1 if text.startswith("{") else 0 if text.startswith("fma") else 2]
        return Made(interpreter.TensorHandle(made.view(like.data.dtype), like.dtype))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", run_assembly)


def test_the_model_on_packed_registers_is_a_matrix_product() -> None:
    weight, x = sample("bf16", 8, 16, 256)
    values, meta, *_ = packed_of(weight, "bf16").tensors
    a = values.numpy().view(np.uint32)[: 8 * 128].reshape(8, 1, 32, 4)
    e = meta.numpy().view(np.uint32)[:128].reshape(1, 32, 4)
    acc = np.zeros((1, 32, 4), dtype=np.uint32)
    bits = x.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)  # [8, 256]
    for j in range(8):
        b = np.zeros((1, 32, 4), dtype=np.uint32)
        for lane in range(32):
            for r in range(4):
                column = 32 * j + 8 * r + 2 * (lane % 4)
                b[0, lane, r] = bits[lane // 4, column] | bits[lane // 4, column + 1] << 16
        acc = execute(mma_text(j, False), [a[j], b, acc, e])
    expected = weight.double() @ x.double().T
    got = acc.view(np.float32)
    for lane in range(32):
        for r in range(4):
            row, column = lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2
            assert got[0, lane, r] == pytest.approx(float(expected[row, column]), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_every_byte_and_nibble_decodes_to_its_integer(half: bool) -> None:
    every = np.arange(-128, 128, dtype=np.int8)
    words = np.concatenate([every, every]).view(np.uint32).reshape(1, 32, 4)
    for tile in (0, 1):
        got = numbers(execute(decode_text(tile, 8, half), [words]), half)  # lane, register, (low, high)
        own = words.view(np.int8).reshape(32, 4, 4)[:, 2 * tile : 2 * tile + 2]  # lane, q, byte = 2 v + h
        assert (got.reshape(32, 2, 2, 2) == own.reshape(32, 2, 2, 2).transpose(0, 1, 3, 2)).all()
    nibbles = np.random.default_rng(0).integers(0, 16, (32, 4, 8), dtype=np.uint32)
    packed = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(2, dtype=np.uint32)[None]
    for tile in range(8):
        got = numbers(execute(decode_text(tile, 4, half), [packed]), half)
        assert (got == nibbles[:, tile % 4].reshape(32, 2, 4).transpose(0, 2, 1).astype(int) - 8).all()


def numbers(registers: Any, half: bool) -> Any:
    """[32, 4, 2] of [1, 32, 4]."""
    bits = np.stack([registers[0] & 0xFFFF, registers[0] >> 16], -1)
    return bits.astype(np.uint16).view(np.float16) if half else (bits << 16).view(np.float32)


def test_groups_of_128_have_a_scale_for_each_of_the_rows_of_a_lane() -> None:
    values = np.arange(1, 13, dtype=np.float32).reshape(3, 1, 1, 4) * np.ones((1, 1, 32, 1), dtype=np.float32)
    acc, part, scale = (v.view(np.uint32) for v in values)
    for group in (0, 1):
        got = execute(fold_text(group), [acc, part, scale]).view(np.float32)[0, 0]
        own = values[2, 0, 0, 2 * group : 2 * group + 2].repeat(2)
        assert (got == values[0, 0, 0] + values[1, 0, 0] * own).all()


@pytest.mark.parametrize("values", VALUES)
def test_groups_that_keep_fewer_than_two_and_rows_that_keep_none_are_packed(values: str) -> None:
    weight, x = sample(values, 1, 20, 300)
    weight[3] = 0
    weight[5, ::2] = 0
    weight[6, 128:] = 0
    if values.startswith("int"):
        weight[5] = 0
    assert_close(product(packed_of(weight, values), x), x, weight)


def test_negative_zeros_are_not_kept_and_nan_is() -> None:
    weight = torch.zeros(2, 8, dtype=torch.bfloat16)
    weight[0] = torch.tensor([-0.0, 1, -0.0, 2, float("nan"), 0, 0, -0.0])
    packed_of(weight, "bf16")


def test_a_third_value_of_four_is_named() -> None:
    weight = torch.zeros(4, 40, dtype=torch.float16)
    weight[2, 12:15] = 1
    with pytest.raises(PatternMismatch, match="1 groups of four keep more than two, the first in row 2 from column 12"):
        packed_of(weight, "fp16")


@pytest.mark.parametrize(("values", "says"), [("fp16", "bfloat16"), ("int8", "grid"), ("int4g64", "128")])
def test_what_the_values_do_not_hold_is_refused(values: str, says: str) -> None:
    weight = sample_weight(Format.parse("nm:2:4+bf16"), 16, 256)
    with pytest.raises(PatternMismatch, match=says):
        packed_of(weight, values)


def test_a_weight_takes_nine_bits_in_bf16_and_three_and_a_quarter_in_int4() -> None:
    for values, bits in (("bf16", 9.0), ("int8", 5.0), ("int4g128", 3.25)):
        weight = sample_weight(Format.parse(f"nm:2:4+{values}"), 128, 8192)
        assert packed_of(weight, values).bytes * 8 / weight.numel() == pytest.approx(bits, rel=0.02)


def test_x_is_read_in_place_only_where_its_pairs_are_aligned() -> None:
    weight, wide = sample("bf16", 2, 16, 257 * 2)
    packed, weight = packed_of(weight[:, :512].contiguous(), "bf16"), weight[:, :512]
    for x in (wide[:, :512], wide[:, 1:513], wide.flatten()[: 2 * 513].view(2, 513)[:, :512]):
        assert_close(product(packed, x, direct=1), x, weight)


def test_too_many_rows_and_another_dtype_are_refused() -> None:
    weight, x = sample("bf16", 65, 16, 256)
    packed = packed_of(weight, "bf16")
    with pytest.raises(ValueError, match="at most 64"):
        product(packed, x)
    with pytest.raises(ValueError, match="float16"):
        product(packed, x[:1].half())
