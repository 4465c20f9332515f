"""What a report says of activations: where zeros in x come from, how many were counted, and which results nobody reads.

In: layers of a report. Out: with their measured rates; a sentence of one, "" where there are no zeros; a dict.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparsec.activation_rates import rate_of
from sparsec.facts import ActFact, Rates
from sparsec.records import CompileRecord, LayerRecord
from sparsec.report_data import Layer, percent

UNKNOWN = "rate unknown; sparsec.calibrate(model, data) measures it"


def with_rates(layers: Sequence[Layer], records: Sequence[CompileRecord], cache: str = "") -> tuple[Layer, ...]:
    """The layers of these graphs, in their order, with what was measured of their zeros.

    What says of one layer where its results are read is counted as the zeros of the layer that reads it.
    ``cache``: as the option ``cache_dir``.
    """
    found, rest = [], iter(layers)
    for record in records:
        ours = list(itertools.islice(rest, len(record.layers)))
        rates = [_measured_of(layer.record, cache) for layer in ours]
        by_node = {
            layer.record.site.gate.node: r for layer, r in zip(ours, rates, strict=True) if r and layer.record.site.gate
        }
        for layer, rate in zip(ours, rates, strict=True):
            fact = layer.record.site.needed_fact
            found.append(replace(layer, rates=rate, needed=by_node.get(fact.node) if fact else None))
    return tuple(found)


def _measured_of(record: LayerRecord, cache: str) -> Rates | None:
    gate = record.site.gate
    return rate_of(record.fact.key, gate.origin, cache) if gate else None


def in_words(layer: Layer) -> str:
    """``x: 88 % zeros from relu (measured on 4096 tokens)``; ``y: not read where relu is zero``."""
    site, needed, said = layer.record.site, layer.needed, []
    if site.gate is not None:
        said.append(f"x: {_zeros(site.gate, layer.rates)}")
    if site.needed_fact is not None:
        share = f", {percent(needed.zeros)} of it (measured on {needed.tokens} tokens)" if needed else ""
        said.append(f"y: not read where {site.needed_fact.origin} is zero{share}")
    return "; ".join(said)


def _zeros(gate: ActFact, rates: Rates | None) -> str:
    source = f"{'a ' if gate.origin.startswith('product') else ''}{gate.origin}"
    kept = _kept(gate.pattern)
    if rates is not None:
        return f"{percent(rates.zeros)} zeros from {source}{kept} (measured on {rates.tokens} tokens)"
    if gate.rate is not None:
        return f"at least {percent(gate.rate)} zeros from {source}{kept}"
    return f"zeros from {source}{kept}, {UNKNOWN}"


def _kept(pattern: str) -> str:
    kind, _, rest = pattern.partition(":")
    if kind == "topk":
        return f", {rest} kept in a row"
    return ", in the same channels of every row" if kind == "channels" else ""


def to_dict(layer: Layer) -> dict[str, Any] | None:
    """For ``--json``: null where nothing is known of zeros. ``rate``: measured, else known by construction."""
    site, rates = layer.record.site, layer.rates
    if site.gate is None and site.needed_fact is None:
        return None
    gate = site.gate or ActFact()
    return {
        "state": gate.state,
        "origin": gate.origin,
        "pattern": gate.pattern,
        "rate": _share(rates.zeros) if rates else _share(gate.rate),
        "measured": _measured(rates),
        "needed": site.needed,
        "needed_origin": site.needed_fact.origin if site.needed_fact else "",
        "needed_measured": _measured(layer.needed),
    }


def _measured(rates: Rates | None) -> dict[str, Any] | None:
    """Counts of the layer; those of channels stay on disk."""
    if rates is None:
        return None
    rows = {str(m): _share(share) for m, share in ((1, rates.zeros), *rates.rows)}
    return {"tokens": rates.tokens, "rows": rows, "dead": sum(share == 1.0 for share in rates.channels)}


def _share(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")
