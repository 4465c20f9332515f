"""Every GPU kernel compiles to machine code for every architecture here, where there is no GPU."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, and this process interprets them", allow_module_level=True)

from sparsec.codegen.triton import FAMILIES, LOOPS, sass
from sparsec.codegen.triton.census import COUNTED
from sparsec.codegen.triton.compile import CAPABILITIES, compile_launch
from sparsec.codegen.triton.samples import Sample, samples
from sparsec.codegen.triton.sass import instructions, longest_loop, resources
from sparsec.formats import Format, value_kind

OTHERS = [c for c in CAPABILITIES if c != COUNTED]  # that one is compiled for every number of rows by the census
ROWS = (1, 64)


def chosen(kind: str, capability: int, everything: bool = False) -> list[Sample]:
    """A part of what there is to compile for another architecture; ``everything``: all of it.

    The family's first format always; the first of each other kind of values at few rows here and at many there, since
    conversions and products are what targets lower differently; the rest, which are other tiles of the same, by turns.
    """
    found, turn = list(samples(capability, (kind,), ROWS)), OTHERS.index(capability)
    names = list(dict.fromkeys(s.format for s in found))
    firsts = list({values_of(name): name for name in reversed(names)}.values())
    rest = [name for name in names if name not in firsts]
    rows = {loop: [m for m in ROWS if not most or m <= most] for loop, most in LOOPS[kind].items()}

    def taken(sample: Sample) -> bool:
        if sample.format in rest:
            return rest.index(sample.format) % len(OTHERS) == turn
        return sample.format == names[0] or (rows[sample.loop].index(sample.m) + turn) % len(rows[sample.loop]) == 0

    return [s for s in found if everything or taken(s)]


def values_of(format: str) -> str:
    return value_kind(Format.parse(format).values)[0]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("capability", OTHERS)
def test_every_kernel_of_a_family_compiles_without_spills(
    kind: str, capability: int, pytestconfig: pytest.Config
) -> None:
    seen = set()
    for sample in chosen(kind, capability, pytestconfig.getoption("--every-format")):
        for launch in sample.launches:
            if launch.identity in seen:
                continue
            seen.add(launch.identity)
            assert resources(compile_launch(launch, capability).cubin).local == 0, (sample.name, launch.name)
    assert seen


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_left_out_on_one_architecture_is_compiled_on_another(kind: str) -> None:
    parts = [chosen(kind, capability) for capability in OTHERS]
    whole = [chosen(kind, capability, everything=True) for capability in OTHERS]
    assert {s.name for part in parts for s in part} == {s.name for part in whole for s in part}
    for part, every in zip(parts, whole, strict=True):
        assert {(s.loop, s.m) for s in part} == {(s.loop, s.m) for s in every}
        assert {values_of(s.format) for s in part} == {values_of(s.format) for s in every}


def test_branches_to_labels_are_loops() -> None:
    code = [
        "        /*0000*/                   MOV R1, R2 ;",
        ".L_x_1:",
        "        /*0010*/                   LDG.E.128 R4, [R2.64] ;",
        "        /*0020*/              @!P0 BRA `(.L_x_1) ;",
        ".L_x_2:",
        "        /*0030*/                   BRA `(.L_x_2);",
    ]
    found = instructions("\n".join(code))
    assert [said.split("BRA ")[-1].strip() for _, said in found[2:]] == ["0x10", "0x30"]
    assert longest_loop(found) == ("LDG.E.128", "BRA")


def test_stack_and_spills_are_both_local_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said = " Function f:\n  REG:40 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:440 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    monkeypatch.setattr(sass, "_tool", lambda *_, cubin: said)
    assert resources(b"") == sass.Resources(40, 24, 1024)
