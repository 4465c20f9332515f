"""Call a kernel through its C interface, without the runtime: for tests, tuning and looking at one kernel alone."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import torch

from sparsec.codegen import reference
from sparsec.codegen.cpp import packer
from sparsec.codegen.spec import ACTS, Kernel, Packed


class Call(ctypes.Structure):
    """``struct SparsecCall`` of ``cpp/abi.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("pack", ctypes.POINTER(ctypes.c_void_p)),
        ("scratch", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("act", ctypes.c_int32),
        ("x_scale", ctypes.c_float),
        ("active", ctypes.c_void_p),
        ("active_count", ctypes.c_int64),
    )


_sizes = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_work = ctypes.CFUNCTYPE(None, ctypes.POINTER(Call), ctypes.c_int64, ctypes.c_int64)


def bounds(packed: Packed, shares: int) -> list[int]:
    """[shares + 1] tile numbers that split ``packed`` into parts of about equal cost."""
    goals = torch.arange(shares + 1) * int(packed.work[-1]) // shares
    cuts = torch.searchsorted(packed.work[:-1].contiguous(), goals).tolist() if packed.work.numel() > 1 else []
    return [0, *cuts[1:-1], packed.work.numel() - 1]


def prepared(
    kernel: Kernel,
    packed: Packed,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    act: str,
    y: torch.Tensor,
    x_scale: float = 0.0,
    active: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> Callable[..., None]:
    """A function that runs the kernel once on these tensors. ``run(pool, cuts)`` hands the parts of the tiles between
    neighbouring cuts to a pool; without a pool they run one after the other.

    x: [M, K] with unit inner stride, y: [M, N] likewise, bias [N] or None, all of the kernel's dtype. ``x_scale``,
    ``active``: see ``linear``.
    """
    m, k = x.shape
    n = packed.shape[0]
    # NaN in every dtype: a kernel that multiplies what it has not written shows it
    scratch = torch.full((max(_sizes(kernel.scratch)(m, k), 1),), 0xFF, dtype=torch.uint8)
    tensors = packed.tensors if weight is None or packed.tensors else (weight,)
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    call = Call(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        y=y.data_ptr(),
        y_stride=y.stride(0),
        bias=None if bias is None else bias.data_ptr(),
        pack=pointers,
        scratch=scratch.data_ptr(),
        m=m,
        n=n,
        k=k,
        act=ACTS.index(act),
        x_scale=x_scale,
        active=None if active is None else active.data_ptr(),
        active_count=0 if active is None else active.numel(),
    )
    prepare, tiles = _work(kernel.prepare), _work(kernel.run)
    units = _sizes(kernel.prepare_units)(m, k)
    last = packed.work.numel() - 1 if kernel.spec.loop != "select" else -(-call.active_count // packer.TILE)
    keep = (scratch, pointers, x, y, bias, packed, active, weight)

    def run(pool: Executor | None = None, cuts: Sequence[int] = ()) -> None:
        assert keep
        prepare(ctypes.byref(call), 0, units)
        if pool is None:
            for begin, end in itertools.pairwise(cuts or (0, last)):
                tiles(ctypes.byref(call), begin, end)
            return
        for done in [pool.submit(tiles, ctypes.byref(call), a, b) for a, b in itertools.pairwise(cuts)]:
            done.result()

    return run


def linear(
    kernel: Kernel,
    packed: Packed,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "",
    x_scale: float = 0.0,
    active: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(x @ W.T + bias) by ``kernel`` on one thread: [M, K] -> [M, N], in x's dtype.

    ``x_scale``: the static scale of a kernel that rounds x to int8; 0 lets every row of x have its own. ``active``:
    int32, ascending, the outputs that a kernel of the loop ``select`` computes, all others are 0; one that skips
    columns is told those of x that are not zero. ``weight``: [N, K], for packs without tensors.
    """
    y = torch.zeros(x.shape[0], packed.shape[0], dtype=x.dtype)
    if kernel.spec.loop == "skip":
        active = reference.active_columns(x)
    prepared(kernel, packed, x, bias, act, y, x_scale, active, weight)()
    return y
