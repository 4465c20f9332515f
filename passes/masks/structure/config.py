"""Whether a transformers config can say a model's new shape: set what it can say, then build from it and compare.

In: a model whose weights were cut. Out: its config changed to match, or a sentence on why no config can.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_FFN = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")
_INSTEAD = "save it with torch.save, or sparsify with as_zeros: true, which keeps the shape and writes zeros"


def fit_config(model: nn.Module, heads: Sequence[tuple[int, int, int]], neurons: Sequence[int]) -> str:
    """Tell ``model.config`` the new shape; gives "" or the sentence why it cannot be told.

    ``heads``: (key-value heads left, query heads for each, head size) of every attention; ``neurons``: of every FFN.
    """
    if not hasattr(getattr(model, "config", None), "to_dict"):
        return ""  # not a transformers model: it has no config that a checkpoint is built from
    if len(set(heads)) > 1 or len(set(neurons)) > 1:
        what = "heads" if len(set(heads)) > 1 else "neurons"
        return f"layers keep different numbers of {what}, which no config can say: {_INSTEAD}"
    said: dict[str, int] = {}
    if heads:
        groups, each, size = heads[0]
        said = {"num_attention_heads": groups * each, "num_key_value_heads": groups, "head_dim": size}
    return tell_config(model, said, neurons[0] if neurons else None, _INSTEAD)


def tell_config(model: nn.Module, said: Mapping[str, int | float | bool], neurons: int | None, instead: str) -> str:
    """Set ``said`` (where the config has such keys) if a model built from that has the shapes of this one."""
    config: Any = model.config
    values = dict(said)
    inner = config.get_text_config()
    if neurons is not None:
        values |= {name: neurons for name in _FFN if hasattr(inner, name)}
    # Some attentions (Qwen2's) read a head_dim that their config does not declare
    values = {name: value for name, value in values.items() if hasattr(inner, name) or name == "head_dim"}
    trial = copy.deepcopy(config)
    why = f"{type(config).__name__} cannot say this shape: {instead}"
    try:
        _set(trial, values)
        trial = type(config).from_dict(trial.to_dict())  # what loading does, with its checks
        with torch.device("meta"):
            built = type(model)(trial)
    except Exception:  # whatever it objects to, a checkpoint with this config would not load
        return why
    if _shapes(built) != _shapes(model):
        return why
    _set(config, values)
    return ""


def _set(config: Any, values: Mapping[str, int | float | bool]) -> None:
    inner = config.get_text_config()
    for name, value in values.items():
        setattr(inner, name, value)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}
