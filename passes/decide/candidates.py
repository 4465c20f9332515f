"""The ways to run one weight: dense always, and each sparse format that its facts allow, with bytes and cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsec.facts import Candidate, WeightFact
from sparsec.formats import DENSE, VALUE_BYTES, Format, Pattern, storage_bytes, stored_types, stored_values
from sparsec.options import Policy
from sparsec.passes.decide.cost import Cost, dense_cost, kernel_cost
from sparsec.targets.base import KernelRate, Rates

FULLEST_NM = 0.75  # above this share of kept values, N:M saves less than its index costs
# What the model does not know (how a shape splits over threads, what else is in the cache, which dense kernel the
# library picks for it, what else the machine did while rates were measured) moved real ratios by up to a quarter
# against it; a gain below that is not one we can promise. Measuring (tune) needs no such margin. Panels do the same
# work whatever the zeros, so there is less to be wrong about.
MODEL_MARGIN = 1.25
PANEL_MARGIN = 1.1
PANEL_PRICE = 1.05  # panels hold the whole weight a second time, so they must be faster than a smaller pack
FULLEST_BLOCKS = 0.9  # likewise for the share of blocks that hold anything
# A second kernel for the same pack takes seconds to compile; a second format also doubles the memory of the packs.
SWITCH_LOOP = 1.02
SWITCH_FORMAT = 1.05
PARTS_OF_WEIGHT = ("skip", "select")  # loops of activation sparsity
_PLAIN_PANELS = tuple(f"panel+{values}" for values in VALUE_BYTES)


def plain_panel(format: str) -> bool:
    """Dense values as they are, a second time: neither zeros nor bits are saved."""
    return format in _PLAIN_PANELS


@dataclass(frozen=True)
class Way:
    """One format and loop with its cost; ``format`` is ``dense`` or the name of a Format."""

    format: str
    kernel: str
    bytes: int
    cost: Cost
    margin: float = 1.0  # how many times faster than asked the model must expect it to be

    @property
    def ours(self) -> bool:
        return self.format != "dense"

    @property
    def panel(self) -> bool:
        return plain_panel(self.format)

    def change(self, last: Way | None) -> float:
        """How many times faster this way must be to be taken at an M above one where ``last`` runs."""
        if last is None or (self.format, self.kernel) == (last.format, last.kernel):
            return 1.0
        return SWITCH_LOOP if self.format == last.format else SWITCH_FORMAT

    @property
    def price(self) -> Cost:
        """What this way is compared with our other ways by."""
        return self.cost.times(PANEL_PRICE) if self.panel else self.cost

    def candidate(self) -> Candidate:
        return Candidate(self.format, self.kernel, self.bytes, self.cost.text())


def dense_way(fact: WeightFact, dtype: str, rates: Rates) -> Way | None:
    """Dense, or None where this machine's dense speed in ``dtype`` is not known."""
    rate = next((r for r in rates.dense if r.dtype == dtype), None)
    if rate is None or not rate.points:
        return None
    weights = fact.n * fact.k
    return Way("dense", "", weights * VALUE_BYTES[dtype], dense_cost(rate, weights, rates.dense_overhead))


def our_ways(
    fact: WeightFact, dtype: str, rates: Rates, formats: tuple[str, ...], any_size: bool = False, x: str = ""
) -> list[Way]:
    """Every format and loop that holds for the weight, is allowed, and has a kernel with known speed.

    ``x``: what the graph rounds x to (``int8``); kernels that do it themselves come into question only then.

    A sparse pack must be smaller than the weight, and than all of its codes where it has any, unless ``any_size``: what
    a bitmap gains on a weight with three zeros in it is not sparsity's, and panels have it too.
    """
    ways = []
    whole = fact.n * fact.k * VALUE_BYTES[dtype]
    for name in formats_of(fact, dtype):
        if not allowed(name, formats):
            continue
        pattern, plain = name.pattern, name.values == dtype
        for rate in kernel_rates(rates, pattern, dtype, "" if plain else name.values):
            if "/" in rate.loop and not x:
                continue
            read = read_bytes(rate, name, fact)
            whole_again = plain and pattern.kind == "panel"
            if read >= whole and not any_size and not whole_again:
                continue
            cost = kernel_cost(rate, rates, fact.n, fact.k, stored_values(pattern, fact), read)
            ways.append(Way(str(name), rate.loop, read, cost, PANEL_MARGIN if whole_again else MODEL_MARGIN))
    return ways if any_size else _smaller_than_all_codes(ways)


