"""SliceGPT: rotate the stream between layers to its principal components, and cut the last ones off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sparsec.errors import ModelWouldGrow, UnfitCalibration
from sparsec.passes.masks.structure.config import tell_config
from sparsec.passes.masks.structure.contract import Data, Row, Structured, Tick, parameters, silent
from sparsec.passes.masks.structure.llama import (
    Calls,
    Decoder,
    attention_of,
    decoder_of,
    epsilon_name,
    mlp_of,
    record,
)
from sparsec.passes.masks.structure.units import Units

_SAVE_WHOLE = "save it with torch.save, or slice with rotation: shared, which any checkpoint can hold"


@dataclass(frozen=True)
class SliceGPT:
    """Fewer dimensions in the stream, by PCA rotations between layers.

    RMSNorm(h) = h / rms(h) without its weight (which goes into the linears that follow) commutes with a rotation: Q
    is multiplied into what writes the stream, Q^T into what reads it. Q is the PCA (fp64) of the stream at each norm,
    measured with what was sliced before it; the last columns go. Where h passes from one Q to the next, a shortcut
    Q_a^T Q_b multiplies it. The norms divide by the rms over the old width, which an epsilon and a factor in the
    following linears express, so they stay what they are.

    ``rotation: shared`` (not in the paper) takes one Q for the whole model: no shortcuts, a plain smaller checkpoint,
    and more error. Sparsity is the share of dimensions, rounded so that a multiple of ``multiple`` is left.

    Source: Ashkboos et al., "SliceGPT", 2024, sections 3.1 to 3.4. The reference code turns the kept dimensions by a
    random orthogonal matrix by default (``orientation: random``); the paper does not. Its damping of the covariance
    does not change the eigenvectors and is left out. Tied embeddings are untied, and the shortcuts hold two matrices
    a layer, so a small model can grow: that is refused.
    """

    role: ClassVar[str] = "structure"
    needs: ClassVar[tuple[str, ...]] = ("data",)
    source: ClassVar[str] = "Ashkboos et al., 2024, sections 3.1 to 3.4"
    cost: ClassVar[str] = "a forward and two eigendecompositions a layer"

    rotation: Literal["block", "shared"] = field(
        default="block", metadata={"doc": "block: a rotation for each norm; shared: one for all"}
    )
    orientation: Literal["pca", "random"] = field(
        default="pca", metadata={"doc": "pca, or random: turn the kept dimensions at random"}
    )
    multiple: Annotated[int, Field(ge=1)] = field(default=8, metadata={"doc": "the width left is a multiple of this"})
    slice_head: bool = field(default=False, metadata={"doc": "slice what lm_head reads, too (rotation: shared does)"})
    allow_growth: bool = field(default=False, metadata={"doc": "slice even where the model gets larger"})

    def apply(
        self, model: nn.Module, units: Units, forward_data: Data, sparsity: float, seed: int, *, tick: Tick = silent
    ) -> Structured:
        """Rotate and slice, in place; ``units`` is not read. Raises UnfitModel and ModelWouldGrow, first."""
        decoder = decoder_of(model, "slicegpt")
        widths = self._widths(model, decoder, sparsity)
        rows = _rows(decoder, widths, self.rotation == "block")
        before, tied = parameters(model), decoder.head.weight is decoder.embedding.weight
        after = (
            before + sum(r.parameters_after - r.parameters_before for r in rows) + tied * decoder.head.weight.numel()
        )
        if after > before and not self.allow_growth:
            raise ModelWouldGrow(
                method="slicegpt",
                sparsity=sparsity,
                before=before,
                after=after,
                why=f"{'embeddings are untied and ' * tied}shortcuts hold two matrices a layer",
                help="Slice more, set rotation: shared, or set allow_growth: true.",
            )
        calls = record(model, decoder, forward_data, "slicegpt")
        generator = torch.Generator().manual_seed(seed) if self.orientation == "random" else None
        with torch.no_grad():
            bases = self._bases(decoder, calls, widths, generator, tick)
            _write(decoder, bases)
            if self.rotation == "block":
                _add_shortcuts(model, decoder, bases)
        unsaved = f"every block has its own rotation, which no config can say: {_SAVE_WHOLE}"
        if self.rotation == "shared":
            unsaved = tell_config(model, _said(model, decoder, widths[0]), None, _SAVE_WHOLE)
        notes = ["embedding and lm_head were tied and are two matrices now"] if tied else []
        return Structured(
            rows, before, parameters(model), 1.0 - widths[0] / decoder.width, False, unsaved, tuple(notes)
        )  # fmt: skip

    def _widths(self, model: nn.Module, decoder: Decoder, sparsity: float) -> list[int]:
        """The width left at every norm, the last one (before lm_head) included."""
        step = self.multiple
        if self.rotation == "shared":  # a Llama config wants a width that the number of heads divides
            step = math.lcm(step, int(getattr(getattr(model, "config", None), "num_attention_heads", 1)))
        width = decoder.width if sparsity == 0 else int((1.0 - sparsity) * decoder.width + 1e-9) // step * step
        whole = not self.slice_head and self.rotation == "block"
        return [max(width, min(step, decoder.width))] * len(decoder.halves) + [
            decoder.width if whole else max(width, step)
        ]

    def _bases(
        self, decoder: Decoder, calls: Calls, widths: list[int], generator: torch.Generator | None, tick: Tick
    ) -> list[torch.Tensor]:
        """The basis [width, kept] of the stream at every norm."""
        layers, total = decoder.layers, len(decoder.layers)
        streams, shared = list(calls.streams), self.rotation == "shared"
        pooled = torch.zeros(decoder.width, decoder.width, dtype=torch.float64, device=streams[0].device)
        bases: list[torch.Tensor] = []

        def turn() -> None:
            """The stream reaches a norm: slice it there, or add it to the shared statistics."""
            nonlocal pooled
            covariance = _covariance(streams, calls.real)
            if shared:
                pooled = pooled + covariance / covariance.trace().clamp_min(1e-30)
                return
            kept = widths[len(bases)]
            whole = len(bases) == len(widths) - 1 and not self.slice_head
            basis = torch.eye(decoder.width, device=covariance.device) if whole else _basis(covariance, kept, generator)
            bases.append(basis)
            for i, stream in enumerate(streams):
                streams[i] = (stream.float() @ basis @ basis.t()).to(stream.dtype)

        for number, layer in enumerate(layers):
            tick(number, total, f"layer {number}")
            turn()
            for i, stream in enumerate(streams):
                streams[i] = stream + attention_of(layer, stream, calls.kwargs[i][number])
            turn()
            for i, stream in enumerate(streams):
                streams[i] = stream + mlp_of(layer, stream)
        turn()
        return [_basis(pooled, widths[0], generator)] * len(widths) if shared else bases


class SlicedLayer(nn.Module):
    """A decoder layer with a shortcut: h S_a + attention(norm(h)), then the same with S_m and the MLP.

    ``attention_shortcut`` and ``mlp_shortcut`` are linears without bias, [after, before] wide.
    """

    def __init__(self, layer: nn.Module, attention_shortcut: nn.Linear, mlp_shortcut: nn.Linear) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.attention_shortcut, self.mlp_shortcut = attention_shortcut, mlp_shortcut
        for name in ("attention_type", "layer_idx"):  # some models read it from their layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.train(layer.training)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[batch, tokens, width before] to [batch, tokens, width after]."""
        stream: torch.Tensor = self.attention_shortcut(hidden_states) + attention_of(self, hidden_states, kwargs)
        added: torch.Tensor = self.mlp_shortcut(stream) + mlp_of(self, stream)
        return added


