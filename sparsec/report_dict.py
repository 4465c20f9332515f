"""An explanation as JSON-able values: what ``--json`` prints, what the page holds, what two reports are compared by.

In: Explanations. Out: dicts of numbers, texts and lists. No weight is in them. Times are seconds, shares 0 to 1.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparsec import __version__
from sparsec.report_activation import to_dict as activation_dict
from sparsec.report_data import (
    AtBatch,
    Cost,
    Layer,
    Measured,
    Whole,
    duration,
    merge_ranges,
    near_of,
    percent,
    read_bytes,
    seconds,
    short_format,
)

if TYPE_CHECKING:
    from sparsec.explain import Explanation
    from sparsec.facts import Candidate

SCHEMA = 2
CURVE_ROWS = tuple(2**i for i in range(13))
MANY = 100  # layers from which curves have every second point, so that the page stays small
MOST_FORMATS = 4  # sparse ones, and dense
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def to_dict(report: Explanation, compare: Explanation | None = None) -> dict[str, Any]:
    """The report. Keys: schema, model, environment, total, linear_layers, layers, groups, not_taken, stages, ...

    ``total``: the whole model as measured, null where it was not; ``linear_layers``: their sums, by batch.
    """
    from sparsec.report_text import how, next_command, summary

    indexed = {id(layer): i for i, layer in enumerate(report.layers)}
    groups, rows = report.groups, curve_rows(report)
    share = {indexed[id(layer)]: g.share / len(g.layers) for g in groups for layer in g.layers}
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"name": report.model, "weights": report.weights, "summary": summary(report)},
        "environment": environment(report),
        "options": asdict(report.options.policy)
        | {
            "formats": list(report.options.policy.formats),
            "inductor": {k: str(v) for k, v in report.options.inductor},
        },
        "batch": list(report.batches),
        "tokens": report.tokens,
        "seconds": round(report.seconds, 3),
        "total": _whole(report.whole),
        "linear_layers": [_linear(report, batch) for batch in report.batches],
        "failures": list(report.failures),
        "notes": list(report.notes),
        "layers": [_layer(layer, share.get(i, 0.0), rows) for i, layer in enumerate(report.layers)],
        "groups": [
            {"name": g.name, "layers": list(g.members), "zero": g.zero, "reason": g.reason, "share": _short(g.share)}
            | ({"activation": g.activation} if g.activation else {})
            for g in groups
        ],
        "not_taken": [asdict(r) | {"names": list(r.names), "ops": list(r.ops)} for r in report.refusals],
        "what_would_help": list(report.helps),
        "stages": [asdict(s) | {"ms": round(s.ms, 3)} for s in report.stages],
        "curve_rows": list(rows),
        "how": how(report) if report.layers else "",
        "next": next_command(report),
    }
    if compare is not None:
        body["compare"] = difference(report, compare)
    return body


def environment(report: Explanation) -> dict[str, Any]:
    """Where the report was made."""
    import torch

    return {
        "sparsec": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "target": report.target,
        "machine": report.machine,
        "threads": torch.get_num_threads(),
    }


def _whole(whole: Whole | None) -> dict[str, Any] | None:
    if whole is None:
        return None
    return {"of": "whole model", "base": whole.base, "batch": whole.batch, **(_cost(whole) or {})}


def _linear(report: Explanation, batch: int) -> dict[str, Any]:
    return {"batch": batch, "expected": _cost(report.expected(batch)), "measured": _cost(report.measured(batch))}


def _cost(cost: Cost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    body = {"dense_s": _short(cost.dense_s), "ours_s": _short(cost.ours_s), "speedup": _short(cost.speedup)}
    if isinstance(cost, Measured):
        body |= {"low": _short(cost.low), "high": _short(cost.high)}
    return body


def _layer(layer: Layer, share: float, rows: Sequence[int]) -> dict[str, Any]:
    record, fact, decision = layer.record, layer.record.fact, layer.record.decision
    dense_bytes, our_bytes = read_bytes(layer)
    return {
        "name": layer.name,
        "kind": record.site.kind,
        "shape": list(layer.shape),
        "dtype": record.site.dtype,
        "act": record.site.act,
        "x_shape": list(record.site.x_shape),
        "density": _short(layer.density),
        "nnz": fact.nnz,
        "pattern": layer.pattern,
        "decision": layer.decision,
        "reason": layer.reason,
        "source": decision.source,
        "break_even": _short(decision.break_even),
        "near": near_of(fact, decision),
        "help": decision.help,
        "share": _short(share),
        "expected": _cost(layer.expected),
        "measured": _cost(layer.measured),
        "batches": [_at(a) for a in layer.at],
        "bytes": {"dense": dense_bytes, "ours": our_bytes},
        "ranges": [[r.m_lo, r.m_hi, r.format] for r in merge_ranges(decision.ranges)],
        "candidates": _candidates(layer),
        "curve": curve(layer, rows),
        "rows": {"min": fact.row_nnz_min, "max": fact.row_nnz_max, "hist": list(fact.row_hist)},
        "zero_rows": fact.zero_rows,
        "zero_cols": fact.zero_cols,
        "negative_zeros": fact.negative_zeros,
        "nonfinite": fact.nonfinite,
        "values": fact.values.kind,
        "inputs": record.site.x,
        "activation": activation_dict(layer),
        "thumbnail": thumbnail(fact.thumbnail),
    }


def _at(at: AtBatch) -> dict[str, Any]:
    body: dict[str, Any] = {"batch": at.batch, "rows": at.rows, "decision": at.decision, "kernel": at.kernel}
    if at.break_even is not None:
        body["break_even"] = _short(at.break_even)
    if at.rival:
        body["rival"] = [at.rival, _short(at.rival_speedup)]
    return body | {"expected": _cost(at.expected), "measured": _cost(at.measured)}


def _candidates(layer: Layer) -> list[dict[str, Any]]:
    """By format: the loops that can run it and the bytes it reads."""
    formats: dict[str, dict[str, Any]] = {}
    for c in shown(layer):
        entry = formats.setdefault(c.format, {"format": c.format, "kernels": [], "bytes": c.bytes})
        entry["kernels"] += [c.kernel] if c.kernel else []
    return list(formats.values())


def shown(layer: Layer) -> tuple[Candidate, ...]:
    """The candidates worth showing: dense, what runs somewhere, and the fastest others up to MOST_FORMATS.

    A block-pruned weight fits a dozen block shapes; all of them in each of 300 layers would burst the page.
    """
    decision = layer.record.decision
    runs = {"dense", *(r.format for r in decision.ranges)}
    others = {c.format: seconds(c, layer.rows) for c in decision.candidates if c.format not in runs}
    kept = {*runs, *sorted(others, key=lambda f: others[f])[: max(MOST_FORMATS + 1 - len(runs), 0)]}
    return tuple(c for c in decision.candidates if c.format in kept)


def curve_rows(report: Explanation) -> tuple[int, ...]:
    return CURVE_ROWS if len(report.layers) < MANY else CURVE_ROWS[::2]


def curve(layer: Layer, rows: Sequence[int]) -> dict[str, Any]:
    """Dense seconds by the cost model at each of ``rows``, and per shown format its speedup there (its best loop)."""
    lines: dict[str, list[float]] = {}
    for candidate in shown(layer):
        line = [seconds(candidate, m) for m in rows]
        known = lines.get(candidate.format)
        lines[candidate.format] = [min(a, b) for a, b in zip(known, line, strict=True)] if known else line
    dense = lines.pop("dense", [])
    if not dense:
        return {}
    return {
        "dense_s": [_digits(s) for s in dense],
        "speedup": {name: [_digits(d / s) for d, s in zip(dense, line, strict=True)] for name, line in lines.items()},
    }


def _digits(number: float) -> float:
    return float(f"{number:.3g}")


def thumbnail(percents: Sequence[int]) -> str:
    """16 x 16 mean densities, row-major, one digit of base 36 each (0: empty, z: full); a list would fill the page."""
    return "".join(_DIGITS[max(0, min(35, round(p * 35 / 100)))] for p in percents)


def _short(number: float | None) -> float | None:
    """Four significant digits are more than any of these numbers has."""
    return None if number is None else float(f"{number:.4g}")


def difference(now: Explanation, before: Explanation) -> dict[str, Any]:
    """What changed from ``before`` to ``now``, layer by layer, matched by name."""
    ours, theirs = _by_name(now), _by_name(before)
    changed = []
    for name in (n for n in ours if n in theirs):
        a, b = theirs[name], ours[name]
        what = _changes(a, b)
        if what:
            changed.append({"name": name, **what})
    return {
        "model": before.model,
        "linear_layers": [
            {"batch": b, "before": _cost(before.expected(b)), "now": _cost(now.expected(b))}
            for b in now.batches
            if b in before.batches
        ],
        "changed": changed,
        "same": sum(n in theirs for n in ours) - len(changed),
        "only_now": [n for n in ours if n not in theirs],
        "only_before": [n for n in theirs if n not in ours],
    }


def _by_name(report: Explanation) -> dict[str, Layer]:
    """Layers by name; a layer that is called again gets ``#2`` behind its name."""
    seen: Counter[str] = Counter()
    named = {}
    for layer in report.layers:
        seen[layer.name] += 1
        named[layer.name + (f" #{seen[layer.name]}" if seen[layer.name] > 1 else "")] = layer
    return named


