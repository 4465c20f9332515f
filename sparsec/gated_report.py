"""What a gate step did: a record for each gate, measured on calibration data that it was not calibrated on.

In: a model with its gates and held-out samples. Out: the share of zeros that each gate gives, ``GatedLayer`` rows, and
the lines of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from sparsec.collecting import marked
from sparsec.passes.gates.forms import Gate
from sparsec.passes.gates.layers import gates_of
from sparsec.passes.masks.evaluating import evaluating
from sparsec.report_fold import merge_names, template

_CLOSE = 0.02  # gates whose share of zeros differs by more than this are not one row


@dataclass(frozen=True)
class GatedLayer:
    """One gate, or a module that was left without one: then ``form`` is "" and ``notes`` say why.

    ``place``: ``input`` or ``output`` of the layer, or ``activation``. ``asked``: share of the activations that were to
    become zero, None where the method decides it. ``achieved``: the share that is, of ``tokens`` held-out tokens; None
    where it was not measured. ``gate``: how it is made again, but for its buffers (``passes.gates.layers.restored``).
    """

    name: str
    place: str
    method: str
    form: str
    asked: float | None = None
    achieved: float | None = None
    tokens: int = 0
    step: int = 1
    gate: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types; ``from_dict`` gives the same row back."""
        return asdict(self) | {"gate": dict(self.gate) if self.gate else None, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> GatedLayer:
        return cls(**{**said, "notes": tuple(said["notes"])})


@dataclass
class _Count:
    zeros: int = 0
    values: int = 0
    tokens: int = 0


def measured(model: nn.Module, rows: Sequence[GatedLayer], samples: Sequence[Mapping[str, Any]]) -> list[GatedLayer]:
    """The rows with ``achieved`` as ``samples`` show it, everything gated at once.

    Gates of one phase act on all calls meanwhile; sets of neurons are chosen from the first half of each sequence and
    counted over the other, as a request would use them.
    """
    wanted: set[tuple[str, str]] = {(row.name, row.place) for row in rows if row.form}
    found: dict[tuple[str, str], Gate] = {
        (name, place): gate for name, place, gate in gates_of(model) if (name, place) in wanted and gate.zeroes
    }
    counts = {key: _Count() for key in found}
    mask: torch.Tensor | None = None
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for key, gate in found.items():
            stack.callback(_as_it_was(gate))
            gate.phase, gate.tokens = "all", "last-half" if gate.request else "all"
            stack.callback(gate.register_forward_hook(_counter(counts[key], lambda: mask)).remove)
        for sample in samples:
            mask = marked(sample)
            model(**sample)
    return [_with(row, counts.get((row.name, row.place))) for row in rows]


def _as_it_was(gate: Gate) -> Callable[[], None]:
    phase, tokens = gate.phase, gate.tokens
    buffers = {name: value.clone() for name, value in gate.named_buffers(recurse=False)} if gate.request else {}

    def back() -> None:
        gate.phase, gate.tokens = phase, tokens
        for name, value in buffers.items():
            getattr(gate, name).copy_(value)

    return back


def _counter(count: _Count, mask: Callable[[], torch.Tensor | None]) -> Callable[..., None]:
    def see(gate: Gate, args: Any, y: torch.Tensor) -> None:
        there = mask()
        if gate.tokens == "last-half":
            y = y[..., y.shape[-2] // 2 :, :]
        elif there is not None and y.shape[:-1] == there.shape:
            y = y[there.to(y.device)]
        count.zeros += y.numel() - int(y.count_nonzero())
        count.values += y.numel()
        count.tokens += y.numel() // max(y.shape[-1], 1)

    return see


def _with(row: GatedLayer, count: _Count | None) -> GatedLayer:
    if count is None or not count.values:
        return row
    return replace(row, achieved=count.zeros / count.values, tokens=count.tokens)


def gate_lines(rows: Sequence[GatedLayer]) -> list[str]:
    """The table of gates; rows whose names differ in numbers only and that came out alike are one."""
    from sparsec.sparsify_report import table

    groups: list[list[GatedLayer]] = []
    for row in rows:
        home = next((group for group in groups if _alike(group[0], row)), None)
        if home is None:
            groups.append([row])
        else:
            home.append(row)
    return table(("gate", "place", "form", "asked", "zero"), [_cells(group) for group in groups])


def _alike(a: GatedLayer, b: GatedLayer) -> bool:
    same = (template(a.name), a.place, a.method, a.asked, bool(a.form), a.step)
    if same != (template(b.name), b.place, b.method, b.asked, bool(b.form), b.step):
        return False
    return (a.achieved is None) == (b.achieved is None) and abs((a.achieved or 0.0) - (b.achieved or 0.0)) <= _CLOSE


def _cells(group: Sequence[GatedLayer]) -> tuple[str, ...]:
    first = group[0]
    shares = [row.achieved for row in group if row.achieved is not None]
    forms = {row.form for row in group}
    form = first.form if len(forms) == 1 or not first.gate else str(first.gate["kind"])
    low, high = (f"{pick(shares):.1%}" for pick in (min, max)) if shares else ("-", "-")
    return (
        merge_names([row.name for row in group]) or "(the model)",
        first.place,
        form or "left as it is",
        "-" if first.asked is None else f"{first.asked:.1%}",
        low if low == high else f"{low.removesuffix('%')}-{high}",
    )
