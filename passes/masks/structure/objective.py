"""How good a model is on calibration data: its loss, or how far its outputs are from those it had.

In: a model and batches. Out: one number for each batch, lower is better, differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sparsec.errors import UnfitCalibration
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.structure.contract import Data


def has_loss(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the batch brings labels, or the model predicts the tokens of the batch."""
    generates = getattr(model, "can_generate", lambda: False)()
    return "labels" in batch or (bool(generates) and "input_ids" in batch)


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The model's own loss for ``labels``, or the mean cross entropy of each next token, padding left out; nats."""
    output = model(**batch)
    if "labels" in batch:
        loss: torch.Tensor = output.loss
        return loss
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return cross_entropy(output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class Objective:
    """One number for a model on batch i: ``loss``, or ``match``, the share of the dense output's energy that is lost.

    ``match`` remembers the outputs of the model as it is now; ``loss`` becomes ``match`` where there is no loss, and
    ``kind`` says so. Raises UnfitCalibration where there is no data or the numbers are not finite.
    """

    def __init__(self, model: nn.Module, data: Data, kind: str = "loss") -> None:
        if not data:
            raise UnfitCalibration(detail="there is none")
        self.data = data
        self.kind = kind if kind == "match" or has_loss(model, data[0]) else "match"
        self._dense: list[torch.Tensor] = []
        with evaluating(model), torch.no_grad():
            if self.kind == "match":
                self._dense = [_shown(model, batch) for batch in data]
                values = [float(dense.abs().sum()) for dense in self._dense]
            else:
                values = [float(loss_of(model, batch)) for batch in data]
        bad = [i for i, value in enumerate(values) if not torch.tensor(value).isfinite()]
        if bad:
            raise UnfitCalibration(detail=f"the model's {self.kind} on batch {bad[0]} is not a number")
        self.dense_value = sum(values) / len(values) if self.kind == "loss" else 0.0

    def __call__(self, model: nn.Module, i: int) -> torch.Tensor:
        batch = self.data[i]
        if self.kind == "loss":
            return loss_of(model, batch)
        dense = self._dense[i]
        return (_shown(model, batch) - dense).square().sum() / dense.square().sum().clamp_min(1e-30)

    def mean(self, model: nn.Module) -> float:
        """The mean over all batches, without gradients."""
        with torch.no_grad():
            return sum(float(self(model, i)) for i in range(len(self.data))) / len(self.data)


def _shown(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The model's first output [batch, tokens, width] as fp32, zero where the batch is padding."""
    output = model(**batch)
    while not isinstance(output, torch.Tensor):
        output = output[0] if not isinstance(output, Mapping) else next(iter(output.values()))
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == output.shape[:2]:
        output = output.masked_fill((mask == 0).reshape(*mask.shape, *[1] * (output.ndim - 2)), 0.0)
    return output.float()
