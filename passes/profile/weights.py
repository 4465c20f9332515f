"""Everything that one weight's values say: a tensor [N, K] in, a ``WeightFact`` out.

The weight is read once, in bands of rows: the zero pattern becomes one bit a weight (``bits.py`` counts patterns on
those), and signs of zero, non-finite values and the value set (``values.py``) are looked at on the way. Facts are kept
in memory by content, so tied or repeated weights are profiled once.

Only facts that say something are reported. A dense matrix "is" 4:4 and a 95 % zero random one is nearly always 8:16:
a pattern that chance alone gives, and that would be packed with more padding than values, is not a fact.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from sparsec.facts import BlockFact, NMFact, VNMFact, WeightFact
from sparsec.passes.profile import bits, values

NM_SHAPES = (
    (1, 2),
    (1, 4),
    (2, 4),
    (3, 4),
    (1, 8),
    (2, 8),
    (4, 8),
    (6, 8),
    (2, 16),
    (4, 16),
    (8, 16),
    (4, 32),
    (8, 32),
    (16, 32),
)
VNM_SHAPES = tuple((v, 2, m) for m in (8, 16, 32) for v in (128, 64, 32))  # VENOM (Castro et al., 2023), table 1
BLOCK_SHAPES = (
    (4, 1), (8, 1), (16, 1), (32, 1), (1, 4), (1, 8), (1, 16), (1, 32), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64),
)  # fmt: skip
NEAR = 0.10  # a pattern that more than this share of groups breaks is not "near"
_BAND = 1 << 20  # weights read in one step: 4 MB of fp32 stays in the cache for all the questions asked of it
_KEPT_FACTS = 4096

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_facts: OrderedDict[str, WeightFact] = OrderedDict()


def profile(weight: torch.Tensor) -> WeightFact:
    """The facts of a weight [N, K] of any floating dtype, layout or grad mode. Raises ValueError unless it is 2-D."""
    key = content_key(weight)
    if key in _facts:
        _facts.move_to_end(key)
        return _facts[key]
    fact = _measure(weight.detach(), key)
    _facts[key] = fact
    while len(_facts) > _KEPT_FACTS:
        _facts.popitem(last=False)
    return fact


def content_key(tensor: torch.Tensor) -> str:
    """Hash of dtype, shape and values in logical order; a transposed view and its contiguous copy have the same key."""
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    rows = tensor.detach().reshape(tensor.shape[0], -1) if tensor.numel() else tensor.detach().reshape(0, 1)
    step = max(_BAND // max(rows.shape[1], 1), 1)
    bands = range(0, rows.shape[0], step)
    whole = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    # Bands hash independently (hashlib lets go of the GIL), so the key does not depend on how many threads there were.
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), 8))) as pool:
        for part in pool.map(lambda begin: _band_hash(rows[begin : begin + step]), bands):
            whole.update(part)
    return whole.hexdigest()


def _band_hash(band: torch.Tensor) -> bytes:
    return hashlib.blake2b(_bytes(band).data, digest_size=16).digest()


def _bytes(band: torch.Tensor) -> npt.NDArray[np.uint8]:
    flat = band.to("cpu").contiguous().view(-1)
    array: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array


@torch.no_grad()
def _measure(weight: torch.Tensor, key: str) -> WeightFact:
    if weight.dim() != 2:
        raise ValueError(f"a weight to profile has two dimensions, this one has shape {tuple(weight.shape)}")
    n, k = weight.shape
    mask, negative_zeros, nonfinite = _read(weight)
    counts = bits.row_counts(mask)
    nnz = int(counts.sum())
    density = nnz / max(n * k, 1)
    used_columns = int(np.bitwise_count(bits.column_union(mask)).sum())
    tenths = np.minimum(counts * 10 // max(k, 1), 9)
    return WeightFact(
        key=key,
        n=n,
        k=k,
        dtype=_DTYPES.get(weight.dtype, str(weight.dtype).removeprefix("torch.")),
        nnz=nnz,
        row_nnz_min=int(counts.min()) if n else 0,
        row_nnz_max=int(counts.max()) if n else 0,
        row_hist=tuple(int(c) for c in np.bincount(tenths, minlength=10)),
        zero_rows=int(np.count_nonzero(counts == 0)),
        zero_cols=k - used_columns,
        negative_zeros=negative_zeros,
        nonfinite=nonfinite,
        nm=_nm_facts(mask, k, nnz, density),
        vnm=_vnm_facts(mask, k, nnz, density),
        blocks=_block_facts(mask, k, nnz, density),
        values=values.value_set(weight, nnz, key) if not nonfinite else values.REAL,
        thumbnail=bits.thumbnail(mask, n, k),
    )


def _read(weight: torch.Tensor) -> tuple[bits.Mask, int, int]:
    """One pass: the packed mask, how many zeros are -0.0, how many values are inf or NaN (those count as kept)."""
    n, k = weight.shape
    mask = np.zeros((n, bits.row_bytes(k)), np.uint8)
    negative_zeros = nonfinite = 0
    step = max(_BAND // max(k, 1), 1)
    for begin in range(0, n, step) if k else ():
        band = weight[begin : begin + step].to("cpu").contiguous()
        kept = band != 0
        mask[begin : begin + step, : -(-k // 8)] = np.packbits(kept.numpy(), axis=1, bitorder="little")
        if not band.dtype.is_floating_point:
            continue
        if not torch.isfinite(band.sum()):  # cheap and never wrong: a finite sum has finite terms
            nonfinite += int(torch.count_nonzero(~torch.isfinite(band)))
        minus = _is_minus_zero(band)
        if bool(minus.any()):
            negative_zeros += int(torch.count_nonzero(minus))
    return mask, negative_zeros, nonfinite


def _is_minus_zero(band: torch.Tensor) -> torch.Tensor:
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(band.element_size())
    if as_int is None:
        return torch.signbit(band.float()) & (band.float() == 0)
    return band.view(as_int) == torch.iinfo(as_int).min


def _says_something(broken: int, total: int, by_chance: float, filled: float) -> bool:
    """A pattern worth reporting: ``broken`` of ``total`` groups, against ``by_chance`` of a random mask as dense."""
    if broken == 0:
        return by_chance >= 20 or filled >= 0.5  # chance gives none where it should give twenty: once in 10^9
    return broken <= NEAR * total and broken <= 0.5 * by_chance


def _nm_facts(mask: bits.Mask, k: int, nnz: int, density: float) -> tuple[NMFact, ...]:
    if not 0 < density < 1:
        return ()
    found = []
    histograms = {m: bits.group_histogram(mask, k, m) for m in sorted({m for _, m in NM_SHAPES})}
    for n, m in NM_SHAPES:
        groups = sum(histograms[m])
        broken = sum(histograms[m][n + 1 :])
        by_chance = groups * bits.chance_over(m, n, density)
        if m <= k and _says_something(broken, groups, by_chance, nnz / (groups * n)):
            found.append(NMFact(n, m, groups, broken))
    return tuple(sorted(found, key=lambda f: (not f.exact, f.n / f.m, f.m)))


def _vnm_facts(mask: bits.Mask, k: int, nnz: int, density: float) -> tuple[VNMFact, ...]:
    if not 0 < density < 1:
        return ()
    found: dict[int, VNMFact] = {}
    for v, n, m in VNM_SHAPES:
        rows = mask.shape[0]
        if m in found or m > k or v > rows or density > 1.1 * n / m:  # the tallest that holds implies the others
            continue
        blocks = -(-rows // v) * -(-k // m)
        broken = bits.vnm_violations(mask, v, n, m)
        by_chance = blocks * bits.chance_over(m, 4, 1 - (1 - density) ** v)
        if _says_something(broken, blocks, by_chance, nnz / (rows * -(-k // m) * n)):
            found[m] = VNMFact(v, n, m, blocks, broken)
    return tuple(sorted(found.values(), key=lambda f: (not f.exact, f.n / f.m)))


def _block_facts(mask: bits.Mask, k: int, nnz: int, density: float) -> tuple[BlockFact, ...]:
    if not 0 < density < 1:
        return ()
    n = mask.shape[0]
    found = []
    for rows, cols in BLOCK_SHAPES:
        if rows > n or cols > k:
            continue
        total = -(-n // rows) * -(-k // cols)
        by_chance = total * (1 - (1 - density) ** (rows * cols))
        used, area = bits.block_counts(mask, n, k, rows, cols)
        if used < total and used <= (1 - NEAR) * by_chance:
            found.append(BlockFact(rows, cols, total, used, nnz / area))
    return tuple(found)
