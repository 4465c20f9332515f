"""Bonsai: which heads and neurons matter, by running random sub-models and fitting their utility."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.structure.choose import choose
from sparsec.passes.masks.structure.contract import Data, Structured, Tick, parameters, silent
from sparsec.passes.masks.structure.objective import Objective
from sparsec.passes.masks.structure.units import Family, Keep, Units, feature_sums, masked, matrix, remove

_FOLDS = 5
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Bonsai:
    """Heads and neurons by a regression over random sub-models; no gradients.

    Each round takes the least active units as candidates (twice as many as shall go), drops random halves of them,
    evaluates each such sub-model and its complement on calibration data, fits utility = c + sum_i b_i kept_i by ridge
    regression, and drops the units with the lowest b; utility is minus the loss. The prior that chooses the
    candidates, and weighs them in the draw, is Wanda's: sum of |W_ij| ||X_j|| over the columns that read a unit.

    Source: Dery et al., "Everybody Prune Now", 2024, algorithm 1; 5 % a round, 200 sub-models, 32 samples. The penalty
    comes from 5-fold cross-validation by Kendall's tau, as in the reference code; that also tries l1, this does not.
    The reference stops within 2 % of the target; here the last round ends on it, to half a unit before rounding to
    ``multiple``. Sparsity is the share of the parameters of heads and neurons.
    """

    role: ClassVar[str] = "structure"
    needs: ClassVar[tuple[str, ...]] = ("units", "data")
    source: ClassVar[str] = "Dery et al., 2024, algorithm 1"
    cost: ClassVar[str] = "rounds x samples x batches forwards"

    fraction: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.05, metadata={"doc": "share of the parameters that goes in a round"}
    )
    rounds: Annotated[int, Field(ge=0)] = field(
        default=0, metadata={"doc": "number of rounds; 0: as many as fraction makes"}
    )
    samples: Annotated[int, Field(ge=2)] = field(
        default=200, metadata={"doc": "sub-models a round, half of them complements"}
    )
    batches: Annotated[int, Field(ge=1)] = field(
        default=32, metadata={"doc": "calibration batches that a sub-model is evaluated on"}
    )
    utility: Literal["loss", "match"] = field(
        default="loss", metadata={"doc": "loss, or match: stay near the dense model's outputs"}
    )
    uniform: bool = field(default=False, metadata={"doc": "take the same share from every layer, so layers stay alike"})
    multiple: Annotated[int, Field(ge=1)] = field(
        default=8, metadata={"doc": "neurons left in a layer are rounded up to a multiple of this"}
    )
    as_zeros: bool = field(default=False, metadata={"doc": "write zeros and keep the shapes"})

    def apply(
        self, model: nn.Module, units: Units, forward_data: Data, sparsity: float, seed: int, *, tick: Tick = silent
    ) -> Structured:
        """Search and remove, in place."""
        objective = Objective(model, forward_data[: self.batches], self.utility)
        before = parameters(model)
        with evaluating(model), torch.no_grad():
            keep = self._search(model, units, objective, sparsity, seed, tick)
            with masked(model, units, keep):
                after = objective.mean(model)
        share = units.removed(keep) / max(1, units.parameters)
        unsaved = remove(model, units, keep, as_zeros=self.as_zeros)
        notes = [f"{objective.kind} on the calibration data: {objective.dense_value:.4g} before, {after:.4g} after"]
        notes += units.missed(keep, sparsity)
        if objective.kind != self.utility:
            notes.append("the data has no labels and the model predicts no tokens: utility is match")
        return Structured(units.rows(keep), before, parameters(model), share, self.as_zeros, unsaved, tuple(notes))

    def _search(
        self, model: nn.Module, units: Units, objective: Objective, sparsity: float, seed: int, tick: Tick
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        keep, rounds = units.all(), self.rounds or math.ceil(sparsity / self.fraction - 1e-9)
        worth = {family.key: torch.zeros(family.count, dtype=torch.float64) for family in units.families}
        pairs, done = max(1, self.samples // 2), 0.0
        for number in range(1, rounds + 1):
            goal = sparsity * number / rounds
            prior = activity(model, units, keep, objective.data)
            pools = [Pool.of(f, keep[f.key], prior[f.key], (goal - done) / (1.0 - done)) for f in units.families]
            kept = _draw(pools, pairs, generator)
            utility = torch.empty(2 * pairs, dtype=torch.float64)
            for i, row in enumerate(kept):
                tick((number - 1) * 2 * pairs + i, rounds * 2 * pairs, f"round {number}")
                with masked(model, units, _without(keep, pools, row)):
                    utility[i] = -objective.mean(model)
            _rank(worth, keep, pools, prior, fit(kept.double() * 2 - 1, utility), float(number - rounds))
            last = number == rounds
            keep = choose(units, worth, goal, uniform=self.uniform, multiple=self.multiple if last else 1)
            below = number - rounds + 1 - 1e-9  # of everything that the next rounds rank
            worth = {key: value.where(keep[key], value.clamp(max=below)) for key, value in worth.items()}
            done = goal
        return keep


@dataclass(frozen=True)
class Pool:
    """The candidates of one family in one round: ``index`` (int64) and how likely each is kept, ``weight``."""

    family: Family
    index: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, family: Family, keep: torch.Tensor, prior: torch.Tensor, share: float) -> Pool:
        """The 2 * ``share`` of the remaining units with the lowest prior, rounded up; none where one is left."""
        left = keep.nonzero().flatten()
        size = 0 if len(left) < 2 else min(len(left), math.ceil(2 * share * len(left)))
        index = left[prior[left].argsort(stable=True)[:size]].sort().values
        # tempered: units that always fall on the same side of the draw could not be told apart by the fit
        weight = (prior[index] / prior[index].mean().clamp_min(1e-30)).clamp(0.5, 2.0)
        return cls(family, index, weight)


def _draw(pools: list[Pool], pairs: int, generator: torch.Generator) -> torch.Tensor:
    """Masks, bool [2 * pairs, all candidates]: each keeps a weighted half, and the next one the other half.

    Halves of all candidates together: of a family with two, a half each time would make one the other's mirror.
    """
    weight = torch.cat([pool.weight for pool in pools])
    rows = torch.zeros(2 * pairs, len(weight), dtype=torch.bool)
    keys = torch.rand(pairs, len(weight), generator=generator, dtype=torch.float64).log() / weight  # Efraimidis
    order = keys.argsort(1, descending=True)
    for i in range(pairs):
        rows[2 * i, order[i, : (len(weight) + i % 2) // 2]] = True
    rows[1::2] = ~rows[::2]
    return rows


def _without(keep: Keep, pools: list[Pool], row: torch.Tensor) -> dict[str, torch.Tensor]:
    """``keep`` without the candidates that ``row`` drops."""
    now, start = {key: value.clone() for key, value in keep.items()}, 0
    for pool in pools:
        size = len(pool.index)
        now[pool.family.key][pool.index] = row[start : start + size]
        start += size
    return now


def _rank(
    worth: dict[str, torch.Tensor],
    keep: Keep,
    pools: list[Pool],
    prior: Mapping[str, torch.Tensor],
    fitted: torch.Tensor,
    level: float,
) -> None:
    """Write worths that order all units: gone ones below ``level``, then candidates as fitted, then the rest.

    What went in an earlier round keeps its lower level, so that a revival takes the latest gone first.
    """
    ties = torch.cat([prior[pool.family.key][pool.index] for pool in pools]).argsort(stable=True)
    order = ties[fitted[ties].argsort(stable=True)]
    rank = torch.empty(len(order), dtype=torch.float64)
    rank[order] = torch.arange(len(order), dtype=torch.float64) / max(1, len(order))
    start = 0
    for pool in pools:
        key, size = pool.family.key, len(pool.index)
        rest = keep[key].clone()
        rest[pool.index] = False
        worth[key][rest] = level + 1.0 + (prior[key] / (1.0 + prior[key]))[rest]
        worth[key][pool.index] = level + rank[start : start + size]
        start += size


def activity(model: nn.Module, units: Units, keep: Keep, data: Data) -> dict[str, torch.Tensor]:
    """Wanda's score of every unit, fp64 [count]: sum of |W_ij| ||X_j|| over the columns j that read it."""
    sums: dict[str, torch.Tensor] = {}
    with ExitStack() as stack, masked(model, units, keep):
        for family in units.families:

            def see(_: nn.Module, args: tuple[Any, ...], key: str = family.key) -> None:
                x = args[0].detach().float().reshape(-1, args[0].shape[-1])
                sums[key] = sums.get(key, 0.0) + x.square().sum(0)

            stack.callback(model.get_submodule(family.reader.module).register_forward_pre_hook(see).remove)
        for batch in data:
            model(**batch)
    scores = {}
    for family in units.families:
        columns = matrix(model.get_submodule(family.reader.module)).float().abs().sum(0) * sums[family.key].sqrt()
        scores[family.key] = feature_sums(family.reader, family.count, columns).double().cpu()
    return scores


def fit(kept: torch.Tensor, utility: torch.Tensor) -> torch.Tensor:
    """The b of utility = c + kept b, fp64 [units], by ridge regression. ``kept``: +-1 [sub-models, units].

    Sub-models 2i and 2i + 1 are complements and stay in one fold.
    """
    fold = torch.arange(len(kept)) // 2 % _FOLDS
    best, penalty = -2.0, 1.0
    for candidate in _PENALTIES if len(kept) >= 4 * _FOLDS else ():
        taus = []
        for i in range(_FOLDS):
            train, test = fold != i, fold == i
            taus.append(_kendall(kept[test] @ _ridge(kept[train], utility[train], candidate), utility[test]))
        if sum(taus) / _FOLDS > best:
            best, penalty = sum(taus) / _FOLDS, candidate
    return _ridge(kept, utility, penalty)


def _ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Solved in the smaller of its two forms; the penalty is relative to the mean diagonal of x x^T."""
    x, y = x - x.mean(0), y - y.mean()
    gram = x @ x.t()
    strength = penalty * float(gram.diagonal().mean()) or 1.0
    if len(x) <= x.shape[1]:
        dual: torch.Tensor = torch.linalg.solve(gram + strength * torch.eye(len(x), dtype=x.dtype), y)
        return x.t() @ dual
    primal: torch.Tensor = torch.linalg.solve(x.t() @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.t() @ y)
    return primal


def _kendall(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kendall's tau-a of two vectors."""
    n = len(a)
    agree = (torch.sign(a[:, None] - a) * torch.sign(b[:, None] - b)).sum()
    return float(agree) / max(1, n * (n - 1))
