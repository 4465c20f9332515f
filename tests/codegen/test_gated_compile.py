"""The gated kernels compile for every architecture here, read 16 bytes at a time and keep to their budget."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton.compile import CAPABILITIES, compile_launch
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.gated import DTYPES, FAMILY
from sparsec.codegen.triton.sass import analysed
from sparsec.formats import Format, Pattern


@pytest.mark.parametrize(
    ("values", "capability"), [*(("bf16", c) for c in CAPABILITIES), *((values, 90) for values in ("fp16", "fp32"))]
)
def test_gated_kernels_keep_their_budget(values: str, capability: int) -> None:
    dtype = DTYPES[values]
    packed = FAMILY.pack(torch.zeros(512, 4096, dtype=dtype), Format(Pattern("gated"), values), "test")
    for m in (1, 8) if capability == 90 else (1,):
        config = FAMILY.configs(packed, "threshold", m, capability)[0]
        call = Call(torch.zeros(m, 4096, dtype=dtype), torch.zeros(m, 512, dtype=dtype), capability=capability)
        for launch in FAMILY.launches(packed, "threshold", call, config, 0.5):
            sass = analysed(launch, compile_launch(launch, capability))
            assert (sass.local, sass.conversions) == (0, 0), (launch.name, m)
            if launch.loop:
                assert sass.wide, m
                assert sass.per_unit <= launch.loop.budget, m