def _changes(a: Layer, b: Layer) -> dict[str, list[Any]]:
    what: dict[str, list[Any]] = {}
    if a.shape != b.shape:
        what["shape"] = [list(a.shape), list(b.shape)]
    if abs(a.density - b.density) > 5e-4:
        what["density"] = [_short(a.density), _short(b.density)]
    if a.pattern != b.pattern:
        what["pattern"] = [a.pattern, b.pattern]
    if a.decision != b.decision:
        what["decision"] = [a.decision, b.decision]
    if what and a.expected and b.expected:
        what["expected_s"] = [_short(a.expected.ours_s), _short(b.expected.ours_s)]
    return what


def difference_lines(diff: Mapping[str, Any]) -> Iterator[str]:
    """The comparison in words, equal changes folded."""
    for t in diff["linear_layers"]:
        if t["before"] and t["now"]:
            ratio = t["before"]["ours_s"] / t["now"]["ours_s"] if t["now"]["ours_s"] else 1.0
            yield (
                f"linear layers at batch {t['batch']}, expected: {duration(t['before']['ours_s'])} there, "
                f"{duration(t['now']['ours_s'])} here ({ratio:.2f}x)"
            )
    yield from _changed_lines(diff["changed"], len(diff["changed"]) + diff["same"])
    for key, where in (("only_now", "only here"), ("only_before", "only there")):
        if diff[key]:
            yield f"{where}: {', '.join(_fold_names(diff[key]))}"
    yield f"the same: {diff['same']} layer{'' if diff['same'] == 1 else 's'}"


def _changed_lines(changed: Sequence[Mapping[str, Any]], shared: int) -> Iterator[str]:
    folded: dict[str, list[str]] = {}
    for entry in changed:
        words = []
        if "shape" in entry:
            words.append("shape " + " -> ".join("x".join(map(str, s)) for s in entry["shape"]))
        if "density" in entry:
            words.append("zero " + " -> ".join(percent(1 - d) for d in entry["density"]))
        if "pattern" in entry:
            words.append(" -> ".join(entry["pattern"]))
        if "decision" in entry:
            words.append("runs " + " -> ".join(short_format(d) for d in entry["decision"]))
        folded.setdefault("; ".join(words), []).append(entry["name"])
    for what, names in folded.items():
        who = f"all {shared} layers" if len(names) == shared > 1 else ", ".join(_fold_names(names))
        yield f"{who}: {what}"


def _fold_names(names: Sequence[str]) -> list[str]:
    from sparsec.report_fold import merge_names, template

    by_template: dict[str, list[str]] = {}
    for name in names:
        by_template.setdefault(template(name), []).append(name)
    return [merge_names(group) for group in by_template.values()]
