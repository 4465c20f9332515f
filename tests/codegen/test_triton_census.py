"""The instructions of every GPU kernel are data: a change of the machine code shows as a change of ``sass.json``."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton import FAMILIES, census, family  # noqa: E402

pytestmark = pytest.mark.xdist_group("census")  # one process counts for all


@pytest.fixture(scope="module")
def counted() -> tuple[census.Count, ...]:
    return tuple(census.count())


def test_the_stored_counts_are_those_of_the_code(
    counted: tuple[census.Count, ...], pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--update-golden"):
        census.write(counted)
        census.stored.cache_clear()
    if triton.__version__ != census.stored_version():
        pytest.skip(f"counted with Triton {census.stored_version()}, and {triton.__version__} is here")
    assert set(counted) == set(census.stored())


def test_no_kernel_spills_and_each_has_the_instructions_it_is_made_for(counted: tuple[census.Count, ...]) -> None:
    assert not [c for c in counted if c.local or c.missing]


def test_every_family_is_counted(counted: tuple[census.Count, ...]) -> None:
    found = {(c.format, c.loop) for c in counted}
    for kind in FAMILIES:
        assert {(name, loop) for name in family(kind).formats for loop in family(kind).loops} <= found, kind


def test_main_loops_of_few_rows_read_the_weight_in_16_byte_loads(counted: tuple[census.Count, ...]) -> None:
    narrow = {"index+int8": "eight values of a byte are a block", "nm:3:32+bf16": "three values are a group"}
    assert {c.format for c in counted if c.m <= 4 and not c.wide} == set(narrow)
