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
from sparsec.codegen.spec import Family, KernelSpec, Packed
from sparsec.errors import BuildError, SparsecWarning
from sparsec.formats import Format
from sparsec.options import Policy
from sparsec.passes.graph import DTYPES
from sparsec.passes.quantize.inputs import quantized, scale_in
from sparsec.plan import FIXED, Plan, input_rule
from sparsec.runtime.parts import FOREVER, route
from sparsec.runtime.store import STORE

UNPACK = "unpack"  # the loop that decodes blocks of the weight for a dense product
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_SCALAR_TYPES = {torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType
_cache = [""]  # where kernels are built
_ALIGN = 64  # metas are padded, so that their size seldom differs between layers


@dataclass(frozen=True)
class Meta:
    """What the tensors of a pack are. ``routes``: ((from M, loop), ...) ascending, the first from 0; loops are spelled
    as ``KernelSpec.way`` spells them, so ``dot/int8`` and ``unpack/int8`` read the packs of integer kernels.

    ``tensors``: how many the pack has, without meta and work. ``tiles`` of 16 rows. ``dtype``: of x and y.
    ``target``: as in ``pack_``. ``x``: how the layer rounds x, as ``passes.quantize.inputs.inputs_of`` says it.
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
    x: str = ""

    def encode(self) -> torch.Tensor:
        """A uint8 tensor; equal metas have equal bytes."""
        said = {key: value for key, value in asdict(self).items() if key != "x" or value}
        text = json.dumps(said, separators=(",", ":"))
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

    @property
    def reads(self) -> str:
        """What the kernels of the pack round x to: "int8" or nothing."""
        return self.routes[0][1].partition("/")[2]

    @property
    def unpack(self) -> str:
        """The loop that decodes the pack."""
        return f"{UNPACK}/{self.reads}" if self.reads else UNPACK

    @property
    def family(self) -> Family:
        """Of the pack's layout. Raises KeyError for a pattern that CPUs have no kernels for."""
        return cpp.family(Format.parse(self.format).pattern.kind, self.reads)

    @property
    def x_code(self) -> float:
        """How x is rounded as a kernel is told: ``SparsecCall.x_scale``; 0 also where it is not rounded."""
        kind, number = input_rule(self.x)
        return number if kind == FIXED else 0.0 - number

    def packed(self, tensors: Sequence[torch.Tensor]) -> Packed:
        """The record that families read, from ``(meta, tensors ..., work)``."""
        format, shape = Format.parse(self.format), (self.n, self.k)
        return Packed(format, self.version, tuple(tensors[1:-1]), tensors[-1], shape, "packed layer", self.reads)


def kernels_in(cache: str) -> None:
    """Build the kernels of packed layers in this cache directory from now on (empty: the user's)."""
    _cache[:] = [cache]


def unpacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The dense weight [N, K] by plain torch, from the layout's description alone."""
    meta = Meta.decode(tensors[0])
    return meta.family.unpack(meta.packed(tensors))


def resolve(meta_tensor: torch.Tensor) -> None:
    """Build the kernels of a meta and install its routes; without a compiler, Python computes the products."""
    meta = Meta.decode(meta_tensor)
    x_kind, x_number = input_rule(meta.x)
    facts = [meta.n, meta.k, meta.tensors, _SCALAR_TYPES[meta.torch_dtype], int(_verifying()), x_kind]
    table: list[int] = []
    try:
        ends = [lo - 1 for lo, _ in meta.routes[1:]] + [FOREVER]
        for (lo, loop), hi in zip(meta.routes, ends, strict=True):
            table += _route(meta, loop, lo, hi)
        table += _route(meta, meta.unpack, 1, 0)
        dense = [int(loop == meta.unpack) for _, loop in meta.routes] + [1]
    except BuildError as error:
        warnings.warn(f"packed layers run slowly, by plain PyTorch: {error}", SparsecWarning, stacklevel=2)
        table, dense = [], []
    torch.ops.sparsec.install_packed(meta_tensor, facts, x_number, table, dense)


def _route(meta: Meta, loop: str, m_lo: int, m_hi: int) -> list[int]:
    spec = KernelSpec.on(targets.resolve(meta.target), Format.parse(meta.format), loop, meta.dtype)
    # a stand-in with the right counts: the op reads the tensors themselves at each call
    work = torch.empty(meta.tiles + 1)
    counts = Packed(spec.format, meta.version, (work,) * meta.tensors, work, (meta.n, meta.k), "")
    return route(m_lo, m_hi, build.build(spec, cache_dir(_cache[-1])), counts, 0)


def _verifying() -> bool:
    return os.environ.get("SPARSEC_VERIFY", "0") not in ("", "0")


def reference(x: torch.Tensor | None, bias: torch.Tensor | None, pack: list[torch.Tensor]) -> torch.Tensor:
    """x @ W.T + bias by plain torch, where no kernel can be made; W itself where there is no x."""
    if x is None:
        return unpacked(pack)
    meta = Meta.decode(pack[0])
    if meta.x:
        scale = scale_in(meta.x)
        x = quantized(x, None if scale is None else torch.tensor(scale))
    return torch.nn.functional.linear(x, unpacked(pack), bias)


def verify(x: torch.Tensor, bias: torch.Tensor | None, pack: list[torch.Tensor], y: torch.Tensor) -> None:
    """Compare one result with the reference. Raises VerifyError."""
    meta = Meta.decode(pack[0])
    plan = Plan(f"a packed layer ({meta.format})", meta.format, Policy(), x=meta.x)
    STORE.verify(x, unpacked(pack), bias, y, plan.encode(), meta.x_code)


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
