"""The pattern of a mask, as recipes spell it. In: ``2:4``, ``64:2:8``, ``block:16x1``, ``unstructured``. Out: a record.

``N:M`` means keep N of M consecutive in-features, everywhere in sparsec. (SparseGPT, Wanda and llm-compressor count
the *pruned* ones; for 2:4, 4:8 and 8:16 it is the same.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsec.errors import BadPattern

VNM_COLUMNS = 4  # VENOM (Castro et al., 2023) keeps four columns of every V x M block, then N of those four per row
_SPELLED = re.compile(r"(?:(?P<kind>nm|vnm|block):)?(?P<numbers>\d+(?:[:x]\d+)*)")


@dataclass(frozen=True)
class MaskPattern:
    """``kind`` with ``params``: unstructured (), nm (n, m), vnm (v, n, m), block (rows, cols)."""

    kind: str = "unstructured"
    params: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "block":
            return f"block:{self.params[0]}x{self.params[1]}"
        return ":".join(map(str, self.params)) or self.kind

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself fixes (0.5 for 2:4), or None where the recipe chooses it."""
        if self.kind in ("unstructured", "block"):
            return None
        n, m = self.params[-2:]
        return 1.0 - n / m

    @property
    def group(self) -> int:
        """In-features that belong together: a column block handed to ``select`` starts at a multiple of it."""
        return self.params[-1] if self.params else 1

    @classmethod
    def parse(cls, text: object) -> MaskPattern:
        """Read a pattern. Raises BadPattern."""
        if not isinstance(text, str):
            raise BadPattern(pattern=text, why=_not_text(text))
        if text == "unstructured":
            return cls()
        found = _SPELLED.fullmatch(text)
        if found is None:
            raise BadPattern(pattern=text, why="is not a pattern")
        is_block = found["kind"] == "block"
        separator = "x" if is_block else ":"
        numbers = found["numbers"].split(separator)
        if not all(number.isdigit() for number in numbers):
            raise BadPattern(pattern=text, why="is not a pattern")
        kind = "block" if is_block else {2: "nm", 3: "vnm"}.get(len(numbers), "")
        if found["kind"] not in (None, kind) or (is_block and len(numbers) != 2) or not kind:
            raise BadPattern(pattern=text, why="is not a pattern")
        pattern = cls(kind, tuple(map(int, numbers)))
        if why := pattern._wrong():
            raise BadPattern(pattern=text, why=why)
        return pattern

    def _wrong(self) -> str:
        if min(self.params) < 1:
            return "has a zero in it"
        if self.kind == "block":
            return ""
        n, m = self.params[-2:]
        if n >= m:
            return f"keeps {n} of {m}, which prunes nothing"
        if self.kind == "vnm" and (m < VNM_COLUMNS or n > VNM_COLUMNS):
            return f"must have M >= {VNM_COLUMNS} and N <= {VNM_COLUMNS}, since four columns of each block are kept"
        return ""


def _not_text(value: object) -> str:
    if not isinstance(value, int) or isinstance(value, bool) or value < 60:
        return "is not a text"
    parts: list[int] = []
    rest = value
    while rest:
        rest, digit = divmod(rest, 60) if rest >= 60 and len(parts) < 2 else (0, rest)
        parts.insert(0, digit)
    meant = ":".join(map(str, parts))
    return f"is a number: YAML 1.1 reads {meant} as {value}, so put the pattern in quotes"
