"""What analysis found out. Frozen, hashable, JSON-able with ``dataclasses.asdict``; no tensors.

Orientation: a weight fact describes the matrix as [N, K] = [out_features, in_features], whatever the parameter's own
layout (HF ``Conv1D`` and ``x @ W`` keep it as [K, N]; ``Site.transposed`` says so).
"""

from __future__ import annotations

from dataclasses import dataclass


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
class Site:
    """One linear-type operation of the graph that can be rewritten.

    ``kind``: linear, matmul, addmm, conv1x1, hf_conv1d. ``weight`` and ``bias`` name placeholders. ``x_shape`` has
    integers, or the text of a symbolic size. ``dtype`` is that of x and of the result (``fp32`` or ``bf16``).
    ``group`` is shared by sites that read the same x and are called together (q/k/v, gate/up).
    ``x``: how x is quantised before the product: "" not at all, ``int8`` (a scale for each token), ``int8:min=1e-07``
    (no scale less than that), ``int8:0.05`` (one scale), ``int8:given`` (one scale, which is a graph input).
    ``w``: how the weight is computed from stored tensors, as text; "" where it is one. ``weight`` is the first of them
    then, and ``parts`` are all. ``reads``: the node of x, before it is quantised.
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
    """For ``m_lo <= M <= m_hi`` (None: no bound) run ``format`` with ``kernel``. Times in seconds at ``m_lo``."""

    m_lo: int
    m_hi: int | None
    format: str
    kernel: str
    dense_s: float
    ours_s: float

    def holds(self, m: int) -> bool:
        return self.m_lo <= m and (self.m_hi is None or m <= self.m_hi)


@dataclass(frozen=True)
class Decision:
    """The plan for one weight: ranges of M that cover 1..infinity, one sentence why, and what it rests on.

    ``break_even``: sparsity from which the best sparse candidate would win at M=1 on this target (None: never).
    ``source``: ``model`` (cost model), ``measured`` (tuned), ``forced`` (min_speedup=0), ``fallback`` (a failure).
    """

    ranges: tuple[Range, ...]
    reason: str
    break_even: float | None = None
    source: str = "model"
    candidates: tuple[Candidate, ...] = ()
    near: str = ""  # "near 2:4 (97.3 % of groups; 1812 break it)"
    help: str = ""  # what the user could change, e.g. "2:4 would give 1.7x"

    def at(self, m: int) -> Range:
        return next((r for r in self.ranges if r.holds(m)), self.ranges[-1])

    @property
    def ours(self) -> bool:
        """Some M runs on one of our kernels: a sparse format, or dense weights in panels."""
        return any(r.format != "dense" for r in self.ranges)
