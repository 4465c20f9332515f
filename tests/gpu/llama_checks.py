"""A pruned Llama with random weights under torch.compile(backend="sparsec"): what its answers are compared with.

The same functions run on a GPU and, with a smaller model, on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from sparsec import records
from sparsec.backend import sparsec
from sparsec.codegen import triton
from sparsec.errors import SparsecWarning
from sparsec.runtime import gpu

BACKEND = "sparsec" if "sparsec" in torch.compiler.list_backends() else sparsec  # the name where it is installed


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    layers: int = 4
    heads: int = 8
    vocabulary: int = 1000


def pruned_llama(dtype: torch.dtype, device: str, size: Size = Size()) -> Any:
    """Random weights; attention is 2:4, the rest 80 % unstructured, the output layer dense."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=2 * size.hidden + 384, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads // 2, vocab_size=size.vocabulary,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).to(device).eval()
    with torch.no_grad():
        for name, layer in model.model.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(two_of_four(layer.weight) if "attn" in name else largest(layer.weight, 0.2))
    return model


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.float().abs().view(len(weight), -1, 4)
    return torch.zeros_like(groups).scatter_(2, groups.topk(2, dim=2).indices, 1.0).view_as(weight).to(weight)


def largest(weight: torch.Tensor, share: float) -> torch.Tensor:
    count = int(share * weight.numel())
    flat = weight.float().abs().flatten()
    return torch.zeros_like(flat).scatter_(0, flat.topk(count).indices, 1.0).view_as(weight).to(weight)


@contextmanager
def compiled_forward(model: Any, options: dict[str, Any] | None = None, **said: Any) -> Iterator[None]:
    """``model.generate`` and ``model(...)`` run compiled inside."""
    eager = model.forward
    model.forward = torch.compile(eager, backend=BACKEND, options=options, dynamic=False, **said)
    try:
        yield
    finally:
        del model.forward


def generated(model: Any, prompt: torch.Tensor, tokens: int) -> Any:
    """Greedy, with a cache of fixed size, so that two graphs serve all steps."""
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
        cache_implementation="static", disable_compile=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def generation_error(model: Any, prompt: torch.Tensor, tokens: int, options: dict[str, Any] | None) -> float:
    """Of the logits of every generated token, relative to eager logits of the same text, by norms."""
    with torch.inference_mode():
        with compiled_forward(model, options):
            made = generated(model, prompt, tokens)
        ours = torch.stack(made.logits, 1).float()
        text = made.sequences
        eager = model(text[:, :-1]).logits[:, prompt.shape[1] - 1 :].float()
    assert ours.shape == eager.shape
    return relative(ours, eager)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


def sparse_uses(model: nn.Module) -> int:
    """How often kernels of ours served weights of this model."""
    mine = {p._cdata for p in model.parameters()}
    return sum(entry.uses for key, entry in gpu.TABLE.entries.items() if key[0] in mine and entry.routes)


def said_for_lack_of_memory(device: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile where every pack runs out of memory: the answer has to be dense's. Gives what was recorded."""

    def full(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory, as simulated by a test")

    monkeypatch.setattr(triton, "pack_verified", full)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 256), nn.ReLU()).to(device).eval()
    with torch.no_grad():
        model[0].weight.mul_(largest(model[0].weight, 0.2))
    x = torch.randn(1, 384, device=device)
    with torch.inference_mode(), records.recording() as kept, pytest.warns(SparsecWarning, match="out of memory"):
        torch.testing.assert_close(torch.compile(model, backend=BACKEND, options=options)(x), model(x))
    assert not sparse_uses(model)
    return [r.failure or "" for r in kept] + [x.decision.reason for r in kept for x in r.layers]