def _covariance(streams: list[torch.Tensor], real: list[torch.Tensor]) -> torch.Tensor:
    """Sum of h h^T over all real tokens, fp64 [width, width]."""
    width = streams[0].shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64, device=streams[0].device)
    for stream, mask in zip(streams, real, strict=True):
        h = stream[mask].double()
        total += h.t() @ h
    if not bool(total.isfinite().all()):
        raise UnfitCalibration(detail="the stream between two layers holds values that are not finite")
    return total


def _basis(covariance: torch.Tensor, kept: int, generator: torch.Generator | None) -> torch.Tensor:
    """The first ``kept`` principal directions, fp32 [width, kept], turned within themselves by a random rotation."""
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :kept]
    if generator is not None:
        turned = torch.linalg.qr(torch.randn(kept, kept, generator=generator, dtype=torch.float64)).Q
        basis = basis @ turned.to(basis.device)
    narrow: torch.Tensor = basis.float()
    return narrow


def _write(decoder: Decoder, bases: list[torch.Tensor]) -> None:
    """Multiply the bases into everything that reads or writes the stream, and make it narrow."""
    embedding, width = decoder.embedding, decoder.width
    tied = decoder.head.weight is embedding.weight
    head = decoder.head.weight.detach()
    embedding.weight = _like(embedding.weight, embedding.weight.detach().double() @ bases[0].double())
    embedding.embedding_dim = bases[0].shape[1]
    if tied:
        decoder.head.weight = nn.Parameter(head.clone(), requires_grad=embedding.weight.requires_grad)
    for half, now, after in zip(decoder.halves, bases, bases[1:], strict=False):
        for reader in half.readers:
            _narrow_reader(reader, half.norm, now, width)
        _narrow_norm(half.norm, now, width)
        writer = half.writer
        writer.weight = _like(writer.weight, after.double().t() @ writer.weight.detach().double())
        if writer.bias is not None:
            writer.bias = _like(writer.bias, writer.bias.detach().double() @ after.double())
        writer.out_features = after.shape[1]
    _narrow_reader(decoder.head, decoder.norm, bases[-1], width)
    _narrow_norm(decoder.norm, bases[-1], width)


