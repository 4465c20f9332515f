"""``PackedLinear`` and ``PackedEmbedding``: layers whose weight exists only as a sparse pack.

In: a pack, its routes, a bias. Out: a module that stands where an ``nn.Linear`` or ``nn.Embedding`` stood: the same
call, the same result up to the order of sums, eagerly and under torch.compile, without a dense weight. Made by
``sparsec.pack_``; a linear and an embedding that shared a weight share its pack.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsec.errors import BadPack, PackedLayer, SparsecError
from sparsec.formats import Format
from sparsec.passes.graph import TAKES
from sparsec.plan import FIXED, PER_TOKEN, RAW, input_rule
from sparsec.runtime import library
from sparsec.runtime.packed import Meta, unpacked

META, WORK, PACK, ABOUT = "meta", "work", "pack", "facts"


class PackedWeight(nn.Module):
    """A layer with W [out_features, in_features] packed; its two kinds differ in what they do with it.

    Buffers, all in the state dict: ``meta`` (uint8, JSON: format, shape, loops), ``pack0`` ... (the pack's tensors, of
    any dtype), ``work`` (int64), ``facts`` (uint8, JSON: what it was made from, and a checksum). ``bias`` is a
    parameter without gradient, or None. Moving, casting and gradients are refused (PackedLayer): ``sparsec.unpack_``
    first.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(
        self, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, about: torch.Tensor | None = None
    ) -> None:
        """``tensors``: (meta, tensors of the pack ..., work); ``about``: uint8, JSON (``text_tensor``).

        Raises BadPack where they do not fit together.
        """
        super().__init__()
        library.load()
        self.training = False
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._set(tensors, text_tensor({}) if about is None else about)

    def _set(self, tensors: Sequence[torch.Tensor], about: torch.Tensor) -> None:
        meta = checked(tensors)
        for name in [name for name in self._buffers if name != "bias"]:
            del self._buffers[name]
        for name, tensor in zip(buffer_names(len(tensors)), tensors, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer(ABOUT, about)
        self._read(meta)

    def _read(self, meta: Meta) -> None:
        self.in_features, self.out_features, self.dtype = meta.k, meta.n, meta.torch_dtype
        self.format, self.inputs = meta.format, meta.x
        # The same tensors as the buffers, where torch.compile looks: it takes every size of a registered buffer as
        # fixed, and would compile one graph for each layer of equal shape and another number of zeros.
        count = sum(name.startswith(PACK) for name in self._buffers) + 2
        self._pack: tuple[torch.Tensor, ...] = tuple(self.get_buffer(name) for name in buffer_names(count))

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [out_features, in_features], decoded anew at each access: for code that only looks."""
        w: torch.Tensor = torch.ops.sparsec.unpack_packed(
            list(self._pack), self.out_features, self.in_features, self.dtype
        )
        return w

    @property
    def about(self) -> dict[str, Any]:
        """What is told about the pack: ``sum`` (checksum), ``transposed``, ``density``, ``trained`` ..."""
        found: dict[str, Any] = text_of(self.get_buffer(ABOUT))
        return found

    @property
    def packed_bytes(self) -> int:
        """Bytes of the pack, without the bias."""
        return sum(t.numel() * t.element_size() for t in self._pack)

    @property
    def dense_bytes(self) -> int:
        """Bytes that the dense weight had."""
        return self.in_features * self.out_features * self.dtype.itemsize

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        rounds = f", x={self.inputs}" if self.inputs else ""
        return f"{size}, format={self.format}{rounds}, bytes={self.packed_bytes} of {self.dense_bytes}"

    # ------------------------------------------------------------------------------------- what moves and copies

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeight:
        probe = torch.empty(0, dtype=self.dtype)
        moved = fn(probe)
        if moved.dtype != probe.dtype:
            said = f"a packed layer of {_short(probe.dtype)} cannot become {_short(moved.dtype)}"
            raise PackedLayer(doing=said, help="Convert the model before packing")
        if moved.device != probe.device:
            said = f"a packed layer cannot move to {moved.device}"
            raise PackedLayer(doing=said, help="Kernels for packed layers run on the CPU")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._read(checked([self.get_buffer(name) for name in buffer_names(len(self._pack))]))
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        if requires_grad:
            raise PackedLayer(doing="a packed layer cannot be trained", help="Prune the dense model")
        super().requires_grad_(False)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        library.load()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take another pack of the same shape, whole: its tensors may have other sizes and another format."""
        count = sum(key.startswith(prefix + PACK) for key in state_dict) + 2
        names = [*buffer_names(count), ABOUT, *(["bias"] if self.bias is not None else [])]
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if absent:
            missing_keys += absent
            if prefix + "weight" in state_dict:
                error_msgs.append(
                    f"{prefix}weight is dense and the layer is packed; call sparsec.unpack_(model) before loading."
                )
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        found = {name: state_dict[prefix + name] if assign else state_dict[prefix + name].clone() for name in names}
        tensors = [found[name] for name in buffer_names(count)]
        try:
            self._take(tensors, found, prefix)
        except (BadPack, PackedLayer) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        known = {prefix + name for name in names}
        unexpected_keys += [k for k in state_dict if strict and k.startswith(prefix) and k not in known]

    def _take(self, tensors: list[torch.Tensor], found: Mapping[str, torch.Tensor], prefix: str) -> None:
        meta, about = checked(tensors), text_of(found[ABOUT])
        if (meta.n, meta.k, meta.dtype) != (self.out_features, self.in_features, Meta.decode(self._pack[0]).dtype):
            raise BadPack(why=f"it is [{meta.n}, {meta.k}] {meta.dtype}, the layer {self.extra_repr()}")
        if about.get("sum") != checksum(tensors):
            raise BadPack(why="its checksum does not match")
        if self.bias is not None:
            if found["bias"].shape != self.bias.shape:
                raise BadPack(why=f"its bias is {tuple(found['bias'].shape)}, not {tuple(self.bias.shape)}")
            self.bias.data = found["bias"].to(self.dtype)
        self._set(tensors, found[ABOUT])


class PackedLinear(PackedWeight):
    """y = x W^T + b. x: [..., in_features] of the pack's dtype, which is rounded to int8 first where ``inputs`` says so
    (as ``passes.quantize.inputs.inputs_of``).

    Under autocast x is taken in the pack's dtype and the result has autocast's.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features]. Raises PackedLayer where gradients would have to flow."""
        if x.requires_grad and torch.is_grad_enabled():
            raise PackedLayer(doing="gradients cannot flow through a packed layer", help="Run under torch.no_grad()")
        pack = list(self._pack)
        if x.dtype != self.dtype and x.is_floating_point() and torch.is_autocast_enabled("cpu"):
            x = x.to(self.dtype)
        y: torch.Tensor = torch.ops.sparsec.linear_packed(x, self.bias, pack, self.out_features)
        return y.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else y


class PackedEmbedding(PackedWeight):
    """Rows of W by their numbers, decoded as they are asked for. ids: integers [...] -> [..., in_features]."""

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    @property
    def padding_idx(self) -> int | None:
        """As the embedding had it; it matters to training alone."""
        found: int | None = self.about.get("padding")
        return found

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Raises IndexError for a number that is no row."""
        y: torch.Tensor = torch.ops.sparsec.embedding_packed(ids, list(self._pack), self.in_features, self.dtype)
        return y


# By the name of the class that stood there before.
KINDS: dict[str, type[PackedWeight]] = {
    "Linear": PackedLinear, "Conv1D": PackedLinear, "Embedding": PackedEmbedding,
}  # fmt: skip


def packed_layer(tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, about: torch.Tensor) -> PackedWeight:
    """The layer of the kind that ``about`` says. Raises BadPack."""
    kind = str(text_of(about).get("kind", "Linear"))
    if kind not in KINDS:
        raise BadPack(why=f"it is of a {kind}, which this version does not know")
    return KINDS[kind](tensors, bias, about)


def buffer_names(count: int) -> list[str]:
    """The buffers' names in the order of a pack of ``count`` tensors, with meta and work."""
    return [META, *(f"{PACK}{i}" for i in range(count - 2)), WORK]


def checked(tensors: Sequence[torch.Tensor]) -> Meta:
    """The meta of (meta, tensors ..., work). Raises BadPack where they cannot be what it says."""
    try:
        meta = Meta.decode(tensors[0])
        Format.parse(meta.format)
        if min(meta.n, meta.k, meta.tensors, meta.tiles) < 0 or meta.dtype not in TAKES["cpu"] or not meta.routes:
            raise ValueError
        _check_inputs(meta.x, meta.reads)
    except (ValueError, KeyError, TypeError, IndexError, SparsecError):
        raise BadPack(why="its meta cannot be read") from None
    if len(tensors) != meta.tensors + 2 or tensors[-1].dtype != torch.int64 or tensors[-1].numel() != meta.tiles + 1:
        raise BadPack(why=f"its tensors are not those of {meta.format}")
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in tensors):
        raise BadPack(why="its tensors are not contiguous on the CPU")
    return meta


