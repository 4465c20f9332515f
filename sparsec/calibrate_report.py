"""What ``sparsec.calibrate`` found, as a table and as JSON-able values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sparsec.report_data import percent


@dataclass(frozen=True)
class CalibratedLayer:
    """Zeros in what one layer [N, K] reads. Shares are 0 to 1.

    ``zeros``: of all values; ``low``, ``high``: of the channel with the fewest, the most; ``dead``: channels that were
    always zero; ``rows``: (M, share of channels that are zero in all of M tokens in a row). ``origin``: what makes the
    zeros, "" where the graph does not say. ``key``: the weight's, under which the rates are kept; "" where they are
    not.
    """

    name: str
    shape: tuple[int, int]
    origin: str
    tokens: int
    zeros: float
    low: float
    high: float
    dead: int
    rows: tuple[tuple[int, float], ...]
    nonfinite: int = 0
    key: str = ""

    @property
    def never_activated(self) -> bool:
        return self.tokens > 0 and self.zeros == 1.0

    @property
    def worth_keeping(self) -> bool:
        """Whether a compiler that finds zeros in the graph should know of it."""
        sound = self.tokens > 0 and not self.nonfinite and not self.never_activated
        return sound and (self.zeros > 0 or self.origin != "")


@dataclass(frozen=True)
class ActivationReport:
    """Every linear-type layer of a model. ``folder``: where the rates are kept. ``seconds``: of everything."""

    layers: tuple[CalibratedLayer, ...]
    notes: tuple[str, ...]
    tokens: int
    folder: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        shown = [layer for layer in self.layers if layer.zeros or layer.origin]
        rows = [_HEAD, *map(_row, shown)] if shown else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        left = len(self.layers) - len(shown)
        if left:
            lines.append(f"{left} {'more ' if shown else ''}layer{'s read' if left > 1 else ' reads'} no zeros")
        lines += [f"! {note}" for note in self.notes]
        lines.append(f"{self.tokens} tokens, {self.seconds:.1f} s; kept in {self.folder}")
        return "\n".join(lines)


_HEAD = ("layer", "shape", "zeros from", "zero", "least", "most", "dead", "2 tokens", "8 tokens", "tokens")


def _row(layer: CalibratedLayer) -> tuple[str, ...]:
    together = dict(layer.rows)
    shares = [percent(together[m]) if m in together else "-" for m in (2, 8)]
    return (
        layer.name,
        f"{layer.shape[0]}x{layer.shape[1]}",
        layer.origin or "?",
        percent(layer.zeros),
        percent(layer.low),
        percent(layer.high),
        str(layer.dead),
        *shares,
        str(layer.tokens),
    )


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
