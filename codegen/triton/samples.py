"""One small weight of every format, and every kernel on it as launches: for compiling offline, gates and tests.

A sample has the widths of a real layer, since what Triton makes of a kernel depends on what it can divide by 16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from sparsec.codegen.spec import Packed
from sparsec.codegen.triton import FAMILIES, GATES, family, pack_verified
from sparsec.codegen.triton.contract import Call, Family
from sparsec.codegen.triton.launch import Launch
from sparsec.formats import Format, value_kind

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = (1, 4, 16, 64, 2048)  # of x: decode, small batches, prefill
N, K = 256, 1024
LARGE = 2048, 4096  # of kernels whose configuration follows the size of the weight; N, K of all others
DENSITIES = (0.3, 0.6)
FREE = ("bitmap", "index", "block")  # patterns that hold weights of any density


@dataclass(frozen=True)
class Sample:
    """One kernel on one format. ``m``: rows of x. ``launches``: the weight's reader first."""

    format: str
    loop: str
    m: int
    launches: tuple[Launch, ...]
    stored: tuple[float, float] = (0.0, 0.0)  # bytes of the pack for each position, and for each non-zero weight

    @property
    def name(self) -> str:
        return f"{self.format} {self.loop} M={self.m}"


def samples(capability: int = 90, kinds: tuple[str, ...] = (), rows: tuple[int, ...] = ROWS) -> Iterator[Sample]:
    """Every family x format x loop that runs on sm_``capability``, at each of ``rows`` that the loop takes."""
    for kind in kinds or (*FAMILIES, *GATES):
        chosen = family(kind)
        for name in chosen.formats:
            format = Format.parse(name)
            packed, stored = _packed(format, next(iter(chosen.loops)))
            for loop, most in chosen.loops.items():
                for m in (m for m in rows if not most or m <= most):
                    yield Sample(name, loop, m, _launches(chosen, packed, loop, m, capability), stored)


@functools.lru_cache(maxsize=64)
def _packed(format: Format, loop: str) -> tuple[Packed, tuple[float, float]]:
    """The pack of a sample, and what positions and values take: solved from two densities where those are free."""
    densities = DENSITIES if format.pattern.kind in FREE else DENSITIES[:1]
    n, k = LARGE if format.pattern.kind == "panel" else (N, K)
    weights = [sample_weight(format, n, k, density) for density in densities]
    packs = [pack_verified(weight, format, "sample", loop) for weight in weights]
    kept = [int(weight.count_nonzero()) for weight in weights]
    if len(packs) == 1:
        size = packs[0].bytes or weights[0].nbytes  # no pack: the kernel reads the weight itself
        return packs[0], (0.0, size / kept[0])
    value = (packs[1].bytes - packs[0].bytes) / (kept[1] - kept[0])
    position = (packs[0].bytes - value * kept[0]) / (n * k)
    return packs[0], (max(position, 0.0), value)


def _launches(chosen: Family, packed: Packed, loop: str, m: int, capability: int) -> tuple[Launch, ...]:
    dtype = x_dtype(packed.format)
    n, k = packed.shape
    call = Call(
        torch.zeros(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype), capability=capability,
        weight=torch.zeros(n, k, dtype=dtype), needed=torch.zeros(m, n, dtype=dtype),
    )  # fmt: skip
    config = chosen.configs(packed, loop, m, capability)[0]
    return tuple(cast("Sequence[Launch]", chosen.launches(packed, loop, call, config)))


def x_dtype(format: Format) -> torch.dtype:
    """Of x and y where a format does not say it: bf16 for quantised values."""
    return DTYPES.get(format.values, torch.bfloat16)


def sample_weight(format: Format, n: int = N, k: int = K, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    """A random [n, k] weight that holds the format's pattern and values, in the dtype of its x."""
    generator = torch.Generator().manual_seed(seed)
    keep = _positions(format, n, k, density, generator)
    return (_values(format, n, k, generator) * keep).to(x_dtype(format))


def named_weight(name: str, n: int, k: int, density: float = 0.3, seed: int = 0, drawn: int = 0) -> torch.Tensor:
    """The sample weight of a format. ``drawn``: rows that are random, which all others repeat (0: all)."""
    part = sample_weight(Format.parse(name), min(n, drawn or n), k, density, seed)
    return part.repeat(-(-n // len(part)), 1)[:n].contiguous() if len(part) < n else part


def _positions(format: Format, n: int, k: int, density: float, generator: torch.Generator) -> torch.Tensor:
    kind, params = format.pattern.kind, format.pattern.params
    if kind in ("dense", "panel"):
        return torch.ones(n, k)
    score = torch.rand(n, k, generator=generator)
    if kind == "nm":
        return _best(score, *params)
    if kind == "vnm":
        v, most, m = params
        blocks = torch.rand(-(-n // v), k, generator=generator)
        columns = _best(blocks, 4, m).repeat_interleave(v, 0)[:n]
        return _best(score * columns, most, m) * columns
    if kind == "block":
        rows, cols = params
        few = torch.rand(-(-n // rows), -(-k // cols), generator=generator) < density
        return few.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k].float()
    return (score < density).float()


def _best(score: torch.Tensor, most: int, m: int) -> torch.Tensor:
    """1 for the ``most`` largest of each ``m`` in a row; a last group that is narrower keeps at most as many."""
    n, k = score.shape
    padded = torch.nn.functional.pad(score, (0, -k % m), value=-1.0).view(n, -1, m)
    kept = torch.zeros_like(padded).scatter_(2, padded.topk(most, dim=2).indices, 1.0)
    return kept.view(n, -1)[:, :k]


def _values(format: Format, n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Non-zero values of the format's kind."""
    kind, group = value_kind(format.values)
    sign = torch.randint(0, 2, (n, k), generator=generator) * 2.0 - 1.0
    if kind == "ternary":
        return sign * (0.5 + torch.rand(n, 1, generator=generator)).bfloat16().float()
    if kind == "codebook":
        levels = torch.randn(n, 15, generator=generator).bfloat16().float() + 0.01
        return levels.gather(1, torch.randint(0, 15, (n, k), generator=generator))
    if kind == "fp8":
        mantissa, exponent = (
            torch.randint(8, 15, (n, k), generator=generator),
            torch.randint(0, 6, (n, k), generator=generator),
        )
        q = mantissa * 2.0**exponent * sign  # 8 .. 448, each exact in e4m3
        return q * 2.0 ** torch.randint(-15, -11, (n, 1), generator=generator).float()
    if kind in ("int8", "int4"):
        top = 127 if kind == "int8" else 7
        size = group or k
        scale = 2.0 ** torch.randint(-8, -4, (n, -(-k // size)), generator=generator).float()  # exact in 16 bits
        q = torch.randint(1, top + 1, (n, k), generator=generator) * sign
        q[:, ::size] = top * sign[:, ::size]  # each group reaches its largest step
        return q * scale.repeat_interleave(size, 1)[:, :k]
    return sign * (0.1 + torch.rand(n, k, generator=generator))
