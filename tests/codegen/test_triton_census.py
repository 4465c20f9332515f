"""The instructions of every GPU kernel are data: a change of the machine code shows as a change of ``sass.json``."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton import FAMILIES, GATES, census, family  # noqa: E402

# Main loops that do not read the weight in 16-byte loads: eight values of a byte are a block; three are a group.
NARROW = {"index": {"index+int8"}, "nm": {"nm:3:32+bf16"}}


@pytest.mark.parametrize("kind", [*FAMILIES, *GATES])
def test_a_family_compiles_to_the_stored_counts_without_spills(kind: str, pytestconfig: pytest.Config) -> None:
    """One test a family, whatever it shows: to compile one takes long, and processes share no fixtures."""
    counted = tuple(census.count(kinds=(kind,)))
    made = family(kind)
    assert {(name, loop) for name in made.formats for loop in made.loops} <= {(c.format, c.loop) for c in counted}
    assert {c.kind for c in counted} == {kind}
    assert not [c for c in counted if c.local or c.missing]
    assert {c.format for c in counted if c.m <= 4 and not c.wide} == NARROW.get(kind, set())
    others = [c for c in census.stored() if c.kind != kind]
    if pytestconfig.getoption("--update-golden"):
        assert "PYTEST_XDIST_WORKER" not in os.environ, "families are written one after the other: leave out -n"
        census.write([*others, *counted])
        census.stored.cache_clear()
    if triton.__version__ != census.stored_version():
        pytest.skip(f"counted with Triton {census.stored_version()}, and {triton.__version__} is here")
    assert set(counted) == {c for c in census.stored() if c.kind == kind}


def test_the_file_counts_the_registered_families_alone() -> None:
    assert {c.kind for c in census.stored()} == {*FAMILIES, *GATES}
