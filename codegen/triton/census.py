"""What every kernel costs in machine code, as data: ``sass.json`` beside this file.

In: samples of all families, compiled for one architecture. Out: one ``Count`` a kernel and number of rows. The file is
what the cost model reads on a machine whose kernels were not measured, and what a review sees change; a test counts
again and compares. Counts of another version of Triton differ a little, so the file says which made it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsec.codegen.triton import kind_of
from sparsec.codegen.triton.samples import ROWS
from sparsec.formats import Format

FILE = Path(__file__).with_name("sass.json")
COUNTED = 90  # the architecture that is stored; the others differ by a few instructions


@dataclass(frozen=True)
class Count:
    """One main kernel. ``per_unit``: lane instructions of its loop for each ``unit`` (weight or nonzero).

    ``repeats``: how often the weight is read for these rows. ``launches``: kernel calls of a product.
    ``bytes_position``, ``bytes_value``: what the pack takes for each position and each non-zero weight. ``local``:
    bytes of spills a thread. ``missing``: instructions that the launch expects and the code does not have.
    ``reason``: why ``per_unit`` is above ``budget``, where it is.
    """

    format: str
    loop: str
    m: int
    unit: str
    per_unit: float
    budget: float
    registers: int
    local: int
    shared: int
    wide: int
    conversions: int
    repeats: int
    launches: int
    bytes_position: float
    bytes_value: float
    missing: tuple[str, ...] = ()
    reason: str = ""

    @property
    def kind(self) -> str:
        """Of the family."""
        return kind_of(Format.parse(self.format), self.loop)


def count(capability: int = COUNTED, kinds: Sequence[str] = (), rows: tuple[int, ...] = ROWS) -> Iterator[Count]:
    """Compile and count; needs triton, no GPU. Raises KernelCompileFailed."""
    from sparsec.codegen.triton.compile import compile_launch
    from sparsec.codegen.triton.samples import samples
    from sparsec.codegen.triton.sass import Sass, analysed
    from sparsec.targets.cuda import ARCHITECTURES

    native = ARCHITECTURES[f"sm_{capability}"].native
    seen: dict[str, Sass] = {}  # kernels for several numbers of rows are often one
    for sample in samples(capability, tuple(kinds), rows):
        main = next(launch for launch in sample.launches if launch.loop)
        assert main.loop is not None
        key = main.identity
        sass = seen[key] = seen.get(key) or analysed(main, compile_launch(main, capability))
        missing = tuple(op for key, op in main.expects.items() if key in native and not sass.has(op))
        yield Count(
            sample.format, sample.loop, sample.m, main.loop.unit, round(sass.per_unit, 3), main.loop.budget,
            sass.registers, sass.local, sass.shared, sass.wide, sass.conversions, main.loop.repeats,
            len(sample.launches), round(sample.stored[0], 4), round(sample.stored[1], 4), missing,
            main.loop.reason if round(sass.per_unit, 3) > main.loop.budget else "",
        )  # fmt: skip


@functools.cache
def stored() -> tuple[Count, ...]:
    """The counts of the file."""
    said = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Count(**{**row, "missing": tuple(row["missing"])}) for row in said["counts"])


def stored_version() -> str:
    """Of the Triton that made the file."""
    return str(json.loads(FILE.read_text(encoding="utf-8"))["triton"])


def write(counts: Sequence[Count]) -> None:
    """Replace the file."""
    import triton

    rows = ",\n".join(f"  {json.dumps(asdict(c))}" for c in sorted(counts, key=lambda c: (c.format, c.loop, c.m)))
    text = f'{{"triton": "{triton.__version__}", "target": "sm_{COUNTED}", "counts": [\n{rows}\n]}}\n'
    FILE.write_text(text, encoding="utf-8")
