"""Which layers of a block feed which, so that a permutation or a scale of one's inputs can be written into another.

In: a ``Probe`` (one run of the block). Out: ``NormFeed`` (norm -> the layers that read it), ``Feed`` (up -> down,
v -> o, fc1 -> fc2: each in-feature comes from one row of each source), and notes on what was left alone. Nothing goes
by name; all of it is found by putting other values into layers and looking at what others then read:

  which row feeds which column   values are changed in rows whose number has bit b, for every b; then in those that
                                 have not. A column fed by one row changes in exactly one of the two
  which columns may change places   all rows give the same value: columns that then agree compute the same function
                                 (those of a head; all of an MLP)
  whether a scale passes         rows are scaled; the columns they feed must scale with them

and at last each fold is tried with random permutations and scales: the block's outputs must not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from sparsec.passes.reparam.fold import Edit, matrix, write
from sparsec.passes.reparam.probe import TOLERANCE, Probe

_FEW_TOKENS = 4  # shorter sequences do not tell heads apart: one token attends to itself whatever its query
_CHANGED = 2e-2  # share of a column's largest value; what is put in changes the columns it feeds by far more
_MOST_KINDS = 1024  # columns that differ more than this are no heads


@dataclass(frozen=True, eq=False)
class Source:
    """``rows`` int64 [K]: the row of layer ``name`` that feeds each column of the consumer. ``scales``: a positive
    scale of a row scales its columns."""

    name: str
    rows: torch.Tensor
    scales: bool


@dataclass(frozen=True, eq=False)
class Feed:
    """Layers whose rows are the in-features of ``consumer``, one each.

    ``groups``: int64 [units, copies] each: columns that share a row (query heads of one key-value head) are copies of
    a unit; the units of a group may change places with each other, those of different groups may not.
    """

    consumer: str
    sources: tuple[Source, ...]
    groups: tuple[torch.Tensor, ...]

    @property
    def movable(self) -> bool:
        return any(len(group) > 1 for group in self.groups)

    @property
    def scaling(self) -> Source | None:
        """The source that takes a scale, where one does."""
        return next((s for s in self.sources if s.scales), None)

    def order(self, orders: Sequence[torch.Tensor]) -> torch.Tensor:
        """The order of columns, int64 [K], from an order of the units of each group."""
        columns = torch.arange(len(self.sources[0].rows))
        for group, order in zip(self.groups, orders, strict=True):
            columns[group] = group[order.cpu()]
        return columns

    def permute(self, order: torch.Tensor, heights: dict[str, int]) -> list[Edit]:
        """Edits that make column j what ``order[j]`` was; ``heights``: N of each source."""
        edits = [Edit(self.consumer, "in", order=order)]
        for source in self.sources:
            rows = torch.arange(heights[source.name])
            rows[source.rows] = source.rows[order]
            edits.append(Edit(source.name, "out", order=rows))
        return edits

    def scale(self, scale: torch.Tensor, heights: dict[str, int]) -> list[Edit]:
        """Edits that divide in-features by ``scale`` [K] (equal on copies) and multiply the consumer's columns."""
        source = self.scaling
        if source is None:
            raise ValueError(f"no scale passes into {self.consumer}")
        rows = torch.ones(heights[source.name], dtype=scale.dtype)
        rows[source.rows] = scale.cpu()
        return [Edit(self.consumer, "in", scale=scale), Edit(source.name, "out", scale=rows)]


@dataclass(frozen=True)
class NormFeed:
    """A norm that nothing but ``consumers`` reads. Its gain is ``offset`` + weight (1 for Gemma's)."""

    norm: str
    consumers: tuple[str, ...]
    offset: float

    def scale(self, scale: torch.Tensor) -> list[Edit]:
        norm = Edit(self.norm, "out", scale=scale, offset=self.offset)
        return [norm, *(Edit(name, "in", scale=scale) for name in self.consumers)]


@dataclass
class Wiring:
    """All that was found in one block; ``heights``: N of each layer."""

    norms: list[NormFeed] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    heights: dict[str, int] = field(default_factory=dict)


def wiring(probe: Probe) -> Wiring:
    """Every fold that holds on the first batch."""
    found = Wiring(notes=[f"{probe.name(layer)} {why}" for layer, why in probe.left_out.items()])
    found.heights = {name: _shape(probe, name)[0] for name in probe.layers}
    random = torch.Generator().manual_seed(probe.block.seed)
    readers = _readers(probe)
    for norm, consumers in readers.items():
        _add_norm(probe, found, norm, consumers, random)
    read = {name for consumers in readers.values() for name in consumers}
    hidden = probe.batch.hidden
    if hidden.dim() > 2 and hidden.shape[1] < _FEW_TOKENS:
        found.notes.append(
            f"{probe.block.name}: the first batch holds {hidden.shape[1]} tokens a sequence; at least "
            f"{_FEW_TOKENS} are needed to see which layers feed which"
        )
        return found
    for consumer in probe.calls:
        if consumer in probe.layers and consumer not in probe.left_out and consumer not in read:
            _add_feed(probe, found, consumer, random)
    return found


