"""Convolutions whose weights are matrices for a while: what ``sparsify`` needs of kernels larger than 1x1.

In: the jobs of a recipe. Inside the block every such weight is channels_last, so that its matrix of patches, K in the
order (high, wide, channel), is a view that can be written. Afterwards each lies in memory as it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsec.errors import BadRecipe
from sparsec.prunable import Job, Selection
from sparsec.stages import Stage


def only_masks(stage: Stage, selection: Selection) -> Selection:
    """``selection`` without larger convolutions where the stage does more than to choose or round weights one layer at
    a time. Raises BadRecipe where that leaves nothing."""
    more = [piece.method for piece in (*stage.posts, *([stage.allocate] if stage.allocate else []))]
    more += [name for name, _ in stage.rewrites]
    left_out = [job.layer.name for job in selection.jobs if job.layer.kind == "conv2d"] if more else []
    if not left_out:
        return selection
    few = f"{left_out[0]} and {len(left_out) - 1} more" if len(left_out) > 1 else left_out[0]
    note = f"{few} not pruned: {more[0]} takes no convolutions larger than 1x1"
    jobs = [job for job in selection.jobs if job.layer.name not in left_out]
    if not jobs:
        raise BadRecipe(detail=f"it leaves no layer to prune ({note})")
    return replace(selection, jobs=jobs, notes=[*selection.notes, note])


@contextmanager
def laid_in_patches(model: nn.Module, jobs: Iterable[Job]) -> Iterator[None]:
    """Lay the weights of larger convolutions channels_last; their outputs keep the memory format of their inputs."""
    layers = {id(job.layer.weight): job.layer for job in jobs if job.layer.kind == "conv2d"}.values()
    with ExitStack() as stack:
        for layer in layers:
            if not layer.weight.is_contiguous(memory_format=torch.channels_last):
                _lay(layer.weight, torch.channels_last)
                stack.callback(_lay, layer.weight, torch.contiguous_format)
                for name in (layer.name, *layer.tied):
                    stack.callback(model.get_submodule(name).register_forward_hook(_as_it_was).remove)
        yield


def _lay(weight: nn.Parameter, format: torch.memory_format) -> None:
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.data = weight.data.contiguous(memory_format=format)


def _as_it_was(module: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor | None:
    """What follows may ``view`` what a convolution of a contiguous weight would have given it."""
    return y.contiguous() if args and isinstance(args[0], torch.Tensor) and args[0].is_contiguous() else None
