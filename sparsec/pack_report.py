"""What ``pack_`` did: per layer its format, bytes before and after, and what having no dense weight costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsec.passes.decide.whole import WholePlan


@dataclass(frozen=True)
class PackRow:
    """One weight. ``format`` is ``dense`` where it stayed so; ``reason`` says why, either way.

    ``shape`` is (out_features, in_features), of an embedding (rows, width); bytes are of the weight alone. ``tied``:
    other layers with this weight. ``plan``: None where nothing multiplies by it.
    """

    name: str
    shape: tuple[int, int]
    dense_bytes: int
    tied: tuple[str, ...] = ()
    reason: str = ""
    format: str = "dense"
    packed_bytes: int = 0
    plan: WholePlan | None = None
    density: float = 1.0
    negative_zeros: int = 0

    @property
    def packed(self) -> bool:
        return self.format != "dense"

    @property
    def dense_from(self) -> int | None:
        """The least number of rows of x at which the dense weight would have been faster; None: at none."""
        return self.plan.dense_from if self.plan else None

    @property
    def cost(self) -> str:
        """What packing costs at its worst, in words."""
        if self.plan is None or self.plan.dense_from is None:
            return ""
        return f"{self.plan.worst:.2f}x dense's time at {self.plan.worst_at} rows"


@dataclass(frozen=True)
class PackReport:
    """Every weight of linear layers, embeddings and convolutions of a model after ``pack_``.

    ``str()`` is a table, ``to_dict()`` is JSON-able.
    """

    model: str
    rows: tuple[PackRow, ...]

    @property
    def packed(self) -> tuple[PackRow, ...]:
        return tuple(row for row in self.rows if row.packed)

    @property
    def dense_bytes(self) -> int:
        """Of all of them, as they were."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of all of them, as they are now."""
        return sum(row.packed_bytes if row.packed else row.dense_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "dense_bytes": self.dense_bytes,
            "bytes": self.bytes,
            "layers": [asdict(row) | {"dense_from": row.dense_from} for row in self.rows],
        }

    def __str__(self) -> str:
        head = (
            "layer",
            "shape",
            "zeros",
            "format",
            "dense MB",
            "packed MB",
            "dense faster from",
            "at worst, or why dense",
        )
        rows = [_cells(row) for row in self.rows]
        return "\n".join([aligned(head, rows, "llrlrrrl"), "", self._total()])

    def _total(self) -> str:
        share = f" ({self.bytes / self.dense_bytes:.2f}x)" if self.dense_bytes else ""
        return (
            f"{len(self.packed)} of {len(self.rows)} weights packed: {_mb(self.dense_bytes)} MB dense, "
            f"{_mb(self.bytes)} MB now{share}."
        )


def _cells(row: PackRow) -> tuple[str, ...]:
    shape, zeros = f"{row.shape[0]} x {row.shape[1]}", f"{100 * (1 - row.density):.0f} %" if row.packed else ""
    name = row.name + (f" (+{len(row.tied)} tied)" if row.tied else "")
    if not row.packed:
        return name, shape, zeros, "dense", _mb(row.dense_bytes), "", "", row.reason
    if row.plan is None:
        return name, shape, zeros, row.format, _mb(row.dense_bytes), _mb(row.packed_bytes), "", row.reason
    since = "never" if row.dense_from is None else f"{row.dense_from} rows"
    packed = row.plan.pack if row.plan else row.format
    return name, shape, zeros, packed, _mb(row.dense_bytes), _mb(row.packed_bytes), since, row.cost


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """Plain columns; ``sides`` has one of l and r for each."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = []
    for line in (head, ["-" * w for w in widths], *rows):
        cells = [c.ljust(w) if s == "l" else c.rjust(w) for c, w, s in zip(line, widths, sides, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
