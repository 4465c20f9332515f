"""``bitmap`` on GPUs: one bit a position, and values that a lane ranks for itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton import bitmap, pack_verified
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from tests.codegen.triton.checks import check
from tests.codegen.triton.fragment_model import execute


@settings(max_examples=10, deadline=None)
@given(
    values=st.sampled_from(["bf16", "fp16"]),
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 400),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    values: str, m: int, n: int, k: int, density: float, act: str, bias: bool, seed: int
) -> None:
    check(f"bitmap+{values}", "tile", m, n, k, density=density, act=act, bias=bias, seed=seed, configs=2)


def test_the_assembly_computes_what_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs assembly by the model of it."""
    from triton.runtime import interpreter

    texts = set()

    def run_assembly(self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        assert (pack, constraints.count("=")) == (1, 1)
        texts.add(text)
        shape = values[0].data.shape
        inputs = [np.ascontiguousarray(v.data).view(np.uint32).reshape(-1, 32, 1) for v in values]
        made = np.ascontiguousarray(execute(text, inputs, 1)).view(np.int32).reshape(shape)
        handle = interpreter.TensorHandle(made, values[0].dtype)
        return SimpleNamespace(get_result=lambda index: handle)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", run_assembly)
    monkeypatch.setattr(bitmap, "NATIVE", True)
    check("bitmap+bf16", "tile", 3, 40, 300, density=0.5, configs=1)
    assert len(texts) == 4 + 16  # three counts and their sum; a mask for each pair of a word


def test_splits_give_the_same_sums_whatever_runs_first() -> None:
    check("bitmap+bf16", "tile", 8, 32, 1024, density=0.5, configs=4)


def test_a_full_chunk_has_no_room_for_a_zero_and_needs_none() -> None:
    weight = torch.ones(1, 256, dtype=torch.bfloat16)
    assert pack_verified(weight, Format.parse("bitmap+bf16"), "test").tensors[2].tolist() == [0, 16, 32]


def test_a_chunk_starts_at_a_multiple_of_eight_values() -> None:
    weight = torch.zeros(2, 256, dtype=torch.float16)
    weight[0, 5], weight[0, 200:209], weight[1, 255] = 1.0, 2.0, 3.0
    packed = pack_verified(weight, Format.parse("bitmap+fp16"), "test")
    assert packed.tensors[2].tolist() == [0, 1, 3, 3, 4]


def test_values_of_another_dtype_are_refused() -> None:
    with pytest.raises(PatternMismatch, match="float16"):
        pack_verified(torch.zeros(1, 8, dtype=torch.float16), Format.parse("bitmap+bf16"), "test")
