"""A causal language model as ONNX with its KV cache as inputs and outputs, so that it generates token by token.

Names are those that ONNX Runtime's own tools look for: ``past_key_values.0.key`` goes in, ``present.0.key`` comes out,
each [batch, heads, tokens, size of a head]. The first call has caches of no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsec.errors import BadModelFile, MissingPackage
from sparsec.export_onnx import OnnxReport, export_onnx


class WithCache(nn.Module):
    """``(input_ids [B, T], attention_mask [B, P + T], keys and values [B, H, P, D] of each layer)`` in; logits
    [B, T, V] and the longer keys and values out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, return_dict=True
        )
        present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return out.logits, *present


def export_decoder(model: nn.Module, path: str | Path, batch: int = 2, tokens: int = 4, **said: Any) -> OnnxReport:
    """Write a transformers model with a head of logits. ``batch``, ``tokens``: of the inputs that are traced, above 1;
    any number of either runs. ``said``: keywords of ``export_onnx``. Raises what it raises, and BadModelFile where the
    model keeps no cache of keys and values."""
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    wrapped = WithCache(model.eval())
    past = _cache_of(model, ids)
    mask = torch.ones(batch, past[0].shape[2] + tokens, dtype=torch.int64)
    auto = torch.export.Dim.AUTO
    shapes = {
        "input_ids": {0: auto, 1: auto},
        "attention_mask": {0: auto, 1: auto},
        "past": tuple({0: auto, 2: auto} for _ in past),
    }
    said = {"rows": 1, **said}  # tokens come one by one
    return export_onnx(wrapped, (ids, mask, *past), path, dynamic_shapes=shapes, names=_names(len(past) // 2), **said)


@torch.no_grad()
def _cache_of(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values of each layer after a few tokens."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingPackage(feature="exporting decoders", package="transformers", extra="hf") from None
    cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise BadModelFile(path=type(model).__name__, why="it keeps no cache of keys and values for each layer")
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def _names(layers: int) -> tuple[list[str], list[str]]:
    kinds = [(i, kind) for i in range(layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{i}.{kind}" for i, kind in kinds)]
    return inputs, ["logits", *(f"present.{i}.{kind}" for i, kind in kinds)]


def generate(session: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens [B, T + new_tokens] of a file that ``export_decoder`` wrote, in an ``InferenceSession``."""
    batch, made = ids.shape[0], ids
    caches: Mapping[str, np.ndarray[Any, Any]] = {
        said.name: np.zeros((batch, said.shape[1], 0, said.shape[3]), np.float32) for said in session.get_inputs()[2:]
    }
    names = [said.name for said in session.get_outputs()]
    for _ in range(new_tokens):
        mask = np.ones(made.shape, np.int64)
        found = dict(
            zip(names, session.run(names, {"input_ids": ids.numpy(), "attention_mask": mask, **caches}), strict=True)
        )
        ids = torch.from_numpy(found.pop("logits"))[:, -1].argmax(-1, keepdim=True)
        made = torch.cat([made, ids], 1)
        caches = {name.replace("present", "past_key_values"): array for name, array in found.items()}
    return made
