"""Calls into ``packer.cpp``: a dense weight comes in, the arrays of a layout go out."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sparsec.cache import cache_dir
from sparsec.codegen.build import compile_shared
from sparsec.codegen.cpp.compose import part

TILE = 16  # rows of W in a tile
GROUP = 4  # rows of W that share a bitmap stream
CHUNK = 128  # columns of W that are worked on together
PAD_BYTES = 64  # kernels may read a vector past the last value

VALUE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_library: list[ctypes.CDLL] = []


def load(cache: Path | None = None) -> ctypes.CDLL:
    """The compiled packer, built into ``cache`` (the user's cache directory unless given) when first needed."""
    if not _library:
        flags = ("-std=c++17", "-O3", "-fvisibility=hidden")
        path = compile_shared(part("packer.cpp"), "packer", flags, cache or cache_dir())
        _library.append(ctypes.CDLL(str(path)))
    return _library[0]


def checked(weight: torch.Tensor, values: str) -> torch.Tensor:
    """The weight as the packer reads it: on the CPU, [N, K], contiguous, of the value type's dtype."""
    if weight.dim() != 2 or weight.dtype != VALUE_DTYPES[values] or weight.device.type != "cpu":
        raise ValueError(f"a [N, K] {values} weight on the CPU is needed, not {tuple(weight.shape)} {weight.dtype}")
    return weight.detach().contiguous()


def padded(count: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised vector of ``count`` elements with ``PAD_BYTES`` of zeros behind them."""
    pad = PAD_BYTES // torch.empty(0, dtype=dtype).element_size()
    tensor = torch.empty(count + pad, dtype=dtype)
    tensor[count:] = 0
    return tensor


def prefix(counts: torch.Tensor) -> torch.Tensor:
    """[n] -> [n + 1]: sums of what comes before, int64."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.to(torch.int64).cumsum(0)])


def _in_threads(total: int, work: Callable[[int, int], None]) -> None:
    threads = min(torch.get_num_threads(), max(1, total // 8))
    bounds = [total * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, total)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _p(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_i64 = ctypes.c_int64


def pack_bitmap(
    weight: torch.Tensor, fill: tuple[int, int] = (0, 0)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(masks int32 [groups * words * 4], values padded, start int64 [groups + 1]) of a checked weight.

    ``fill`` = (n, m): zeros are kept until every group of m columns holds n (m must divide 32).
    """
    library, (n, k) = load(), weight.shape
    groups = -(-n // TILE) * (TILE // GROUP)
    bits = 8 * weight.element_size()
    kept = torch.empty(groups, dtype=torch.int64)

    def call(begin: int, end: int, *out: torch.Tensor | None) -> None:
        library.sparsec_pack_bitmap(
            _p(weight), bits, _i64(n), _i64(k), _i64(begin), _i64(end), *fill, _p(kept), *(_p(t) for t in out)
        )

    _in_threads(groups, functools.partial(_swap, call, (None, None, None)))
    start = prefix(kept)
    masks = torch.empty(groups * -(-k // 32) * GROUP, dtype=torch.int32)
    values = padded(int(start[-1]), weight.dtype)
    _in_threads(groups, functools.partial(_swap, call, (start, masks, values)))
    return masks, values, start


def pack_sliced(weight: torch.Tensor, share: int) -> tuple[torch.Tensor, ...]:
    """(values, positions uint8, lanes uint8, heads uint8, start int64 [tiles + 1, 2]) of a checked weight."""
    library, (n, k) = load(), weight.shape
    tiles = -(-n // TILE)
    bits = 8 * weight.element_size()
    sizes = torch.empty(tiles, 2, dtype=torch.int64)

    def call(begin: int, end: int, *out: torch.Tensor | None) -> None:
        library.sparsec_pack_sliced(
            _p(weight), bits, _i64(n), _i64(k), _i64(begin), _i64(end), share, _p(sizes), *(_p(t) for t in out)
        )

    _in_threads(tiles, functools.partial(_swap, call, (None, None, None, None, None)))
    start = torch.cat([torch.zeros(1, 2, dtype=torch.int64), sizes.cumsum(0)])
    values = padded(int(start[-1, 0]), weight.dtype)
    positions = padded(int(start[-1, 0]) // share, torch.uint8)
    lanes = padded(int(start[-1, 1]), torch.uint8)
    heads = padded(tiles * -(-k // CHUNK) * 9, torch.uint8)
    _in_threads(tiles, functools.partial(_swap, call, (start, values, positions, lanes, heads)))
    return values, positions, lanes, heads, start


def _swap(
    call: Callable[..., None], out: tuple[torch.Tensor | None, ...], begin: int, end: int
) -> None:  # lets a pool map over (begin, end)
    call(begin, end, *out)
