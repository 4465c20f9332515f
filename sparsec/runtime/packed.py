"""The Python half of the ops on packed weights: what a pack's ``meta`` text means in this process.

In: the tensors of a packed layer, ``(meta, tensors of the pack ..., work)``. ``meta`` is a uint8 tensor that holds
JSON, so that it lies in a checkpoint like any tensor and one graph serves layers whose metas differ. Out: routes in the
op's table (``packed.h``), made once for each distinct text.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsec import targets
from sparsec.cache import cache_dir
from sparsec.codegen import build, cpp
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.errors import BuildError, SparsecWarning
from sparsec.formats import Format
from sparsec.options import Policy
from sparsec.passes.graph import DTYPES
from sparsec.plan import Plan
from sparsec.runtime.parts import FOREVER, route
from sparsec.runtime.store import STORE

UNPACK = "unpack"  # the loop that decodes blocks of the weight for a dense product
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_SCALAR_TYPES = {torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType
_cache = [""]  # where kernels are built
_ALIGN = 64  # metas are padded, so that their size seldom differs between layers


@dataclass(frozen=True)
class Meta:
    """What the tensors of a pack are. ``routes``: ((from M, loop), ...) ascending, the first from 0.

    ``tensors``: how many the pack has, without meta and work. ``tiles`` of 16 rows. ``dtype``: of x and y.
    ``target``: as in ``pack_``.
    """

    format: str
    version: int
    n: int
    k: int
    dtype: str
    tensors: int
    tiles: int
    routes: tuple[tuple[int, str], ...]
    target: str = "auto"

    def encode(self) -> torch.Tensor:
        """A uint8 tensor; equal metas have equal bytes."""
        text = json.dumps(asdict(self), separators=(",", ":"))
        return torch.frombuffer(bytearray(text.ljust(-(-len(text) // _ALIGN) * _ALIGN).encode()), dtype=torch.uint8)

    @classmethod
    def decode(cls, meta: torch.Tensor) -> Meta:
        """Raises ValueError where the tensor holds anything else."""
        try:
            said = json.loads(bytes(meta.tolist()))
            said["routes"] = tuple((int(lo), str(loop)) for lo, loop in said["routes"])
            return cls(**said)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"this is no description of a pack ({type(error).__name__})") from None

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH[self.dtype]

    def packed(self, tensors: Sequence[torch.Tensor]) -> Packed:
        """The record that families read, from ``(meta, tensors ..., work)``."""
        shape = (self.n, self.k)
        return Packed(Format.parse(self.format), self.version, tuple(tensors[1:-1]), tensors[-1], shape, "packed layer")


def kernels_in(cache: str) -> None:
    """Build the kernels of packed layers in this cache directory from now on (empty: the user's)."""
    _cache[:] = [cache]


def unpacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The dense weight [N, K] by plain torch, from the layout's description alone."""
    meta = Meta.decode(tensors[0])
    packed = meta.packed(tensors)
    return cpp.family(packed.format.pattern.kind).unpack(packed)


def resolve(meta_tensor: torch.Tensor) -> None:
    """Build the kernels of a meta and install its routes; without a compiler, Python computes the products."""
    meta = Meta.decode(meta_tensor)
    facts = [meta.n, meta.k, meta.tensors, _SCALAR_TYPES[meta.torch_dtype], int(_verifying())]
    table: list[int] = []
    try:
        ends = [lo - 1 for lo, _ in meta.routes[1:]] + [FOREVER]
        for (lo, loop), hi in zip(meta.routes, ends, strict=True):
            table += _route(meta, loop, lo, hi)
        table += _route(meta, UNPACK, 1, 0)
        dense = [int(loop == UNPACK) for _, loop in meta.routes] + [1]
    except BuildError as error:
        warnings.warn(f"packed layers run slowly, by plain PyTorch: {error}", SparsecWarning, stacklevel=2)
        table, dense = [], []
    torch.ops.sparsec.install_packed(meta_tensor, facts, table, dense)


def _route(meta: Meta, loop: str, m_lo: int, m_hi: int) -> list[int]:
    spec = KernelSpec.on(targets.resolve(meta.target), Format.parse(meta.format), loop, meta.dtype)
    # a stand-in with the right counts: the op reads the tensors themselves at each call
    work = torch.empty(meta.tiles + 1)
    counts = Packed(spec.format, meta.version, (work,) * meta.tensors, work, (meta.n, meta.k), "")
    return route(m_lo, m_hi, build.build(spec, cache_dir(_cache[-1])), counts, 0)


def _verifying() -> bool:
    return os.environ.get("SPARSEC_VERIFY", "0") not in ("", "0")


def reference(x: torch.Tensor, bias: torch.Tensor | None, pack: list[torch.Tensor]) -> torch.Tensor:
    """x @ W.T + bias by plain torch, where no kernel can be made."""
    return torch.nn.functional.linear(x, unpacked(pack), bias)


def verify(x: torch.Tensor, bias: torch.Tensor | None, pack: list[torch.Tensor], y: torch.Tensor) -> None:
    """Compare one result with the reference. Raises VerifyError."""
    meta = Meta.decode(pack[0])
    STORE.verify(x, unpacked(pack), bias, y, Plan(f"a packed layer ({meta.format})", meta.format, Policy()).encode())


def register(library: Any) -> None:
    """Give the ops their Python halves and their shapes."""
    library.impl("resolve_packed", resolve, "CPU")
    library.impl("reference_packed", reference, "CPU")
    library.impl("verify_packed", verify, "CPU")
    torch.library.register_fake("sparsec::linear_packed", _linear_shape, lib=library)
    torch.library.register_fake("sparsec::embedding_packed", _rows_shape, lib=library)
    torch.library.register_fake("sparsec::unpack_packed", _weight_shape, lib=library)


def _linear_shape(x: torch.Tensor, bias: torch.Tensor | None, pack: list[torch.Tensor], n: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _rows_shape(ids: torch.Tensor, pack: list[torch.Tensor], k: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


def _weight_shape(pack: list[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return pack[0].new_empty((n, k), dtype=dtype)