def _check_inputs(said: str, reads: str) -> None:
    """Raises ValueError where x is rounded as no layer rounds it, or kernels round what the layer does not."""
    kind, number = input_rule(said)
    known = kind in (RAW, PER_TOKEN) or (kind == FIXED and 0 < number < float("inf"))
    if not known or number < 0 or said.partition(":")[0] not in ("", "int8") or reads not in ("", said[:4]):
        raise ValueError


def checksum(tensors: Sequence[torch.Tensor]) -> str:
    """A hash of dtypes, shapes and bytes."""
    whole = hashlib.blake2b(digest_size=16)
    for t in tensors:
        whole.update(f"{t.dtype}{tuple(t.shape)}".encode())
        whole.update(t.detach().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def dense_of(layer: PackedWeight) -> torch.Tensor:
    """The dense weight [N, K] by plain torch, without the kernels."""
    return unpacked(layer._pack)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text_tensor(said: Mapping[str, Any]) -> torch.Tensor:
    """A dict as JSON in a uint8 tensor; ``text_of`` reads it back."""
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


def text_of(tensor: torch.Tensor) -> Any:
    """The JSON in a uint8 tensor. Raises BadPack."""
    try:
        return json.loads(bytes(tensor.tolist()))
    except ValueError:
        raise BadPack(why="what is told about it cannot be read") from None