def _smaller_than_all_codes(ways: list[Way]) -> list[Way]:
    """Without those that skip zeros and yet read no fewer bytes than a way that reads every code.

    Rounding leaves a few zeros in any weight. Rates are measured at densities where skipping pays, so what a line
    through them says about a weight that is nearly full is no reason to store a bit for each of its positions.
    """
    formats = {way: Format.parse(way.format) for way in ways}
    whole: dict[str, int] = {}
    for way, format in formats.items():
        if format.pattern.kind in ("panel", "dense") and not way.panel:
            whole[format.values] = min(way.bytes, whole.get(format.values, way.bytes))
    every = ("panel", "dense")
    return [w for w, f in formats.items() if f.pattern.kind in every or w.bytes < whole.get(f.values, w.bytes + 1)]


def formats_of(fact: WeightFact, dtype: str) -> Iterator[Format]:
    """The formats that this weight holds: its patterns with values as they are, and as the codes they lie on."""
    zeros = fact.nnz < fact.n * fact.k
    # GPUs read dense codes in the order they have; CPUs panels
    yield from (Format(DENSE, values) for values in stored_types(fact.values, zeros))
    for pattern in patterns(fact):
        for values in (dtype, *stored_types(fact.values, zeros and pattern.kind != "bitmap")):
            yield Format(pattern, values)


def read_bytes(rate: KernelRate, format: Format, fact: WeightFact) -> int:
    """Bytes of weight that the kernel reads a call."""
    if not any(rate.stored):
        return storage_bytes(format, fact)
    a_position, a_value = rate.stored
    return round(a_position * fact.n * fact.k + a_value * stored_values(format.pattern, fact))


def ways_for(fact: WeightFact, dtype: str, rates: Rates, policy: Policy, x: str = "") -> list[Way]:
    """The ways that a policy takes into account.

    ``min_speedup=0`` means the best sparse way, whatever it costs; panels skip no zeros, so it leaves them out unless
    they are asked for by name.
    """
    forced = policy.min_speedup == 0
    ways = our_ways(fact, dtype, rates, policy.formats, any_size=forced, x=x)
    return [w for w in ways if not (forced and not policy.formats and w.panel)]


def allowed(format: Format | Pattern, formats: tuple[str, ...]) -> bool:
    """``formats`` names patterns, and formats where the values matter; ``nm`` and ``block`` without parameters mean all
    of theirs; empty means all."""
    if not formats:
        return True
    pattern = format.pattern if isinstance(format, Format) else format
    named = isinstance(format, Format) and str(format) in formats
    return named or str(pattern) in formats or pattern.kind in formats


def patterns(fact: WeightFact) -> Iterator[Pattern]:
    """The patterns that this weight holds; any weight can be stored in panels."""
    yield Pattern("panel")
    if fact.nnz == fact.n * fact.k:
        return
    yield Pattern("bitmap")
    yield Pattern("index")
    taken: list[tuple[int, int]] = []
    for f in fact.nm:
        implied = any(n * f.m <= f.n * m and f.m % m == 0 for n, m in taken)  # 2:4 is 4:8, and packs the same
        if f.exact and f.n / f.m <= FULLEST_NM and not implied:
            taken.append((f.n, f.m))
            yield Pattern("nm", (f.n, f.m))
    tall = next((f for f in fact.vnm if f.exact), None)  # the tallest blocks that hold share their columns most
    if tall is not None:
        yield Pattern("vnm", (tall.v, tall.n, tall.m))
    for b in fact.blocks:
        has_layout = b.rows % 2 == 0 or b.cols % 16 == 0  # the kernels have nothing better than index for the others
        if has_layout and b.nonzero <= FULLEST_BLOCKS * b.total:
            yield Pattern("block", (b.rows, b.cols))


def kernel_rates(rates: Rates, pattern: Pattern, dtype: str, values: str = "", loop: str = "") -> list[KernelRate]:
    """The measured loops of a pattern: those of exactly its parameters, else those of a relative of its family.

    ``values``: how they are stored, where not in ``dtype``. ``loop``: one that reads a part of the weight; without it
    those that read all.
    """
    parts = (loop,) if loop else PARTS_OF_WEIGHT
    kind = [r for r in rates.kernels if r.dtype == dtype and r.values == values and (r.loop in parts) == bool(loop)]
    family = [r for r in kind if r.pattern.partition(":")[0] == pattern.kind]
    exact = [r for r in family if r.pattern == str(pattern)]
    return exact or [r for r in family if r.pattern == family[0].pattern]
