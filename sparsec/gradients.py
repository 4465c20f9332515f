"""Gradients of a dense model's loss with respect to some weights, for the methods that score with them.

In: a model, calibration samples, the modules whose weights are meant. Out: statistics [N, K] of each. The model is
afterwards as before to the bit: weights, ``.grad``, ``requires_grad``, training mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsec.errors import NoLoss, NonFinite, listed
from sparsec.passes.masks import METHODS, method_class
from sparsec.passes.masks.contract import GRADIENTS
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.scaled import loss_scale, scaled_gradients

_IGNORED = -100  # the label that cross_entropy leaves out


def gradients(
    model: nn.Module,
    data: Sequence[Mapping[str, Any]],
    modules: Mapping[str, nn.Module],
    kinds: Sequence[str],
    *,
    probes: int = 8,
    epsilon: float = 1e-2,
    seed: int = 0,
    tick: Callable[[int, int, str], None] | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """{name: {kind: [N, K] fp32}} summed over samples: the rows of each batch of keyword dicts, one at a time.

    The loss is the mean next-token cross entropy of ``logits`` (labels: ``input_ids`` where ``attention_mask`` is not
    0), or the model's own ``loss`` where the data has ``labels``. ``kinds``: ``grad2`` and ``grad_abs`` run backward
    through the dense model, for these weights only; ``spsa`` runs ``2 * probes`` forwards a sample (Spall, 1992), each
    with every weight moved by plus or minus ``epsilon`` times its matrix's root mean square, and needs a copy of
    these weights. In 16 bits a step below half an ulp of a weight is lost. Accumulators are on the weights' devices.

    Raises NoLoss, and NonFinite where the loss or a gradient is.
    """
    if unknown := sorted(set(kinds) - set(GRADIENTS)):
        raise ValueError(f"no such statistics of gradients: {', '.join(unknown)}")
    names = {module.get_parameter("weight"): name for name, module in reversed(list(modules.items()))}
    samples = list(rows_of(data))
    with torch.inference_mode(False), evaluating(model), _only(model, names), _restored(names) as dense:
        totals = {kind: {w: torch.zeros_like(w, dtype=torch.float32) for w in names} for kind in dict.fromkeys(kinds)}
        estimate = _Spsa(model, dense, probes, epsilon, seed) if "spsa" in totals else None
        for i, sample in enumerate(samples, 1):
            where = f" in sample {i} of {len(samples)}"
            if "grad2" in totals or "grad_abs" in totals:
                _add_gradients(model, sample, names, totals, where)
            if estimate is not None:
                estimate.add(sample, totals["spsa"], where)
            if tick is not None:
                tick(i, len(samples), "gradients")
        return {
            name: {kind: _matrix(module, found[module.get_parameter("weight")]) for kind, found in totals.items()}
            for name, module in modules.items()
        }


def rows_of(data: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches cut into rows. What is no tensor, or not one entry per row, goes to every row as it is."""
    for batch in data:
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()]
        rows = len(batch.get("input_ids", tensors[0])) if tensors else 1
        for i in range(rows):
            yield {
                key: value[i : i + 1]
                if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows
                else value
                for key, value in batch.items()
            }


