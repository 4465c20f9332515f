"""The instructions of every GPU kernel are data: a change of the machine code shows as a change of ``sass.json``."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton import FAMILIES, census, family  # noqa: E402

# One process counts a family for all tests of it, and families are counted by several.
KINDS = [pytest.param(kind, marks=pytest.mark.xdist_group(f"census {kind}")) for kind in FAMILIES]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def counted(kind: str) -> tuple[census.Count, ...]:
    return tuple(census.count(kinds=(kind,)))


def test_the_stored_counts_are_those_of_the_code(
    kind: str, counted: tuple[census.Count, ...], pytestconfig: pytest.Config
) -> None:
    others = [c for c in census.stored() if c.kind != kind]
    if pytestconfig.getoption("--update-golden"):
        assert "PYTEST_XDIST_WORKER" not in os.environ, "families are written one after the other: leave out -n"
        census.write([*others, *counted])
        census.stored.cache_clear()
    if triton.__version__ != census.stored_version():
        pytest.skip(f"counted with Triton {census.stored_version()}, and {triton.__version__} is here")
    assert {*counted, *others} == set(census.stored())


def test_no_kernel_spills_and_each_has_the_instructions_it_is_made_for(counted: tuple[census.Count, ...]) -> None:
    assert counted
    assert not [c for c in counted if c.local or c.missing]


def test_every_format_and_loop_of_a_family_is_counted(kind: str, counted: tuple[census.Count, ...]) -> None:
    assert {c.kind for c in counted} == {kind}
    found, made = {(c.format, c.loop) for c in counted}, family(kind)
    assert {(name, loop) for name in made.formats for loop in made.loops} <= found


def test_main_loops_of_few_rows_read_the_weight_in_16_byte_loads(kind: str, counted: tuple[census.Count, ...]) -> None:
    narrow = {"index": {"index+int8"}, "nm": {"nm:3:32+bf16"}}  # eight values of a byte are a block; three are a group
    assert {c.format for c in counted if c.m <= 4 and not c.wide} == narrow.get(kind, set())
