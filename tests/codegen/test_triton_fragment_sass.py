"""The machine code of ``fragment``: tensor cores fed by 16-byte loads, with nothing between lanes."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from dataclasses import replace

from sparsec.codegen.triton.compile import compile_launch
from sparsec.codegen.triton.samples import samples
from sparsec.codegen.triton.sass import analysed, listing
from tests.codegen.test_triton_nm24_sass import assert_registers_of_one_lane

FORMATS = ("dense+int4g128", "dense+codebook", "nm:8:16+bf16")


@pytest.mark.parametrize("whole", [True, False])
def test_all_lanes_take_part_in_every_product_and_hold_four_registers_of_a_tensor(whole: bool) -> None:
    seen = []
    for sample in samples(90, ("fragment",), (4,)):
        if sample.format not in FORMATS:
            continue
        (launch,) = (one for one in sample.launches if one.loop)
        launch = replace(launch, constants={**launch.constants, "WHOLE": whole})
        compiled = compile_launch(launch, 90)
        sass = analysed(launch, compiled)
        products = [line for line in listing(compiled.cubin).splitlines() if "HMMA.16816" in line]
        assert products, sample.format
        assert not [line for line in products if re.search(r"@!?U?P\d", line)]
        assert sass.conversions == 0
        assert not [op for op in sass.loop if op.startswith(("LDL", "STL"))], sample.format  # 8:16 spills before it
        assert sass.wide == sum(op.startswith("LDG") and ".64" not in op for op in sass.loop), sample.format
        assert_registers_of_one_lane(compiled)
        seen.append(sample.format)
    assert sorted(seen) == sorted(FORMATS)
