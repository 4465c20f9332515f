"""Every GPU kernel compiles to machine code for every architecture here, where there is no GPU."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton import FAMILIES
from sparsec.codegen.triton.census import COUNTED
from sparsec.codegen.triton.compile import CAPABILITIES, compile_launch
from sparsec.codegen.triton.samples import samples
from sparsec.codegen.triton.sass import analysed

OTHERS = [c for c in CAPABILITIES if c != COUNTED]  # that one is compiled for every number of rows by the census
ROWS = (1, 64)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("capability", OTHERS)
def test_every_kernel_of_a_family_compiles_without_spills(kind: str, capability: int) -> None:
    seen = set()
    for sample in samples(capability, (kind,), ROWS):
        for launch in sample.launches:
            if launch.identity in seen:
                continue
            seen.add(launch.identity)
            sass = analysed(launch, compile_launch(launch, capability))
            assert sass.local == 0, (sample.name, launch.name)
    assert seen
