"""The machine code of ``nm24``: sparse tensor cores fed by 16-byte loads, with nothing between them."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton.compile import CAPABILITIES, Compiled, compile_launch
from sparsec.codegen.triton.samples import samples
from sparsec.codegen.triton.sass import Sass, analysed, listing


def readers(capability: int, *rows: int) -> dict[tuple[str, int], tuple[Compiled, Sass, float]]:
    """By format and rows of x: the kernel that reads the weight, and its budget."""
    made = {}
    for sample in samples(capability, ("nm24",), rows):
        (launch,) = (launch for launch in sample.launches if launch.loop)
        assert launch.loop
        compiled = compile_launch(launch, capability)
        made[sample.format, sample.m] = compiled, analysed(launch, compiled), launch.loop.budget
    return made


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_loop_is_wide_loads_and_sparse_tensor_cores(capability: int) -> None:
    for key, (compiled, sass, budget) in readers(capability, 8).items():
        assert sass.has("HMMA.SP"), key
        assert (sass.conversions, sass.local) == (0, 0), key
        assert sass.wide == sass.kinds["LDG"], key
        assert sass.per_unit < min(2.0, budget), key
        assert_no_predicate(compiled)
        assert_registers_of_one_lane(compiled)


def test_one_row_and_many_keep_to_the_budget_of_an_h200() -> None:
    for key, (compiled, sass, budget) in readers(90, 1, 64).items():
        assert sass.has("HMMA.SP"), key
        assert (sass.conversions, sass.local) == (0, 0), key
        assert sass.per_unit < budget, key
        assert_no_predicate(compiled)
        assert_registers_of_one_lane(compiled)


def assert_no_predicate(compiled: Compiled) -> None:
    """All lanes of a warp have to take part in an instruction of the warp."""
    lines = [line for line in listing(compiled.cubin).splitlines() if "HMMA.SP" in line]
    assert lines
    assert not [line for line in lines if re.search(r"@!?U?P\d", line)]


def assert_registers_of_one_lane(compiled: Compiled) -> None:
    """Assembly that takes four elements gets four registers of a lane only in this layout of its tensors."""
    (layout,) = {
        name for line in compiled.ttgir.splitlines() if "elementwise_inline_asm" in line
        for name in re.findall(r"tensor<\d+x\w+, (#\w+)>", line)
    }  # fmt: skip
    (definition,) = (line for line in compiled.ttgir.splitlines() if line.startswith(f"{layout} = "))
    assert "sizePerThread = [4], threadsPerWarp = [32]" in definition
