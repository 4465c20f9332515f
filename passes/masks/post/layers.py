"""What post-passes share: which module of a block holds a layer's weight, and how a layer is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sparsec.passes.masks.block import LayerState


def owners(module: nn.Module, layers: Sequence[LayerState]) -> list[tuple[LayerState, str]]:
    """The masked layers inside ``module``, each with the name in there of the module whose ``weight`` it is.

    They are found by the memory they share, since a layer may go by another name outside of the block.
    """
    homes: dict[tuple[int, int], str] = {}
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter):
            homes.setdefault((weight.data_ptr(), weight.numel()), name)
    keys = [(layer, (layer.weight.data_ptr(), layer.weight.numel())) for layer in layers if layer.keep is not None]
    return [(layer, homes[key]) for layer, key in keys if key in homes]


def write(layer: LayerState, values: torch.Tensor) -> None:
    """Write ``values`` [N, K] where the mask keeps and +0.0 (never -0.0) where it prunes."""
    assert layer.keep is not None
    with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():  # the one way to write inference tensors
        layer.weight.copy_(values.masked_fill(~layer.keep, 0.0))
