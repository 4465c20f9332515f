"""Pattern ``nm``: at most N of every M neighbours along K are kept (2:4, 8:16, 1:8 ...).

Dense patterns whose M divides 32 are bitmaps with exactly N bits a group, so that every word has the same number of
values and nothing is counted. Sparse ones (N/M <= 1/6) are sliced: all rows keep as much, so the lanes stay full. What
is left (e.g. 2:3) is a plain bitmap.
"""

from __future__ import annotations

import torch

from sparsec.codegen.cpp import bitmap, packer, sliced
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import is_coded, refusal
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.errors import PatternMismatch
from sparsec.formats import Pattern


def _layout(pattern: Pattern, values: str) -> str:
    n, m = pattern.params
    if 6 * n <= m and not (is_coded(values) and refusal("sliced", values)):
        return "sliced"
    return "fixed" if 32 % m == 0 else "bitmap"


def check(weight: torch.Tensor, pattern: Pattern) -> None:
    """Raises PatternMismatch, naming the first bad group, where a group of M holds more than N non-zeros."""
    n, m = pattern.params
    if n > m:
        raise PatternMismatch(format=str(pattern), detail=f"{n} of {m} cannot be kept")
    kept = (weight != 0).to(torch.uint8 if m < 256 else torch.int32)
    kept = torch.nn.functional.pad(kept, (0, -weight.shape[1] % m))
    bad = kept.view(weight.shape[0], kept.shape[1] // m, m).sum(2, dtype=torch.int32) > n
    if not bool(bad.any()):
        return
    row, group = (int(i) for i in bad.nonzero()[0])
    detail = (
        f"{int(bad.sum())} of {bad.numel()} groups keep more than {n}, the first in row {row} from column {group * m}"
    )
    raise PatternMismatch(format=str(pattern), detail=detail)


class NM:
    kind = "nm"
    loops = ("dot", "outer")

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        if not is_coded(values):
            weight = packer.checked(weight, values)
        check(weight, pattern)
        layout = _layout(pattern, values)
        if layout == "sliced":
            return sliced.pack(weight, pattern, values, source_key)
        n, m = pattern.params
        return bitmap.pack(weight, pattern, values, source_key, (n, m) if layout == "fixed" else (0, 0))

    def unpack(self, packed: Packed) -> torch.Tensor:
        layout = _layout(packed.format.pattern, packed.format.values)
        return (sliced.unpack if layout == "sliced" else bitmap.unpack)(packed)

    def text(self, spec: KernelSpec) -> str:
        layout = _layout(spec.format.pattern, spec.format.values)
        if layout == "sliced":
            return sliced.text(spec)
        n, m = spec.format.pattern.params
        return unit(spec, "bitmap", {"kFixed": 32 // m * n if layout == "fixed" else 0})


FAMILY = NM()
