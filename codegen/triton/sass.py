"""What the machine code of a kernel costs: a cubin in, instruction counts and what must not be there out.

The disassembler is the one Triton ships. Nothing is run: counts are of the longest loop of the code, which is the one
that reads the weight, and become lane instructions per unit of work (a position of the dense matrix, or a non-zero).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsec.codegen.triton.compile import Compiled
from sparsec.codegen.triton.launch import Launch

LANES = 32  # of a warp
STEP = 16  # bytes of an instruction, from sm_70 on
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_LABEL = re.compile(r"(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Sass:
    """``loop``: opcodes of the longest loop, in order. ``local``: bytes of spilled registers and local arrays a thread.

    ``per_unit``: lane instructions of the loop for each unit of work; 0 where the launch says no loop.
    ``wide``: 16-byte loads from global memory in the loop. ``conversions``: layout conversions in the TTGIR's loops.
    """

    name: str
    capability: int
    registers: int
    local: int
    shared: int
    instructions: int
    loop: tuple[str, ...]
    per_unit: float
    wide: int
    conversions: int

    def has(self, opcode: str) -> bool:
        """Whether some instruction of the whole loop starts with ``opcode``."""
        return any(name.startswith(opcode) for name in self.loop)

    @property
    def kinds(self) -> Counter[str]:
        """How often each opcode stands in the loop, without its suffixes."""
        return Counter(name.split(".")[0] for name in self.loop)


def analysed(launch: Launch, compiled: Compiled) -> Sass:
    """Read a compiled launch."""
    read = disassembled(compiled.cubin)
    per = len(read.loop) * LANES * launch.warps / launch.loop.count if launch.loop else 0.0
    moved = conversions(compiled.ttgir)
    return replace(read, name=compiled.name, capability=compiled.capability, per_unit=per, conversions=moved)


@functools.lru_cache(maxsize=512)
def disassembled(cubin: bytes) -> Sass:
    """Read machine code of one kernel, whatever made it; what only its launch knows is left empty."""
    used = resources(cubin)
    found = instructions(listing(cubin))
    loop = longest_loop(found)
    wide = sum(op.startswith("LDG") and ".128" in op for op in loop)
    return Sass("", 0, used.registers, used.local, used.shared, len(found), loop, 0.0, wide, 0)


@dataclass(frozen=True)
class Resources:
    """What one thread takes: ``registers``, and bytes of spills and arrays (``local``); ``shared``: bytes a program."""

    registers: int
    local: int
    shared: int


def resources(cubin: bytes) -> Resources:
    """Of the one kernel in the cubin, as its header says: a hundred times faster than to read the code."""
    text = _tool("cuobjdump", "-res-usage", cubin=cubin)
    registers, stack, shared, local = map(int, _RESOURCES.search(text).groups())  # type: ignore[union-attr]
    return Resources(registers, stack + local, shared)


def instructions(text: str) -> list[tuple[int, str]]:
    """(address, text) of each instruction of a listing, branches to addresses in place of labels."""
    found: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if m := _LINE.match(line):
            found.append((int(m[1], 16), m[2]))
        elif m := _LABEL.match(line):
            labels[m[1]] = found[-1][0] + STEP if found else 0
    return [(at, _TARGET.sub(lambda m: hex(labels[m[1]]) if m[1] in labels else m[0], said)) for at, said in found]


def longest_loop(code: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    """Opcodes between a backward branch and its target, of the longest such piece; () where there is none.

    ``code``: (address, text) in order. A branch to itself, which ends every kernel, is no loop.
    """
    index = {address: i for i, (address, _) in enumerate(code)}
    best: Sequence[tuple[int, str]] = ()
    for i, (address, text) in enumerate(code):
        target = int(m[1], 16) if (m := _JUMP.search(text)) else address
        if target < address and target in index and i + 1 - index[target] > len(best):
            best = code[index[target] : i + 1]
    return tuple(opcode(text) for _, text in best)


def opcode(text: str) -> str:
    """``LDG.E.128`` of ``@!P0 LDG.E.128 R4, [R2.64]``."""
    words = text.split()
    return words[1] if words[0].startswith("@") and len(words) > 1 else words[0]


def conversions(ttgir: str) -> int:
    """Layout conversions inside loops (the body of ``scf.for``) of a kernel's TTGIR."""
    count = depth = 0
    for line in ttgir.splitlines():
        if "scf.for" in line or "scf.while" in line:
            depth += 1
        elif depth and re.match(r"\s*}( loc| {| :|$)", line):
            depth -= 1
        count += depth > 0 and "ttg.convert_layout" in line
    return count


@functools.cache
def tools() -> Path:
    """The folder of ``nvdisasm`` and ``cuobjdump``."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@functools.lru_cache(maxsize=16)
def listing(cubin: bytes) -> str:
    """The line of resources, then instructions and labels; without data flow, a quarter of the time."""
    return _tool("cuobjdump", "-res-usage", cubin=cubin) + _tool("nvdisasm", "-c", "-novliw", "-ndf", cubin=cubin)


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tools() / name), *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout
