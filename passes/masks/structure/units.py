"""Heads and neurons of a model: which rows and columns belong to each, and three ways to take them away.

In: a model and its ``Units`` (``find.py`` finds them). ``masked`` hides units while it is entered, ``zero`` writes
exact zeros, ``remove`` cuts them out. All three give the same outputs, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from sparsec.passes.masks.structure.config import fit_config
from sparsec.passes.masks.structure.contract import Row

Keep: TypeAlias = Mapping[str, torch.Tensor]  # Family.key -> bool [count], True where a unit stays

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_WIDTHS = ("all_head_size", "split_size")
_FFN_WIDTHS = ("intermediate_size", "ffn_dim", "inner_dim")


@dataclass(frozen=True)
class Part:
    """The features of one linear that belong to units: unit i has ``size`` of them from ``start + i * size`` on.

    ``side``: ``out`` for rows of the weight [N, K] (and the bias), ``in`` for columns.
    """

    module: str
    side: str
    size: int
    start: int = 0

    def features(self, units: torch.Tensor) -> torch.Tensor:
        """Positions [len(units) * size] of the given units (int64)."""
        return (self.start + units[:, None] * self.size + torch.arange(self.size)).flatten()


@dataclass(frozen=True)
class Family:
    """The units of one attention (``head``: a head, or the query heads that share a key-value head) or FFN.

    ``name``: the smallest module that holds all parts. The last part is the ``reader``, the linear that reads what
    the units compute. ``cost``: parameters of one unit. ``heads``: query heads of one unit.
    """

    name: str
    kind: str  # "head" or "neuron"
    count: int
    parts: tuple[Part, ...]
    cost: int
    heads: int = 1

    @property
    def key(self) -> str:
        return f"{self.name}:{self.kind}"

    @property
    def reader(self) -> Part:
        return self.parts[-1]


@dataclass(frozen=True)
class Units:
    """All families in module order. ``declined``: module name -> why its units are left alone."""

    families: tuple[Family, ...]
    declined: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """Parameters of all units: what a sparsity is a share of."""
        return sum(family.count * family.cost for family in self.families)

    def all(self) -> dict[str, torch.Tensor]:
        """The ``Keep`` that keeps everything."""
        return {family.key: torch.ones(family.count, dtype=torch.bool) for family in self.families}

    def removed(self, keep: Keep) -> int:
        """Parameters that ``keep`` takes away."""
        return sum(int((~keep[family.key]).sum()) * family.cost for family in self.families)

    def missed(self, keep: Keep, sparsity: float) -> list[str]:
        """A note where ``keep`` is more than 2 % of the parameters off the target: units are whole."""
        share = self.removed(keep) / max(1, self.parameters)
        if abs(share - sparsity) <= 0.02:
            return []
        return [f"{share:.1%} went, {sparsity:.1%} was asked: heads go whole, neurons are rounded to multiple"]

    def rows(self, keep: Keep) -> tuple[Row, ...]:
        """The report: a row for each family."""
        rows = []
        for family in self.families:
            kept = int(keep[family.key].sum())
            cost = family.cost
            rows.append(Row(family.name, family.kind, family.count, kept, family.count * cost, kept * cost))
        return tuple(rows)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear that holds its weight as [K, N]."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).__mro__)


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight as [N, K], a detached view: writing to it writes the weight."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_conv1d(module) else weight


def feature_sums(part: Part, count: int, values: torch.Tensor) -> torch.Tensor:
    """Sums [count] over the features of each unit, of ``values`` given for every feature of the part's linear."""
    return values[part.start : part.start + count * part.size].reshape(count, part.size).sum(1)


@contextmanager
def masked(model: nn.Module, units: Units, keep: Keep) -> Iterator[None]:
    """While entered, what the other units compute is replaced by zeros where it is read. No weight changes."""
    with ExitStack() as stack:
        for family in units.families:
            if bool(keep[family.key].all()):
                continue
            module = model.get_submodule(family.reader.module)
            weight = matrix(module)
            gone = torch.zeros(weight.shape[1], dtype=torch.bool)
            gone[family.reader.features((~keep[family.key]).nonzero().flatten())] = True
            stack.callback(module.register_forward_pre_hook(_hider(gone.to(weight.device))).remove)
        yield


