"""A library of custom operators: names of formats in, one ``.so`` for ``register_custom_ops_library`` out.

Each kernel is the text that the CPU backend compiles, in a namespace of its own, once for every ISA; which of them runs
is chosen when the library is loaded. ``op.cpp`` is what they have in common, ``ort.h`` what it knows of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sparsec.codegen import cpp
from sparsec.codegen.build import compile_shared, isa_flags, text_of
from sparsec.codegen.cpp.codes import BITS
from sparsec.codegen.cpp.compose import part as cpp_part
from sparsec.codegen.cpp.int_steps import kept_of
from sparsec.codegen.spec import ISAS, KernelSpec
from sparsec.formats import Format, value_kind

DOMAIN = "sparsec"
LAYOUT = 1  # of packs in files; an operator refuses another one
FLAGS = ("-std=c++17", "-O2", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")
_FUNCTIONS = ("scratch", "prepare_units", "prepare", "run")
_SYSTEM = "#include <stdint.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n"


@dataclass(frozen=True)
class Op:
    """An operator: a format, and what its kernels round x to (``""`` or ``int8``).

    ``fixed``: with one scale for all of x, an attribute; else each row of x has its own. Its inputs are x, bias, work
    and the tensors of the pack; ``packs`` are the names of the latter. ``gaps`` is for the body alone (``bodies.py``).
    """

    format: Format
    x: str = ""
    fixed: bool = False

    @property
    def name(self) -> str:
        return f"{self.kernel}_fixed" if self.fixed else self.kernel

    @property
    def kernel(self) -> str:
        """The name of what it runs."""
        text = f"Linear_{self.format}".replace(":", "_").replace("+", "_")
        return f"{text}_x8" if self.x else text

    @property
    def packs(self) -> tuple[str, ...]:
        if self.x:
            return "codes", "masks", "start", "scale", "zero", "info"
        if self.format.pattern.kind == "index":
            return "values", "positions", "lanes", "heads", "start"
        return "masks", "values", "start", "gaps"

    @property
    def check(self) -> str:
        """The function of ``checks.cpp`` that knows such packs."""
        return "wrong_steps" if self.x else "wrong_slices" if self.format.pattern.kind == "index" else "wrong_bitmap"

    @property
    def masked(self) -> bool:
        """Whether a value is stored only where a mask says so."""
        return not self.x or kept_of(self.format.pattern) != 64

    @property
    def loops(self) -> tuple[str, ...]:
        return ("dot",) if self.x else cpp.loops_of(self.format)


def supported(format: Format, x: str = "") -> bool:
    """Whether there is an operator."""
    return Op(format, x) in STANDARD


STANDARD = (
    Op(Format.parse("bitmap+fp32")),
    Op(Format.parse("bitmap+int8"), "int8"),
    Op(Format.parse("bitmap+int8"), "int8", fixed=True),
    Op(Format.parse("panel+int8"), "int8"),
    Op(Format.parse("panel+int8"), "int8", fixed=True),
    Op(Format.parse("index+fp32")),
)


def compile_library(ops: Sequence[Op], cache: Path) -> Path:
    """Compile operators, once. Raises NoCompiler, CompileFailed."""
    kernels = [(op, spec) for op in {op.kernel: op for op in ops}.values() for spec in _specs(op)]
    with ThreadPoolExecutor(4) as pool:
        objects = list(pool.map(lambda kernel: _object(kernel[0], kernel[1], cache), kernels))
    text = "\n".join([_own("ort.h"), cpp_part("abi.h"), _own("op.h"), _declared(kernels), _own("checks.cpp")])
    text += "\n".join([_own("op.cpp"), _table(ops)])
    text = text.replace("#pragma once\n", "").replace('#include "op.h"\n', "")
    return compile_shared(text, "onnx", (*FLAGS, f"-DSPARSEC_LAYOUT={LAYOUT}", *map(str, objects)), cache)


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _specs(op: Op) -> Iterator[KernelSpec]:
    return (KernelSpec(op.format, loop, "fp32", isa, x=op.x) for isa in ISAS for loop in op.loops)


def _symbol(op: Op, spec: KernelSpec) -> str:
    return f"{op.kernel}_{spec.loop}_{spec.isa}"


def _object(op: Op, spec: KernelSpec, cache: Path) -> Path:
    """A kernel whose functions have names of its own, and whose templates nobody else's are mistaken for."""
    name = _symbol(op, spec)
    names = "".join(f"#define sparsec_{f} {name}_{f}\n" for f in _FUNCTIONS)
    system = _SYSTEM if spec.isa == "portable" else f"{_SYSTEM}#include <immintrin.h>\n"
    body = text_of(spec).replace('extern "C" __attribute__((visibility("default")))', 'extern "C"')
    return compile_shared(f"{system}{names}namespace {name} {{\n{body}\n}}\n", name, (*isa_flags(spec), "-c"), cache)


def _declared(kernels: Iterable[tuple[Op, KernelSpec]]) -> str:
    lines = []
    for op, spec in kernels:
        name = _symbol(op, spec)
        lines += [f"int64_t {name}_scratch(int64_t, int64_t);", f"int64_t {name}_prepare_units(int64_t, int64_t);"]
        lines += [f"void {name}_{f}(const SparsecCall *, int64_t, int64_t);" for f in ("prepare", "run")]
    return 'extern "C" {\n' + "\n".join(lines) + "\n}\n"


def _table(ops: Sequence[Op]) -> str:
    rows = []
    for op in ops:
        kind, group = value_kind(op.format.values)
        loops = {loop: ", ".join(_loop(op, loop, isa) for isa in ISAS) for loop in ("dot", "outer")}
        numbers = f"{BITS[kind] if op.x else 0}, {group}, {int(op.masked)}, {int(op.fixed)}"
        rows.append(
            f'  {{"{op.name}", {len(op.packs)}, {op.check}, {numbers}, {{{loops["dot"]}}}, {{{loops["outer"]}}}}},'
        )
    listed = "\n".join(rows)
    return f"const OpInfo kOps[] = {{\n{listed}\n}};\nconst size_t kOpCount = {len(ops)};\n"


def _loop(op: Op, loop: str, isa: str) -> str:
    if loop not in op.loops:
        return "{}"
    name = f"{op.kernel}_{loop}_{isa}"
    return f"{{{name}_scratch, {name}_prepare_units, {name}_prepare, {name}_run}}"
