"""An ``Outcome`` as JSON types, as lines of text, and as one page. Nothing here measures.

In: an Outcome. Out: a dict (``sparsec_report.json``, ``--json``), lines (the terminal), HTML that works from
``file://`` without network and without JavaScript.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sparsec.report_data import duration, megabytes, percent, short_format
from sparsec.report_html import Bar, bars, kind, script_json, template
from sparsec.svg import Band, Series, plot

if TYPE_CHECKING:
    from sparsec.explain import Explanation
    from sparsec.gated_report import GatedLayer
    from sparsec.sparsify_outcome import Accuracy, Outcome
    from sparsec.sparsify_report import PrunedLayer

SCHEMA = 1
_SHARES = ("asked", "achieved")
_OF_EXPLAIN = ("environment", "batch", "tokens", "total", "linear_layers", "failures", "notes", "what_would_help")
_OF_LAYER = ("name", "shape", "dtype", "density", "pattern", "decision", "reason", "bytes", "expected", "measured")


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """``Report.to_dict`` with schema, model, accuracy, speed, memory, forecast_seconds and outcome_notes."""
    return {
        "schema": SCHEMA,
        "model": outcome.model,
        **outcome.report.to_dict(),
        "accuracy": None if outcome.accuracy is None else outcome.accuracy.to_dict(),
        "speed": None if outcome.speed is None else _speed(outcome.speed),
        "memory": asdict(outcome.memory),
        "forecast_seconds": outcome.forecast_seconds,
        "outcome_notes": list(outcome.notes),
    }


def _speed(speed: Explanation) -> dict[str, Any]:
    """What ``sparsec explain --json`` says, without curves and pictures."""
    said = speed.to_dict()
    layers = [{key: layer[key] for key in _OF_LAYER} | {"batches": layer["batches"]} for layer in said["layers"]]
    sizes = {layer["name"]: layer["bytes"] for layer in layers}.values()  # a layer called twice is stored once
    stored = {way: sum(size[way] for size in sizes) for way in ("dense", "ours")}
    return {**{key: said[key] for key in _OF_EXPLAIN}, "bytes": stored, "layers": layers}


# ------------------------------------------------------------------------------------------------------------- text


def lines(outcome: Outcome) -> Iterator[str]:
    """What the terminal shows below the table of layers."""
    body = to_dict(outcome)
    if outcome.accuracy is not None:
        yield f"accuracy  {accuracy_sentence(outcome.accuracy)}"
    if outcome.speed is not None:
        yield from (f"speed     {line}" for line in speed_sentences(outcome.speed))
        size = body["speed"]["bytes"]
        dense, ours = megabytes(size["dense"]), megabytes(size["ours"])
        yield f"weights   {dense} of linear layers dense, {ours} in the formats that would run"
    yield f"memory    {memory_sentence(outcome)}"
    yield from (f"note: {note}" for note in notes_of(outcome))


def accuracy_sentence(found: Accuracy) -> str:
    """``perplexity 12.72 -> 14.01: +10.1 % (95 % interval +9.3 % to +11.0 %, paired), worse; on ...``."""
    r = found.result
    where = f"{r.n} windows, {found.tokens} tokens of {found.text}"
    spread = "too few windows for an interval"
    if r.interval is not None:
        low, high = (change(r.task, end) for end in r.interval)
        spread = f"95 % interval {low} to {high}, paired"
    verdict = f", {r.verdict}" if r.verdict else ""
    if r.task == "ppl":
        return f"perplexity {r.dense:.2f} -> {r.value:.2f}: {change(r.task, r.delta)} ({spread}){verdict}; {where}"
    return f"similarity to the dense model's embeddings {r.value:.4f}: {change(r.task, r.delta)} ({spread}); {where}"


def change(task: str, delta: float | None) -> str:
    """A difference of a metric as it is read: of perplexity in percent, of cosine as it is."""
    if delta is None:
        return "-"
    if task != "ppl":
        return f"{delta:+.4f}"
    return f"{100 * math.expm1(min(delta, 700.0)):+.1f} %"


def speed_sentences(speed: Explanation) -> Iterator[str]:
    from sparsec.report_text import interval, ways, whole

    if not speed.layers:
        failed = speed.failures[0] if speed.failures else ""
        yield f"the model's graph could not be read: {failed}" if failed else "no linear layer was found in its graph"
        return
    of = f" of {speed.tokens} token{'s' if speed.tokens > 1 else ''}" if speed.tokens else ""
    costs = [(batch, cost) for batch in speed.batches if (cost := speed.expected(batch))]
    if costs:
        said = ", ".join(f"{cost.speedup:.2f}x at batch {batch}{of}" for batch, cost in costs)
        sparse, _ = ways(speed)
        yield f"expected for the linear layers: {said}; {sparse} of {len(speed.layers)} run sparse ({speed.target})"
    if measured := speed.measured():
        yield f"measured for the linear layers: {measured.speedup:.2f}x ({interval(measured)})"
    if speed.whole is not None:
        yield f"measured for the whole model: {whole(speed.whole)}"


def memory_sentence(outcome: Outcome) -> str:
    m = outcome.memory
    grew = m.pruned - m.before
    more = f"pruning added {megabytes(grew)} to it" if grew > 0 else "pruning stayed within what was used before it"
    return (
        f"peak {megabytes(m.peak)} of this process, the model's {megabytes(m.model)} among it; {more}, "
        f"forecast {megabytes(m.forecast)}"
    )


def notes_of(outcome: Outcome) -> list[str]:
    """What the reader must know of accuracy and speed; those of pruning stand in its own table."""
    speed = outcome.speed
    return list(dict.fromkeys([*outcome.notes, *((*speed.failures, *speed.notes) if speed else ())]))


# ------------------------------------------------------------------------------------------------------------- page


def to_html(outcome: Outcome) -> str:
    """The page; its data is also in it, as one ``application/json`` block."""
    body = to_dict(outcome)
    rows = _rows(outcome, body)
    charts = list(_charts(outcome.speed, rows))
    context = {
        "d": body,
        "methods": " + ".join(step.method for step in outcome.report.recipe.steps),
        "tiles": list(_tiles(outcome, body)),
        "notes": [*notes_of(outcome), *outcome.report.notes],
        "accuracy": None if outcome.accuracy is None else accuracy_sentence(outcome.accuracy),
        "windows": _window_plot(outcome.accuracy),
        "losses": _loss_plot(outcome),
        "charts": charts,
        "kinds": sorted({segment.kind for _, pair in charts for bar in pair for segment in bar.segments}),
        "speed": list(speed_sentences(outcome.speed)) if outcome.speed else [],
        "memory": memory_sentence(outcome),
        "rows": rows,
        "gates": [_gate(gate) for gate in outcome.report.gates],
        "steps": len({layer.step for layer in outcome.report.layers}) > 1,
        "output": any(layer.output_error is not None for layer in outcome.report.layers),
        "measured": any(row["measured"][0] for row in rows),
        "recipe": outcome.report.recipe.to_yaml(),
        "text": str(outcome),
        "data": script_json(body),
    }
    return template("sparsify.html.j2").render(context)


def _tiles(outcome: Outcome, body: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(what, number, remark)."""
    count = len({layer.name for layer in outcome.report.layers})
    if count or not outcome.report.gates:
        yield "zeros", percent(outcome.report.achieved, 1), f"of the weights of {count} layers"
    if shares := [gate.achieved for gate in outcome.report.gates if gate.achieved is not None]:
        yield "zero activations", percent(sum(shares) / len(shares), 1), f"mean of {len(shares)} gates, held-out tokens"
    if found := outcome.accuracy:
        r = found.result
        spread = f"95 % {' to '.join(change(r.task, end) for end in r.interval)}" if r.interval else ""
        if r.task == "ppl":
            yield "perplexity", change(r.task, r.delta), f"{r.dense:.2f} to {r.value:.2f}; {spread}"
        else:
            yield "similarity", f"{r.value:.4f}", f"to the dense model's embeddings; {spread}"
    if (speed := outcome.speed) is None:
        return
    if whole := speed.whole:
        yield "whole model", f"{whole.speedup:.2f}x", f"measured, {whole.low:.2f} to {whole.high:.2f}"
    for batch in speed.batches:
        if cost := speed.expected(batch):
            yield f"linear layers, batch {batch}", f"{cost.speedup:.2f}x", "expected by the cost model"
    size = body["speed"]["bytes"]
    yield "weights as they run", megabytes(size["ours"]), f"instead of {megabytes(size['dense'])}, of linear layers"


