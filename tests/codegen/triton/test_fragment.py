"""``fragment`` on GPUs: weights in register order on dense tensor cores, by twins and by a model of the assembly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import reference
from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton import family, pack_verified
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.fragment import Fragment
from sparsec.codegen.triton.launch import run
from sparsec.codegen.triton.samples import sample_weight, x_dtype
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from tests.codegen.triton.checks import allowed, check
from tests.codegen.triton.fragment_model import execute

CONFIG = {"rows": 1, "each": 1, "parts": 1, "splits": 1}


def product(weight: torch.Tensor, name: str, x: torch.Tensor, asm: bool = False, **config: int) -> torch.Tensor:
    packed = pack_verified(weight, Format.parse(name), "test", "skinny")
    y = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
    launches: Any = family("fragment").launches(packed, "skinny", Call(x, y), {**CONFIG, **config})
    if asm:
        changed = {"ASM": True}
        launches = [
            dataclasses.replace(one, constants={**one.constants, **changed}) if "ASM" in one.constants else one
            for one in launches
        ]
    run(launches)
    return y


def sample(name: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n + k)
    return sample_weight(Format.parse(name), n, k), torch.randn(m, k).to(x_dtype(Format.parse(name)))


def assert_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    off = (y.float() - reference.linear(x, weight).float()).abs() - allowed(x, weight, None)
    assert bool((off <= 0).all())


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(Fragment.formats),
    m=st.sampled_from([1, 2, 7, 8, 9, 32]),
    n=st.integers(1, 20),
    k=st.one_of(st.integers(1, 300), st.just(256)),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(name: str, m: int, n: int, k: int, act: str, bias: bool, seed: int) -> None:
    check(name, "skinny", m, n, k, act=act, bias=bias, seed=seed, configs=1)


@pytest.mark.parametrize("name", ["dense+codebook", "nm:4:8+bf16"])
@pytest.mark.parametrize(("parts", "splits"), [(2, 1), (1, 2), (4, 2)])
def test_warps_without_a_block_add_nothing(name: str, parts: int, splits: int) -> None:
    weight, x = sample(name, 2, 20, 700)
    assert_close(product(weight, name, x, rows=2, parts=parts, splits=splits), x, weight)


@pytest.mark.parametrize("name", ["dense+int4g32", "dense+codebook", "nm:8:16+fp16"])
def test_warps_with_two_row_tiles_share_x(name: str) -> None:
    weight, x = sample(name, 20, 70, 300)
    assert_close(product(weight, name, x, rows=2, each=2), x, weight)


@pytest.mark.parametrize(
    ("name", "half"),
    [*((name, False) for name in Fragment.formats), *((f"dense+{kind}", True) for kind in ("int8", "ternary"))],
)
def test_the_assembly_computes_what_the_reference_does(name: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_by_model(monkeypatch)
    weight, x = sample(name, 3, 16, 512)
    if half:
        weight, x = weight.half(), x.half()
    assert_close(product(weight, name, x, asm=True, parts=2), x, weight)


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
        like = values[2] if text.startswith("mma") else values[0]
        return Made(interpreter.TensorHandle(made.view(like.data.dtype), like.dtype))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", run_assembly)


@pytest.mark.parametrize(("name", "keep"), [("nm:4:8+bf16", 4), ("nm:8:16+bf16", 8)])
def test_groups_that_keep_fewer_and_every_place_of_those_kept_are_packed(name: str, keep: int) -> None:
    """Each of the first 256 rows has another eight bits of places, shifted by a row's number elsewhere."""
    place = torch.arange(512) % 2
    number = torch.arange(256)[:, None]
    kept = (number >> (torch.arange(512) % 8)[None, :]) & 1
    kept = kept if keep == 4 else torch.where((torch.arange(512) // 8 % 2 == place), kept, 1 - kept)
    counts = kept.view(256, -1, 2 * keep).cumsum(2).flatten(1)
    weight = (torch.randn(256, 512) * kept * (counts <= keep)).bfloat16()
    x = torch.randn(3, 512).bfloat16()
    assert_close(product(weight, name, x, rows=4), x, weight)


def test_x_that_is_not_aligned_is_copied() -> None:
    weight, wide = sample("dense+int4", 2, 16, 514)
    weight = weight[:, :512].contiguous()
    weight[:, 0] = weight.abs().amax(1)
    for x in (wide[:, :512], wide[:, 1:513], wide.flatten()[: 2 * 513].view(2, 513)[:, :512]):
        assert_close(product(weight, "dense+int4", x), x, weight)


def test_a_weight_takes_the_bits_of_its_codes() -> None:
    bits = {"dense+int4": 4.0, "dense+ternary": 2.0, "dense+codebook": 4.1, "dense+int4g32": 4.5, "nm:4:8+bf16": 9.0}
    for name, expected in bits.items():
        weight = sample_weight(Format.parse(name), 64, 4096)
        packed = pack_verified(weight, Format.parse(name), "test", "skinny")
        assert packed.bytes * 8 / weight.numel() == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize(
    ("name", "says"),
    [("dense+bf16", "needs no pack"), ("nm:2:8+bf16", "4:8 and 8:16"), ("dense+int4g256", "32, 64 or 128")],
)
def test_what_has_no_layout_is_refused(name: str, says: str) -> None:
    with pytest.raises(PatternMismatch, match=says):
        family("fragment").pack(torch.zeros(16, 256, dtype=torch.bfloat16), Format.parse(name), "test")


def test_fp32_too_many_rows_and_another_dtype_are_refused() -> None:
    weight, x = sample("dense+int4", 33, 16, 256)
    with pytest.raises(PatternMismatch, match="float32"):
        family("fragment").pack(weight.float(), Format.parse("dense+int4"), "test")
    with pytest.raises(ValueError, match="at most 32"):
        product(weight, "dense+int4", x)
    with pytest.raises(ValueError, match="float16"):
        product(weight, "dense+int4", x[:1].half())
