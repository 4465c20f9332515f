"""What analysis found out. Frozen, hashable, JSON-able with ``dataclasses.asdict``; no tensors.

Orientation: a weight fact describes the matrix as [N, K] = [out_features, in_features], whatever the parameter's own
layout (HF ``Conv1D`` and ``x @ W`` keep it as [K, N]; ``Site.transposed`` says so). A convolution's [N, C, high, wide]
is the matrix [N, high * wide * C], with the weights of a row in the order in which a patch of an NHWC image lies in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Declined:
    """Why something was not taken: one sentence for people, and the graph node or layer it is about."""

    reason: str
    node: str = ""
    fqn: str = ""
    op: str = ""

    def __bool__(self) -> bool:  # lets a check read `if declined := check(...)`
        return True


@dataclass(frozen=True)
class ActFact:
    """What is known of the zeros of an activation from the graph alone: top > nonnegative > likely > exact.

    ``state``: ``top`` nothing; ``nonnegative`` no value below zero (NaN aside); ``likely`` an operation puts exact
    zeros where the data says, how many is not known; ``exact`` how many, at least, is known by construction.
    ``origin``: what makes the zeros, in words: ``relu``, ``threshold``, ``top-k``, ``2:4 of activations``, ``mask``,
    ``product with relu(gate_proj)``. ``node``: the node that makes them, of the same shape: where it is zero, the value
    is. ``pattern``: "" anywhere; ``topk:64`` at most 64 kept in each row of the last dimension; ``nm:2:4`` at most 2
    kept in each 4 of it; ``channels`` the same places in every row. ``rate``: share of zeros, at least, 0 to 1; None
    where construction does not say. ``nonnegative``: beside whatever the state says of zeros.
    """

    state: str = "top"
    origin: str = ""
    node: str = ""
    pattern: str = ""
    rate: float | None = None
    nonnegative: bool = False

    @property
    def zeros(self) -> bool:
        """Something puts exact zeros there: ``likely`` or ``exact``."""
        return self.state in ("likely", "exact")

    @property
    def depth(self) -> int:
        """Place in the order: 0 for top, 3 for exact."""
        return ACT_STATES.index(self.state)

    def meet(self, other: ActFact) -> ActFact:
        """What is known where both statements hold; of two alike, the one that knows more, then the first."""
        best = max(self, other, key=lambda f: (f.depth, bool(f.pattern), f.rate or 0.0))
        return replace(best, nonnegative=self.nonnegative or other.nonnegative).settled()

    def join(self, other: ActFact) -> ActFact:
        """What is known where only one of both holds, and nobody knows which."""
        nonnegative = self.nonnegative and other.nonnegative
        if not (self.zeros and other.zeros):
            return ActFact(nonnegative=nonnegative).settled()
        rates = [f.rate for f in (self, other) if f.rate is not None]
        pattern = self.pattern if self.pattern == other.pattern else ""
        rate = min(rates) if len(rates) == 2 else None
        origin = self.origin if self.origin == other.origin else f"{self.origin} or {other.origin}"
        node = self.node if self.node == other.node else ""
        both = self.state == other.state == "exact" and (pattern or rate is not None)
        return ActFact("exact" if both else "likely", origin, node, pattern, rate, nonnegative)

    def settled(self) -> ActFact:
        """The same, with the state between top and nonnegative that its sign says where it knows of no zeros."""
        return (
            self if self.zeros else ActFact("nonnegative" if self.nonnegative else "top", nonnegative=self.nonnegative)
        )


@dataclass(frozen=True)
class Rates:
    """Shares of zeros, 0 to 1, that ``sparsec.calibrate`` counted in what one weight [N, K] reads. ``key``: as in
    ``WeightFact``. ``zeros``: of all values, so what one token can skip. ``rows``: (M, share of channels that are zero
    in all of M tokens in a row) for a few M. ``channels``: by channel, K of them, rounded down to 4 digits.
    """

    key: str
    origin: str
    tokens: int
    zeros: float
    rows: tuple[tuple[int, float], ...] = ()
    channels: tuple[float, ...] = ()
    when: float = 0.0  # seconds since 1970

    def at(self, rows: int) -> float:
        """The share of channels that M = ``rows`` tokens can skip together; beyond what was counted, as if tokens
        were independent of each other, and never more than was counted."""
        counted = ((1, self.zeros), *self.rows)
        larger = next((share for m, share in counted if m >= rows), None)
        if larger is not None:
            return larger
        alone = sum(share**rows for share in self.channels) / max(len(self.channels), 1)
        return min(alone, counted[-1][1])


ACT_STATES = ("top", "nonnegative", "likely", "exact")


@dataclass(frozen=True)
class Conv:
    """How a convolution walks over its images, which makes it a product with the rows of their patches.

    ``kernel``, ``stride``, ``dilation``: (high, wide). ``padding``: zeros (above, below, left, right). ``image``: the
    (B, H, W) of its input, where they are known, else ().
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    image: tuple[int, ...] = ()

    @property
    def pointwise(self) -> bool:
        """Whether patches are the pixels as they lie: a linear over channels."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Everything but the image, in the order of ``Walk`` in ``runtime/table.h``."""
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Conv:
        """From ``numbers`` and, behind them, those of the image."""
        a, b, c, d, e, f, g, h, i, j, *image = numbers
        return cls((a, b), (c, d), (e, f, g, h), (i, j), tuple(image))

    def size(self, high: Any, wide: Any) -> tuple[Any, Any]:
        """(high, wide) of the result for an image of that size; symbolic sizes too."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        above, below, left, right = self.padding
        rows = (high + above + below - spans[0]) // self.stride[0] + 1
        return rows, (wide + left + right - spans[1]) // self.stride[1] + 1

    @property
    def rows(self) -> int:
        """Patches of all images: rows of x as the product sees it; 0 where the images are not known."""
        if not self.image:
            return 0
        high, wide = self.size(*self.image[1:])
        return int(self.image[0] * high * wide)

    def about(self, m: int) -> Conv:
        """The same walk over images that give about ``m`` rows: as many of the known size as that takes, else one whose
        result is as square as can be."""
        if self.rows:
            each = self.rows // self.image[0]
            return replace(self, image=(max(1, round(m / each)), *self.image[1:]))
        high = max(1, math.isqrt(m))
        wide = max(1, m // high)
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        above, below, left, right = self.padding
        sizes = (high - 1) * self.stride[0] + spans[0] - above - below, (wide - 1) * self.stride[1] + spans[1]
        return replace(self, image=(1, max(1, sizes[0]), max(1, sizes[1] - left - right)))

    def __str__(self) -> str:
        """``3x3 s2x2 p1,1,1,1 d1x1 on 8x56x56``, for names and keys."""
        parts = ["{}x{}".format(*self.kernel), "s{}x{}".format(*self.stride), f"p{','.join(map(str, self.padding))}"]
        parts.append("d{}x{}".format(*self.dilation))
        return " ".join([*parts, *(["on " + "x".join(map(str, self.image))] if self.image else [])])


@dataclass(frozen=True)
class Site:
    """One linear-type operation of the graph that can be rewritten.

    ``kind``: linear, matmul, addmm, conv2d, hf_conv1d. ``weight`` and ``bias`` name placeholders. ``x_shape``: of x as
    the product reads it, [..., K]; of a convolution that is the patches, (B, high, wide, K). It has integers, or the
    text of a symbolic size. ``dtype`` is that of x and of the result (``fp32`` or ``bf16``).
    ``group`` is shared by sites that read the same x and are called together (q/k/v, gate/up).
    ``x``: how x is quantised before the product: "" not at all, ``int8`` (a scale for each token), ``int8:min=1e-07``
    (no scale less than that), ``int8:0.05`` (one scale), ``int8:given`` (one scale, which is a graph input).
    ``w``: how the weight is computed from stored tensors, as text; "" where it is one. ``weight`` is the first of them
    then, and ``parts`` are all. ``reads``: the node of x, before it is quantised.
    ``gate``: what the graph says of the zeros of x (None: of no zeros). ``needed``: a node whose zeros are places of
    the result that nobody reads, "" where all may be read; its last size is N, its others are those of the result or
    broadcast to them (of a convolution its shape is the result's), and it may come after the site in the graph, though
    it does not depend on it. ``needed_fact``: what is known of its zeros.
    """

    node: str
    kind: str
    weight: str
    bias: str | None
    x_shape: tuple[int | str, ...]
    n: int
    k: int
    dtype: str
    fqn: str
    transposed: bool = False
    act: str = ""
    group: str = ""
    x: str = ""
    w: str = ""
    parts: tuple[str, ...] = ()
    reads: str = ""
    gate: ActFact | None = None
    needed: str = ""
    needed_fact: ActFact | None = None
    conv: Conv | None = None


@dataclass(frozen=True)
class NMFact:
    """Groups of ``m`` along K that keep at most ``n``. Exact when ``violations`` is zero; else near N:M."""

    n: int
    m: int
    groups: int
    violations: int

    @property
    def exact(self) -> bool:
        return self.violations == 0

    @property
    def share(self) -> float:
        """Share of groups that follow the pattern, 0 to 1."""
        return 1.0 - self.violations / max(self.groups, 1)


@dataclass(frozen=True)
class VNMFact:
    """V:N:M: blocks of ``v`` rows x ``m`` columns use at most 4 columns, and N:4 inside them (VENOM, 2023)."""

    v: int
    n: int
    m: int
    blocks: int
    violations: int

    @property
    def exact(self) -> bool:
        return self.violations == 0


@dataclass(frozen=True)
class BlockFact:
    """Blocks of ``rows`` x ``cols``: ``nonzero`` of ``total`` hold anything; ``fill`` is the density inside those."""

    rows: int
    cols: int
    total: int
    nonzero: int
    fill: float


@dataclass(frozen=True)
class ValueFact:
    """What the kept values look like: ``real``, ``ternary``, ``codebook`` (few levels), ``grid`` (int x scale).

    ``levels``: distinct values (0 when more than were counted); ``row_levels``: most in a row (0: more than 16).
    ``bits`` and ``group``: for ``grid``. ``exact``: codes of 2, 4 or 8 bits and a scale for each group were proven to
    give every value back.
    """

    kind: str = "real"
    levels: int = 0
    bits: int = 0
    group: int = 0
    exact: bool = False
    row_levels: int = 0


@dataclass(frozen=True)
class WeightFact:
    """Everything known about one weight matrix [N, K] from its values alone. ``key`` is a content hash."""

    key: str
    n: int
    k: int
    dtype: str
    nnz: int
    row_nnz_min: int
    row_nnz_max: int
    row_hist: tuple[int, ...]  # rows per tenth of density: [0, .1), [.1, .2), ... [.9, 1]
    zero_rows: int
    zero_cols: int
    negative_zeros: int
    nonfinite: int
    nm: tuple[NMFact, ...] = ()
    vnm: tuple[VNMFact, ...] = ()
    blocks: tuple[BlockFact, ...] = ()
    values: ValueFact = ValueFact()
    thumbnail: tuple[int, ...] = ()  # 16 x 16 mean density in percent, row-major, for pictures

    @property
    def density(self) -> float:
        """Share of non-zeros, 0 to 1 (0 for an empty matrix)."""
        return self.nnz / max(self.n * self.k, 1)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def rows_equal(self) -> bool:
        """Every row keeps the same number of weights (Wanda, RIA per output neuron)."""
        return self.row_nnz_min == self.row_nnz_max

    def nm_fact(self, n: int, m: int) -> NMFact | None:
        return next((f for f in self.nm if (f.n, f.m) == (n, m)), None)

    def block_fact(self, rows: int, cols: int) -> BlockFact | None:
        return next((f for f in self.blocks if (f.rows, f.cols) == (rows, cols)), None)


@dataclass(frozen=True)
class Candidate:
    """One way to run a site. ``format`` is a ``Format`` name, or ``dense``; ``kernel`` the loop (``dot``, ``outer``).

    ``bytes``: weight bytes read per call. ``cost``: seconds as text of a sympy expression in ``M`` (rows of x).
    """

    format: str
    kernel: str
    bytes: int
    cost: str
    exactness: str = "reassociation"


@dataclass(frozen=True)
class Range:
    """For ``m_lo <= M <= m_hi`` (None: no bound) run ``format`` with ``kernel``. Times in seconds at ``m_lo``.

    ``below``: only calls of which at most this share of columns (or wanted rows) is left by the zeros of activations.
    """

    m_lo: int
    m_hi: int | None
    format: str
    kernel: str
    dense_s: float
    ours_s: float
    below: float = 1.0

    def holds(self, m: int) -> bool:
        return self.m_lo <= m and (self.m_hi is None or m <= self.m_hi)


@dataclass(frozen=True)
class Decision:
    """The plan for one weight: ranges of M that cover 1..infinity, one sentence why, and what it rests on.

    ``break_even``: sparsity from which the best sparse candidate would win at M=1 on this target (None: never).
    ``source``: ``model`` (cost model), ``measured`` (tuned), ``forced`` (min_speedup=0), ``fallback`` (a failure).
    ``gated``: what serves calls whose activations are sparse enough, before ``ranges`` are asked.
    """

    ranges: tuple[Range, ...]
    reason: str
    break_even: float | None = None
    source: str = "model"
    candidates: tuple[Candidate, ...] = ()
    near: str = ""  # "near 2:4 (97.3 % of groups; 1812 break it)"
    help: str = ""  # what the user could change, e.g. "2:4 would give 1.7x"
    gated: tuple[Range, ...] = ()

    def at(self, m: int) -> Range:
        return next((r for r in self.ranges if r.holds(m)), self.ranges[-1])

    @property
    def ours(self) -> bool:
        """Some M runs on one of our kernels: a sparse format, or dense weights in panels."""
        return bool(self.gated) or self.ranged

    @property
    def ranged(self) -> bool:
        """Some M does so whatever the activations are."""
        return any(r.format != "dense" for r in self.ranges)