def _shape(probe: Probe, layer: str) -> torch.Size:
    weight = matrix(probe.layers[layer])
    assert weight is not None
    return weight.shape


def _readers(probe: Probe) -> dict[str, tuple[str, ...]]:
    """Norm -> the layers that read its very output, in the order of their calls."""
    norms = [name for name in probe.calls if name in probe.norms]
    found: dict[str, tuple[str, ...]] = {}
    for layer in probe.calls:
        if layer not in probe.layers or layer in probe.left_out:
            continue
        x = probe.calls[layer].x
        shared = [norm for norm in norms if _shares(x, probe.calls[norm].y)]
        for norm in shared or [norm for norm in norms if _equal(x, probe.calls[norm].y)]:  # or a copy was made
            found[norm] = (*found.get(norm, ()), layer)
    return found


def _shares(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.numel() == y.numel() and x.data_ptr() == y.data_ptr()


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.numel() == y.numel() and x.shape[-1] == y.shape[-1] and torch.equal(x.reshape(-1), y.reshape(-1))


def _add_norm(probe: Probe, found: Wiring, norm: str, consumers: tuple[str, ...], random: torch.Generator) -> None:
    """Try the norm's gain with random powers of two (which round nothing)."""
    width = _shape(probe, consumers[0])[1]
    unseen = [name for name in probe.left_out if _shape(probe, name)[1] == width]
    if unseen:
        found.notes.append(f"{probe.name(norm)} takes no scale: {probe.name(unseen[0])} may read it too")
        return
    scale = torch.randint(-1, 2, (width,), generator=random).float().exp2()
    offset = _offset(probe, norm, scale)
    if offset is None:
        found.notes.append(f"{probe.name(norm)} takes no scale: its weight is no plain gain")
        return
    feed = NormFeed(norm, consumers, offset)
    if probe.holds(feed.scale(scale)):
        found.norms.append(feed)
    else:
        names = ", ".join(consumers)
        found.notes.append(f"{probe.name(norm)} takes no scale: more than {names} depends on its output")


def _offset(probe: Probe, norm: str, scale: torch.Tensor) -> float | None:
    """0 or 1: which of them makes scaling ``offset + weight`` scale what the norm gives; None where neither does."""
    module, call = probe.norms[norm], probe.calls[norm]
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    wanted = call.y.double() / scale.to(call.y.device, torch.float64)
    own = [p for p in (weight, bias) if p is not None]
    before = [p.detach().clone() for p in own]
    for offset in (0.0, 1.0):
        try:
            write(module, Edit(norm, "out", scale=scale, offset=offset))
            with torch.no_grad():
                given = module(*call.args, **call.kwargs)
        finally:
            with torch.no_grad():
                for parameter, old in zip(own, before, strict=True):
                    parameter.copy_(old)
        if (given.double() - wanted).norm() <= TOLERANCE[call.y.dtype] * wanted.norm() and wanted.any():
            return offset
    return None


def _add_feed(probe: Probe, found: Wiring, consumer: str, random: torch.Generator) -> None:
    sources = []
    for name in probe.calls:
        if name == consumer:
            break
        if name not in probe.layers or name in probe.left_out or _siblings(probe, name, consumer):
            continue
        for rows in _parts(_shape(probe, name)[0], _shape(probe, consumer)[1]):
            fed_by = _fed_by(probe, consumer, name, rows, random)
            if fed_by is not None:
                sources.append(Source(name, fed_by, _scales(probe, consumer, name, fed_by, random)))
    if not sources:
        return
    feed = Feed(consumer, tuple(sources), _groups(probe, consumer, sources, random))
    failed = _fails(probe, feed, found.heights, random)
    if failed:
        names = ", ".join(dict.fromkeys(s.name for s in sources))
        found.notes.append(f"{probe.name(consumer)}: no {failed} is folded, more than it depends on {names}")
    if failed != "permutation or scale":
        found.feeds.append(_without(feed, failed))


def _fails(probe: Probe, feed: Feed, heights: dict[str, int], random: torch.Generator) -> str:
    """What of it does not hold on the whole block: "", "permutation", "scale" or both."""
    failed = []
    order = feed.order([torch.randperm(len(group), generator=random) for group in feed.groups])
    if feed.movable and not probe.holds(feed.permute(order, heights)):
        failed.append("permutation")
    if feed.scaling is not None:
        scale = torch.ones(len(order))
        for group in feed.groups:
            scale[group] = torch.randint(-1, 2, (len(group), 1), generator=random).float().exp2()
        if not probe.holds(feed.scale(scale, heights)):
            failed.append("scale")
    return " or ".join(failed)


def _without(feed: Feed, failed: str) -> Feed:
    """The feed with only what holds left in it."""
    groups, sources = feed.groups, feed.sources
    if failed == "permutation":
        groups = tuple(unit[None] for group in groups for unit in group)
    if failed == "scale":
        sources = tuple(Source(s.name, s.rows, False) for s in sources)
    return Feed(feed.consumer, sources, groups)


def _siblings(probe: Probe, name: str, consumer: str) -> bool:
    """Layers that read one and the same tensor do not feed each other."""
    return _shares(probe.calls[name].x, probe.calls[consumer].x)


def _parts(height: int, width: int) -> Iterator[range]:
    """Rows of a layer that may feed ``width`` columns: all of them, or those of one layer that was fused into it."""
    if width % height == 0:  # one row a column, or one row for each query head that shares it
        yield range(height)
        return
    if height % width == 0:  # gate and up, or q, k and v, one below the other
        yield from (range(start, start + width) for start in range(0, height, width))
    fewer, odd = divmod(height - width, 2)
    if 0 < fewer < width and not odd and width % fewer == 0:  # q, then the fewer rows of k and of v
        yield range(height - fewer, height)


def _fed_by(probe: Probe, consumer: str, name: str, rows: range, random: torch.Generator) -> torch.Tensor | None:
    """For each column of the consumer the one row of ``rows`` that it depends on; None where that is not so."""
    y = probe.calls[name].y
    low = torch.rand((*y.shape[:-1], len(rows)), generator=random) + 0.1  # positive: no ReLU hides it
    high = 2 * low + 0.5
    number = torch.arange(len(rows))

    def seen(value: torch.Tensor) -> torch.Tensor:
        return probe.see(consumer, {name: _with_rows(y, rows, value)}, [name])

    base = seen(low)
    found = torch.zeros(base.shape[1], dtype=torch.int64)
    for bit in range(max(1, (len(rows) - 1).bit_length())):
        has = (number >> bit) % 2 == 1
        changed = _changed(base, seen(torch.where(has, high, low)))
        otherwise = _changed(base, seen(torch.where(has, low, high)))
        if not bool((changed ^ otherwise).all()):
            return None
        found += changed.long() << bit
    return found + rows.start if int(found.max()) < len(rows) else None


def _with_rows(y: torch.Tensor, rows: range, value: torch.Tensor) -> torch.Tensor:
    given = y.clone()
    given[..., rows.start : rows.stop] = value.to(given)
    return given


def _changed(base: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    return ((now - base).abs().amax(0) > _CHANGED * base.abs().amax(0)).cpu()


def _scales(probe: Probe, consumer: str, name: str, fed_by: torch.Tensor, random: torch.Generator) -> bool:
    """Whether scaling rows of ``name`` (signed values) scales the columns they feed."""
    y = probe.calls[name].y
    value = torch.randn(y.shape, generator=random).to(y)
    scale = torch.randint(-1, 2, (y.shape[-1],), generator=random).float().exp2()
    scale[fed_by[0]] = 2.0  # never all ones
    kept = torch.ones(y.shape[-1], dtype=torch.bool)
    kept[fed_by] = False
    scale[kept] = 1.0
    base = probe.see(consumer, {name: value}, [name])
    now = probe.see(consumer, {name: value * scale.to(value)}, [name])
    wanted = base * scale[fed_by].to(base)
    return bool((now - wanted).norm() <= TOLERANCE[y.dtype] * wanted.norm()) and bool(wanted.any())


def _groups(
    probe: Probe, consumer: str, sources: Sequence[Source], random: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Columns by the rows that feed them (copies), and those units by the function that they compute (groups)."""
    kinds = _kinds(probe, consumer, sources, random).tolist()
    units: dict[tuple[int, ...], list[int]] = {}
    for column, key in enumerate(zip(*(s.rows.tolist() for s in sources), strict=True)):
        units.setdefault(key, []).append(column)
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for columns in units.values():
        groups.setdefault(tuple(kinds[c] for c in columns), []).append(columns)
    return tuple(torch.tensor(group) for group in groups.values())


def _kinds(probe: Probe, consumer: str, sources: Sequence[Source], random: torch.Generator) -> torch.Tensor:
    """A number for each column, the same for columns that compute the same function of what feeds them.

    The rows of a source all give one value; every other layer on the way gives noise, so that heads differ by far
    more than rounding even where their weights are small.
    """
    names = list(dict.fromkeys(s.name for s in sources))
    given = {}
    for name in probe.calls:
        if name == consumer:
            break
        if name in probe.layers and name not in probe.left_out:
            y = probe.calls[name].y
            given[name] = (2 * torch.randn(y.shape, generator=random)).to(y)
    for source in sources:
        value = given[source.name]
        value[..., source.rows] = torch.randn((*value.shape[:-1], 1), generator=random).to(value)
    seen = probe.see(consumer, given, names)
    near = 10 * TOLERANCE[probe.calls[consumer].x.dtype] * float(seen.abs().max())
    kinds = torch.full((seen.shape[1],), -1)
    for kind in range(_MOST_KINDS):
        rest = (kinds < 0).nonzero().flatten()
        if not len(rest):
            return kinds
        same = ((seen[:, rest] - seen[:, rest[:1]]).abs().amax(0) <= near).cpu()
        kinds[rest[same]] = kind
    return torch.arange(seen.shape[1])  # each column is of its own kind
