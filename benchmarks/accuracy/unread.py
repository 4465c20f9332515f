"""What gates spare on a text. In: a gated model, windows of tokens. Out: shares of zeros and of weights not needed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sparsec.gated_report import GatedLayer, measured

_OF_A_NEURON = ("signs", "low rank", "core neurons", "first neurons", "told neurons")  # known before gate and up run


def gate_facts(model: nn.Module, rows: Sequence[GatedLayer], windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """``zeros``: mean share of zeros over the gates, on these windows; ``unread``: share of the weights of all linear
    layers but the head that multiply nothing but zeros, for a token that is gated."""
    found = measured(model, rows, [{"input_ids": torch.tensor([ids])} for ids in windows])
    shares = [row.achieved for row in found if row.achieved is not None]
    total = sum(weight for _, weight in _linears(model))
    spared = sum(row.achieved * _reach(model, row) for row in found if row.achieved is not None)
    return {"zeros": round(statistics.fmean(shares), 5) if shares else 0.0, "unread": round(spared / total, 5)}


def _linears(model: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module.weight.numel()


def _reach(model: nn.Module, row: GatedLayer) -> int:
    """Weights that a zero in every place would spare. A neuron of a gated MLP is a row of gate and up, a column of
    down; what its activation zeroes still needed its row of gate."""
    mlp = row.name.rpartition(".")[0]
    weights = {name: size for name, size in _linears(model) if name.rpartition(".")[0] == mlp}
    if row.place == "activation":
        return sum(size for name, size in weights.items() if not name.endswith("gate_proj"))
    if row.gate and row.gate["kind"] in _OF_A_NEURON:
        return sum(weights.values())
    return dict(_linears(model))[row.name]