def _hider(gone: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hide(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].masked_fill(gone, 0.0), *args[1:])

    return hide


@torch.no_grad()
def zero(model: nn.Module, units: Units, keep: Keep) -> None:
    """Write zeros into every row, bias entry and column of the units that go."""
    for family in units.families:
        gone = (~keep[family.key]).nonzero().flatten()
        for part in family.parts:
            module = model.get_submodule(part.module)
            weight = matrix(module)
            features = part.features(gone).to(weight.device)
            weight.index_fill_(0 if part.side == "out" else 1, features, 0.0)
            if part.side == "out" and module.bias is not None:
                module.get_parameter("bias").detach().index_fill_(0, features, 0.0)


def remove(model: nn.Module, units: Units, keep: Keep, *, as_zeros: bool = False) -> str:
    """Take the units that ``keep`` does not keep out of the model, in place; afterwards ``units`` is out of date.

    Weights and biases become smaller parameters, and the numbers that modules keep about themselves (heads, widths)
    follow. The config follows where it can say the result. Gives "" where it can, otherwise the sentence of
    ``Structured.unsaved``: such a model works in memory, but ``from_pretrained`` would build one of other shapes. With
    ``as_zeros`` nothing changes shape and zeros are written instead, which every checkpoint can hold.
    """
    empty = [family.name for family in units.families if not bool(keep[family.key].any())]
    if empty:
        raise ValueError(f"no unit of {empty[0]} would be left, and modules of width 0 do not run")
    if as_zeros:
        zero(model, units, keep)
        return ""
    for family in units.families:
        cut(model, family, keep[family.key])
    left = {family.key: int(keep[family.key].sum()) for family in units.families}
    return fit_config(
        model,
        heads=[(left[f.key], f.heads, f.reader.size // f.heads) for f in units.families if f.kind == "head"],
        neurons=[left[f.key] for f in units.families if f.kind == "neuron"],
    )


def cut(model: nn.Module, family: Family, keep: torch.Tensor) -> None:
    """Cut the units of one family out of the weights of ``model``; the config is not touched."""
    gone = (~keep).nonzero().flatten()
    if not len(gone):
        return
    kept: dict[tuple[str, str], torch.Tensor] = {}
    for part in family.parts:  # a fused linear (q, k, v in one) has several parts
        shape = matrix(model.get_submodule(part.module)).shape
        stays = kept.setdefault((part.module, part.side), torch.ones(shape[part.side == "in"], dtype=torch.bool))
        stays[part.features(gone)] = False
    for (name, side), stays in kept.items():
        _cut_linear(model.get_submodule(name), side, stays.nonzero().flatten())
    _retell(model, family, int(keep.sum()))


def _cut_linear(module: nn.Module, side: str, kept: torch.Tensor) -> None:
    conv1d = is_conv1d(module)
    weight = module.get_parameter("weight")
    kept = kept.to(weight.device)
    dim = int((side == "in") != conv1d)
    module.weight = _parameter(weight, weight.detach().index_select(dim, kept))
    if side == "out" and module.bias is not None:
        bias = module.get_parameter("bias")
        module.bias = _parameter(bias, bias.detach().index_select(0, kept))
    if conv1d:
        setattr(module, "nf" if side == "out" else "nx", len(kept))
    else:
        setattr(module, f"{side}_features", len(kept))


def _parameter(old: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=old.requires_grad)


def _retell(model: nn.Module, family: Family, kept: int) -> None:
    """Modules that remember how many heads or neurons they have are told the new number."""
    if family.kind == "head":
        width = family.reader.size
        sizes = {_HEADS: family.heads, _KV_HEADS: 1, _HEAD_WIDTHS: width}
    else:
        sizes = {_FFN_WIDTHS: 1}
    homes = {family.name, *(part.module.rpartition(".")[0] for part in family.parts)}
    for home in homes:
        module = model.get_submodule(home)
        for names, size in sizes.items():
            for name in names:
                if getattr(module, name, None) == family.count * size:
                    setattr(module, name, kept * size)