def _rows(outcome: Outcome, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every layer and step, and for every linear layer that no step touched."""
    timed = {layer["name"]: layer for layer in (body["speed"] or {}).get("layers", ())}
    rows = [_row(layer.name, layer, timed.get(layer.name)) for layer in outcome.report.layers]
    pruned = {name for layer in outcome.report.layers for name in (layer.name, *layer.tied)}
    rows += [_row(name, None, layer) for name, layer in timed.items() if name not in pruned]
    return rows


def _gate(gate: GatedLayer) -> dict[str, Any]:
    share = {name: "-" if value is None else percent(value, 1) for name, value in vars(gate).items() if name in _SHARES}
    return {"gate": gate, **share}


def _row(name: str, layer: PrunedLayer | None, timed: dict[str, Any] | None) -> dict[str, Any]:
    shape = layer.shape if layer else timed["shape"] if timed else ()
    return {
        "name": name or "(the model)",
        "shape": " x ".join(map(str, shape)),
        "layer": layer,
        "step": f"{layer.step} {layer.method}" if layer else "",
        "zero": percent(layer.achieved if layer else 1 - timed["density"] if timed else 0.0, 1),
        "pattern": (layer.values if layer else "") or (timed["pattern"] if timed else layer.pattern if layer else ""),
        "runs": short_format(timed["decision"]) if timed else "",
        "kind": kind(timed["decision"]) if timed else "",
        "reason": timed["reason"] if timed else "",
        "bytes": _bytes(**timed["bytes"]) if timed else "",
        "expected": _cost(timed["expected"] if timed else None),
        "measured": _cost(timed["measured"] if timed else None),
    }


def _bytes(dense: int, ours: int) -> str:
    return megabytes(dense) if dense == ours else f"{megabytes(dense)} \u2192 {megabytes(ours)}"


def _cost(cost: dict[str, float] | None) -> tuple[str, str]:
    """``1.42x``, and the times it comes from."""
    if not cost:
        return "", ""
    return f"{cost['speedup']:.2f}x", f"{duration(cost['ours_s'])} instead of {duration(cost['dense_s'])}"


def _loss_plot(outcome: Outcome) -> str:
    layers = outcome.report.layers
    if not layers:
        return ""
    made = [Series("weight error", "index", [layer.error for layer in layers])]
    if any(layer.output_error is not None for layer in layers):
        made.append(Series("output error", "nm", [layer.output_error for layer in layers]))
    names = [layer.name for layer in layers]
    steps = len({layer.step for layer in layers})
    said = f"{len(set(names))} layers{f', {steps} steps' if steps > 1 else ''}"
    return plot(made, names, lambda v: f"{v:.3g}", below=f"{said} in the order in which they were pruned")


def _window_plot(found: Accuracy | None) -> str:
    if found is None:
        return ""
    differences = sorted(found.differences)
    ends = found.result.interval
    band = Band(found.result.delta or 0.0, *ends) if ends else None
    names = [f"window {i} of {len(differences)}" for i in range(1, len(differences) + 1)]
    unit = "nats per token more than dense" if found.result.task == "ppl" else "cosine less one"
    said = f"each window's difference ({unit}), sorted; the band is the 95 % interval of the mean"
    one = Series("difference", "bitmap", differences)
    return plot([one], names, lambda v: f"{v:+.3g}", below=said, band=band, lines=False)


def _charts(speed: Explanation | None, rows: list[dict[str, Any]]) -> Iterator[tuple[int, list[Bar]]]:
    """Where the time goes, with links to the rows of this page."""
    if speed is None:
        return
    places = {row["name"]: i for i, row in enumerate(rows)}
    groups = speed.groups
    homes = {f"#row-{i}": f"#row-{places.get(group.first.name, 0)}" for i, group in enumerate(groups)}
    for i, batch in enumerate(speed.batches):
        pair = [
            replace(bar, segments=tuple(replace(s, href=homes.get(s.href, "#layers")) for s in bar.segments))
            for bar in bars(speed, groups, i)
        ]
        if pair:
            yield batch, pair
