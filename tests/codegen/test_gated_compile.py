"""Kernels that read a part of a weight compile for every architecture, in loads of 16 bytes and within budget."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton import GATES, family, pack_verified
from sparsec.codegen.triton.compile import CAPABILITIES, compile_launch
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.gated import DTYPES
from sparsec.codegen.triton.sass import analysed
from sparsec.formats import Format, Pattern


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    ("values", "capability"), [*(("bf16", c) for c in CAPABILITIES), *((values, 90) for values in ("fp16", "fp32"))]
)
def test_kernels_that_read_a_part_keep_their_budget(kind: str, values: str, capability: int) -> None:
    chosen, weight = family(kind), torch.zeros(2048, 4096, dtype=DTYPES[values])
    (loop,) = chosen.loops
    packed = pack_verified(weight, Format(Pattern("panel"), values), "test", loop)
    for m in (1, 8) if capability == 90 else (1,):
        x, y = weight.new_zeros(m, 4096), weight.new_zeros(m, 2048)
        call = Call(x, y, capability=capability, gate=0.5, needed=y, weight=weight)
        for launch in chosen.launches(packed, loop, call, chosen.configs(packed, loop, m, capability)[0]):
            sass = analysed(launch, compile_launch(launch, capability))
            moved = int(kind == "chosen" and m > 2 and launch.loop is not None)  # x, for the outputs that share it
            assert sass.local == 0, (launch.name, m)
            assert sass.conversions <= moved, (launch.name, m)
            if launch.loop:
                assert sass.wide, m
                assert sass.per_unit <= launch.loop.budget, m
