"""The parts of a Llama-type decoder, checked on data, and what its layers are called with.

In: a model and calibration batches. Out: ``Decoder``, or UnfitModel with the reason. A model fits when its stream is
changed only by h + attention(norm(h)) and h + mlp(norm(h)) with plain RMSNorms, so that a rotation passes through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsec.errors import UnfitCalibration, UnfitModel
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.structure.contract import Data

_READERS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
_WRITERS = {"self_attn": "o_proj", "mlp": "down_proj"}
_EPSILONS = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class Half:
    """Half of a layer, attention or MLP: what reads the stream after ``norm``, and what adds to it."""

    norm: nn.Module
    readers: tuple[nn.Linear, ...]
    writer: nn.Linear


@dataclass(frozen=True)
class Decoder:
    """A Llama-type model. ``width``: of its stream. ``halves``: two for each layer, in order."""

    embedding: nn.Embedding
    layers: nn.ModuleList
    halves: tuple[Half, ...]
    norm: nn.Module
    head: nn.Linear
    width: int


@dataclass
class Calls:
    """Of each batch: the stream [batch, tokens, width] that enters, which tokens are real, and each layer's kwargs."""

    streams: list[torch.Tensor] = field(default_factory=list)
    real: list[torch.Tensor] = field(default_factory=list)
    kwargs: list[list[dict[str, Any]]] = field(default_factory=list)


def attention_of(layer: nn.Module, stream: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What the attention of a layer adds to the stream."""
    added: torch.Tensor = layer.get_submodule("self_attn")(
        hidden_states=layer.get_submodule("input_layernorm")(stream), **kwargs
    )[0]
    return added


def mlp_of(layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
    """What the MLP of a layer adds to the stream."""
    added: torch.Tensor = layer.get_submodule("mlp")(layer.get_submodule("post_attention_layernorm")(stream))
    return added


def epsilon_name(norm: nn.Module) -> str:
    """The attribute that holds an RMSNorm's epsilon, or ""."""
    return next((name for name in _EPSILONS if isinstance(getattr(norm, name, None), float)), "")


def decoder_of(model: nn.Module, method: str) -> Decoder:
    """Read the parts by name. Raises UnfitModel."""

    def refuse(why: str) -> UnfitModel:
        help = "Take a Llama-type decoder (Llama, Mistral, Qwen2, Qwen3), or another method."
        return UnfitModel(method=method, model=type(model).__name__, why=why, help=help)

    base = getattr(model, "model", None)
    layers, norm = getattr(base, "layers", None), getattr(base, "norm", None)
    head, embedding = getattr(model, "lm_head", None), getattr(base, "embed_tokens", None)
    if not (isinstance(layers, nn.ModuleList) and isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)):
        raise refuse("it is not built of embed_tokens, layers, norm and lm_head")
    if norm is None or any(not _is_rms(n, embedding.embedding_dim) for n in _norms(layers, norm)):
        raise refuse("its norms are not plain RMSNorms x / rms(x) * weight before attention, MLP and lm_head")
    halves: list[Half] = []
    for layer in layers:
        if {name for name, _ in layer.named_children()} != {
            "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
        }:  # fmt: skip
            raise refuse("its layers hold more than attention, MLP and two norms")
        for part, norm_name in (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            held = dict(layer.get_submodule(part).named_children())
            linears = [held.get(name) for name in (*_READERS[part], _WRITERS[part])]
            if any(type(linear) is not nn.Linear for linear in linears):
                raise refuse(f"{part} is not made of the plain linears {', '.join((*_READERS[part], _WRITERS[part]))}")
            *readers, writer = (linear for linear in linears if isinstance(linear, nn.Linear))
            halves.append(Half(layer.get_submodule(norm_name), tuple(readers), writer))
    return Decoder(embedding, layers, tuple(halves), norm, head, embedding.embedding_dim)


def _norms(layers: nn.ModuleList, last: nn.Module) -> Iterator[nn.Module | None]:
    for layer in layers:
        yield getattr(layer, "input_layernorm", None)
        yield getattr(layer, "post_attention_layernorm", None)
    yield last


def _is_rms(norm: nn.Module | None, width: int) -> bool:
    """Whether it computes x / sqrt(mean(x^2) + eps) * weight, tried on numbers (Gemma's multiplies by 1 + weight)."""
    if norm is None or not epsilon_name(norm) or [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    weight = norm.get_parameter("weight").detach()
    x = torch.linspace(-2.0, 3.0, width, device=weight.device, dtype=weight.dtype)[None]
    wide = x.float()
    expected = wide * torch.rsqrt(wide.square().mean() + getattr(norm, epsilon_name(norm))) * weight.float()
    if weight.shape != (width,):
        return False
    with torch.no_grad():
        return torch.allclose(
            norm(x).float(), expected, rtol=2e-2 if weight.dtype != torch.float32 else 1e-4, atol=1e-5
        )


@torch.no_grad()
def record(model: nn.Module, decoder: Decoder, data: Data, method: str) -> Calls:
    """Run the model once a batch, recording; raises UnfitModel where the stream is not what the names promise."""
    if not data:
        raise UnfitCalibration(detail="there is none")
    calls = Calls()
    with evaluating(model):
        for number, batch in enumerate(data):
            entered: list[torch.Tensor] = []
            kwargs: list[dict[str, Any]] = []
            read: list[torch.Tensor] = []

            def see(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
                given = dict(given)
                entered.append(args[0] if args else given.pop("hidden_states"))  # noqa: B023
                kwargs.append(given)  # noqa: B023

            with ExitStack() as stack:
                for layer in decoder.layers:
                    stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
                stack.callback(decoder.norm.register_forward_hook(lambda _, a, o: read.extend((a[0], o))).remove)  # noqa: B023
                stack.callback(decoder.head.register_forward_pre_hook(lambda _, a: read.append(a[0])).remove)  # noqa: B023
                model(**batch)
            if number == 0:
                _check(model, decoder, batch, entered, kwargs, read, method)
            mask = batch.get("attention_mask")
            real = torch.ones(entered[0].shape[:2], dtype=torch.bool, device=entered[0].device)
            calls.real.append(mask.bool() if mask is not None and mask.ndim == 2 else real)
            calls.streams.append(entered[0])
            calls.kwargs.append(kwargs)
    return calls


def _check(
    model: nn.Module,
    decoder: Decoder,
    batch: Mapping[str, Any],
    entered: list[torch.Tensor],
    kwargs: list[dict[str, Any]],
    read: list[torch.Tensor],
    method: str,
) -> None:
    """``read``: the last stream, what the norm made of it, and what the head read."""
    why = ""
    if len(entered) != len(decoder.layers) or len(read) != 3:
        why = "its layers do not each run once"
    elif "input_ids" in batch and not torch.equal(entered[0], decoder.embedding(batch["input_ids"])):
        why = "what enters the first layer is not the embedding alone"
    elif not _close(read[1], read[2]):
        why = "what lm_head reads is not what the last norm gives"
    else:
        stream = entered[0]
        for layer, given, after in zip(decoder.layers, kwargs, [*entered[1:], read[0]], strict=True):
            stream = stream + attention_of(layer, stream, given)
            stream = stream + mlp_of(layer, stream)
            if not _close(stream, after):
                why = "its layers are not h + attention(norm(h)), then h + mlp(norm(h))"
                break
    if why:
        help = "Take a Llama-type decoder (Llama, Mistral, Qwen2, Qwen3), or another method."
        raise UnfitModel(method=method, model=type(model).__name__, why=why, help=help)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-4 if a.dtype == torch.float32 else 3e-2
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1e-6 + a.abs().max())).all())