@contextmanager
def _only(model: nn.Module, weights: Mapping[nn.Parameter, str]) -> Iterator[None]:
    """No other parameter requires a gradient: the backward pass then computes nothing else."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter in weights)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _restored(weights: Mapping[nn.Parameter, str]) -> Iterator[Callable[[], dict[nn.Parameter, torch.Tensor]]]:
    """Gives a function that copies the weights; what was copied is written back at the end, whatever happens."""
    saved: dict[nn.Parameter, torch.Tensor] = {}

    def save() -> dict[nn.Parameter, torch.Tensor]:
        saved.update({weight: weight.detach().clone() for weight in weights})
        return saved

    try:
        yield save
    finally:
        with torch.no_grad():
            for weight, copy in saved.items():
                weight.copy_(copy)


def _add_gradients(
    model: nn.Module,
    sample: Mapping[str, Any],
    names: Mapping[nn.Parameter, str],
    totals: Mapping[str, Mapping[nn.Parameter, torch.Tensor]],
    where: str,
) -> None:
    with torch.enable_grad():
        found, scale = scaled_gradients(lambda: loss_of(model, sample, where), list(names), loss_scale(names))
    for (weight, name), gradient in zip(names.items(), found, strict=True):
        if gradient is None:
            continue
        gradient = gradient.float() / scale
        if not bool(gradient.isfinite().all()):
            raise NonFinite(what="the gradient", name=repr(name), where=where)
        if "grad2" in totals:
            totals["grad2"][weight] += gradient.square()
        if "grad_abs" in totals:
            totals["grad_abs"][weight] += gradient.abs()


class _Spsa:
    """Two-sided simultaneous perturbation: g ~ (L(w + h s) - L(w - h s)) / 2h * s with random signs s."""

    def __init__(
        self,
        model: nn.Module,
        save: Callable[[], dict[nn.Parameter, torch.Tensor]],
        probes: int,
        epsilon: float,
        seed: int,
    ) -> None:
        self.model, self.probes, self.dense = model, probes, save()
        self.steps = {w: epsilon * float(dense.float().square().mean().sqrt()) for w, dense in self.dense.items()}
        devices = {w.device for w in self.dense}
        self.generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}

    def add(self, sample: Mapping[str, Any], totals: Mapping[nn.Parameter, torch.Tensor], where: str) -> None:
        with torch.no_grad():
            for _ in range(self.probes):
                signs = {w: self._signs(w) for w in self.dense}
                rise = self._loss(sample, signs, 1, where) - self._loss(sample, signs, -1, where)
                for weight, sign in signs.items():
                    step = self.steps[weight]
                    if step:  # a matrix of zeros was not moved
                        totals[weight].add_(sign, alpha=rise / (2 * step * self.probes))

    def _signs(self, weight: nn.Parameter) -> torch.Tensor:
        """int8, +1 or -1 at random."""
        generator, shape = self.generators[weight.device], weight.shape
        return torch.randint(0, 2, shape, generator=generator, device=weight.device, dtype=torch.int8) * 2 - 1

    def _loss(
        self, sample: Mapping[str, Any], signs: Mapping[nn.Parameter, torch.Tensor], way: int, where: str
    ) -> float:
        for weight, sign in signs.items():
            weight.copy_(self.dense[weight] + sign * (way * self.steps[weight]))
        return float(loss_of(self.model, sample, where))


def loss_of(model: nn.Module, sample: Mapping[str, Any], where: str) -> torch.Tensor:
    """The loss of one sample; fp32 unless it is the model's own. Raises NoLoss, NonFinite."""
    if sample.get("labels") is None and (why := _no_language_model(model, sample)):
        raise _no_loss(why)
    output = model(**sample)
    if sample.get("labels") is not None:
        loss: torch.Tensor | None = _field(output, "loss")
        if loss is None:
            raise _no_loss("the model gives no loss for its labels")
    else:
        loss = _next_token_loss(_field(output, "logits"), sample)
    if not math.isfinite(float(loss.detach())):
        raise NonFinite(what="the loss", name="the model", where=where)
    return loss


def _no_language_model(model: nn.Module, sample: Mapping[str, Any]) -> str:
    """Why the next token is not what this model predicts; empty where it may be."""
    if not isinstance(sample.get("input_ids"), torch.Tensor):
        return "the data has no input_ids whose next token could be predicted"
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    if (callable(can_generate) and not can_generate()) or getattr(config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is no causal language model"
    return ""


def _next_token_loss(logits: object, sample: Mapping[str, Any]) -> torch.Tensor:
    ids: torch.Tensor = sample["input_ids"]
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise _no_loss("the model's output has no logits for each token")
    if ids.shape[1] < 2:
        raise _no_loss("a sample of one token has no next one")
    mask = sample.get("attention_mask")
    labels = ids if mask is None or mask.shape != ids.shape else ids.masked_fill(mask == 0, _IGNORED)
    targets = labels[:, 1:].flatten().to(logits.device)
    summed: torch.Tensor = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets, ignore_index=_IGNORED, reduction="sum"
    )
    return summed / (targets != _IGNORED).sum().clamp(min=1)  # a sample of padding has loss 0, not NaN


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _no_loss(why: str) -> NoLoss:
    free = [
        name
        for name, cls in ((name, method_class(name)) for name in METHODS)
        if cls.role == "mask" and not set(cls.needs) & set(GRADIENTS)
    ]
    return NoLoss(why=why, methods=listed(free))


def _matrix(module: nn.Module, statistic: torch.Tensor) -> torch.Tensor:
    """As [N, K]: HF's Conv1D holds [K, N], a convolution [N, C, high, wide], which is [N, high * wide * C] here."""
    if statistic.dim() == 4:
        return statistic.permute(0, 2, 3, 1).flatten(1)
    return statistic.t().contiguous() if hasattr(module, "nf") else statistic