def _narrow_reader(reader: nn.Linear, norm: nn.Module, basis: torch.Tensor, width: int) -> None:
    """W diag(norm weight) Q, times what a norm over fewer dimensions makes too large."""
    scale = math.sqrt(width / basis.shape[1])
    weight = reader.weight.detach().double() * norm.get_parameter("weight").detach().double()
    reader.weight = _like(reader.weight, weight @ basis.double() * scale)
    reader.in_features = basis.shape[1]


def _narrow_norm(norm: nn.Module, basis: torch.Tensor, width: int) -> None:
    kept = basis.shape[1]
    weight = norm.get_parameter("weight")
    norm.weight = nn.Parameter(torch.ones(kept, dtype=weight.dtype, device=weight.device), weight.requires_grad)
    name = epsilon_name(norm)
    setattr(norm, name, getattr(norm, name) * width / kept)
    if hasattr(norm, "normalized_shape"):
        setattr(norm, "normalized_shape", (kept,))  # noqa: B010 (nn.RMSNorm's own)


def _like(old: torch.Tensor, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(old.dtype), requires_grad=old.requires_grad)


def _add_shortcuts(model: nn.Module, decoder: Decoder, bases: list[torch.Tensor]) -> None:
    for i, layer in enumerate(decoder.layers):
        like = decoder.halves[2 * i].writer.weight
        pair = []
        for before, after in zip(bases[2 * i : 2 * i + 2], bases[2 * i + 1 : 2 * i + 3], strict=True):
            shortcut = nn.Linear(before.shape[1], after.shape[1], bias=False, device=like.device, dtype=like.dtype)
            shortcut.weight = _like(like, after.double().t() @ before.double())
            pair.append(shortcut)
        decoder.layers[i] = SlicedLayer(layer, *pair)


def _rows(decoder: Decoder, widths: list[int], shortcuts: bool) -> tuple[Row, ...]:
    """What every layer, the embedding and the head hold, before and after. Tied weights count in both."""
    old = decoder.width

    def row(name: str, after: int, sizes: list[tuple[int, int]], more: int = 0) -> Row:
        """``sizes``: (features that do not change, width left) of each matrix."""
        held = sum(n for n, _ in sizes)
        return Row(name, "width", old, after, held * old, sum(n * k for n, k in sizes) + more)

    rows = [row("embed_tokens", widths[0], [(decoder.embedding.num_embeddings, widths[0])])]
    for i in range(len(decoder.layers)):
        sizes, more = [], 0
        for half, now, after in zip(
            decoder.halves[2 * i : 2 * i + 2], widths[2 * i :], widths[2 * i + 1 :], strict=False
        ):
            sizes += [(reader.out_features, now) for reader in half.readers]
            sizes += [(1, now), (half.writer.in_features + (half.writer.bias is not None), after)]
            more += now * after * shortcuts
        rows.append(row(f"layers.{i}", widths[2 * i], sizes, more))
    rows.append(row("lm_head", widths[-1], [(decoder.head.out_features + 1, widths[-1])]))
    return tuple(rows)


def _said(model: nn.Module, decoder: Decoder, width: int) -> Mapping[str, int | float | bool]:
    """What a config has to say of a model that was sliced by one rotation."""
    attention = decoder.layers[0].get_submodule("self_attn")
    return {
        "hidden_size": width,
        "head_dim": int(attention.head_dim),  # type: ignore[arg-type]
        "rms_norm_eps": float(getattr(decoder.norm, epsilon_name(decoder.norm))),
        "tie_word_embeddings": False,
    }
