"""What a search found, for people and machines: lines of a table, JSON, a recipe, a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.cache import write_atomic
from sparsec.errors import WriteFailed
from sparsec.report_data import duration

if TYPE_CHECKING:
    from sparsec.search import Found
    from sparsec.search_front import Check, Trial

_PLOTTED = 1.0  # losses beyond ten times the limit, or twice the dense perplexity, would flatten the rest


def lines(found: Found) -> Iterator[str]:
    """The front as a table, the choice, and what it rests on."""
    from sparsec.sparsify_report import counted, table

    tried = [t for t in found.trials if not t.failed]
    yield (
        f"search {found.model}: {counted(len(tried), 'recipe')}, {_hidden(found)}; budget {found.budget}, "
        f"{_rows(found)} on {found.target}, {found.seconds:.0f} s"
    )
    yield ""
    metric = "cosine" if found.budget.metric == "cos" else "ppl"
    head = ("recipe", "zeros", metric, "loss", "unseen text, 95 %", "linear layers", "speedup", "")
    shown = [found.dense, *(trial for trial in found.front if trial is not found.dense)]
    yield from table(head, [_row(found, trial) for trial in shown])
    yield ""
    yield from _choice(found)
    half = found.windows // 2
    yield (
        f"{metric} and loss: {found.windows - half} windows that the search chose by; unseen: {half} others. "
        f"Text: {found.text}."
    )
    yield (
        f"linear layers: seconds that the plan expects on {found.target}, before any tuning; Inductor's: "
        f"{duration(found.inductor)}"
    )
    for trial in found.trials:
        if trial.failed:
            yield f"note: {trial.name} was not possible: {trial.failed}"
    yield from (f"note: {note}" for note in found.notes)


def _hidden(found: Found) -> str:
    """What the table shows, and where the rest is."""
    tried = sum(not t.failed for t in found.trials)
    shown = sum(t is not found.dense for t in found.front)
    return f"{shown} of them on the front, which is what is listed" + (
        f" (all {tried} are in search.json)" if shown < tried else ""
    )


def _row(found: Found, trial: Trial) -> tuple[str, ...]:
    mark = "<- chosen" if trial is found.chosen else "over the budget" if trial.loss > found.limit else ""
    return (
        trial.name,
        f"{trial.zeros:.1%}",
        f"{value(found, trial.loss):.4g}",
        percent(trial.loss),
        interval(trial.check) if trial.check else "",
        duration(trial.seconds),
        f"{found.speedup(trial):.2f}x",
        mark,
    )


def _rows(found: Found) -> str:
    return f"{found.rows} row{'s' if found.rows > 1 else ''}"


def value(found: Found, loss: float) -> float:
    """The perplexity or cosine of a loss."""
    return 1.0 - loss if found.budget.metric == "cos" else found.value * (1.0 + loss)


def percent(loss: float) -> str:
    return f"{100 * loss:+.2f} %"


def interval(check: Check) -> str:
    return f"{percent(check.loss)} [{100 * check.low:+.2f}, {100 * check.high:+.2f}]"


def _choice(found: Found) -> Iterator[str]:
    chosen = found.chosen
    if chosen is None:
        yield _no_choice(found)
        return
    over = found.dense.seconds / chosen.seconds
    yield (
        f"chosen: {chosen.name}, {found.speedup(chosen):.2f}x expected for the linear layers over Inductor, "
        f"{over:.2f}x over the dense weights"
    )
    if chosen.check is None:
        return
    said = {
        "within": "keeps the budget",
        "over": "misses the budget; search with more windows, or a stricter budget",
        "not separable": "its interval holds the limit: more windows would tell",
    }[chosen.check.verdict(found.limit)]
    yield f"on text that the search did not choose by: loss {interval(chosen.check)}, {said}"


def _no_choice(found: Found) -> str:
    within = [t for t in found.trials if not t.failed and t.loss <= found.limit]
    if within:
        return (
            "nothing chosen: no recipe within the budget is expected to be faster than dense here; "
            "try a larger model, fewer rows, or higher sparsities"
        )
    closest = min((t for t in found.trials if not t.failed), key=lambda t: t.loss, default=None)
    if closest is None:
        return "nothing chosen: no recipe could be run"
    return (
        f"nothing chosen: no recipe keeps {found.budget}; the closest is {closest.name} with {percent(closest.loss)}. "
        f"Allow more, or {_lower(found, closest)}"
    )


def _lower(found: Found, closest: Trial) -> str:
    """The flag that would let the search try less sparsity than the closest recipe has."""
    tried = [t.params["sparsity"] for t in found.trials if t.params.get("sparsity") is not None]
    lowest = min(tried, default=closest.zeros)
    if lowest <= 0.1:
        return f"try less than {lowest:.0%}: --sparsity 0.01-{lowest:g}"
    return f"let the search try lower sparsities: --sparsity 0.05-{max(round(lowest, 2), 0.1):g}"


def to_dict(found: Found) -> dict[str, Any]:
    """JSON types. Times in seconds; losses as in ``Trial``."""
    return {
        "model": found.model,
        "budget": str(found.budget),
        "metric": found.budget.metric,
        "limit": found.limit,
        "dense": {**found.dense.to_dict(), "value": found.value},
        "inductor": found.inductor,
        "rows": found.rows,
        "target": found.target,
        "text": found.text,
        "windows": found.windows,
        "seconds": found.seconds,
        "chosen": None if found.chosen is None else _entry(found, found.chosen),
        "recipe": found.recipe,
        "front": [_entry(found, trial) for trial in found.front],
        "trials": [_entry(found, trial) for trial in found.trials],
        "notes": list(found.notes),
    }


def _entry(found: Found, trial: Trial) -> dict[str, Any]:
    if trial.failed:
        return {"name": trial.name, **trial.to_dict()}
    verdict = trial.check.verdict(found.limit) if trial.check else ""
    numbers = {"value": value(found, trial.loss), "speedup": found.speedup(trial), "unseen": verdict}
    return {"name": trial.name, **trial.to_dict(), **numbers}


def save(found: Found, folder: Path) -> list[Path]:
    """Raises WriteFailed. A recipe that an earlier budget chose goes away where nothing is chosen now."""
    from sparsec.recipe_file import to_yaml

    files = {"search.json": json.dumps(to_dict(found), indent=1) + "\n"}
    if found.recipe is not None:
        files["recipe.yaml"] = to_yaml(found.recipe)
    picture = folder / "pareto.png"
    try:
        for name, text in files.items():
            write_atomic(folder / name, text.encode())
        if found.recipe is None:
            (folder / "recipe.yaml").unlink(missing_ok=True)
        drawn = draw(found, picture)
    except OSError as error:
        raise WriteFailed(path=os.fspath(folder), why=error.strerror or str(error)) from error
    return [*(folder / name for name in files), *([picture] if drawn else [])]


def draw(found: Found, path: Path) -> bool:
    """Loss over expected time, the front as a line. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    top = max(10 * found.limit, _PLOTTED if found.budget.metric == "ppl" else 0.1)
    tried = [t for t in found.trials if not t.failed and t.loss <= top]
    beyond = sum(not t.failed for t in found.trials) - len(tried)
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(t.params["method"] for t in tried):
        mine = [t for t in tried if t.params["method"] == method]
        axes.plot(*_places(found, mine), "o", markersize=5, alpha=0.75, label=method)
    ahead = [t for t in found.front if t.loss <= top]
    axes.plot(
        *_places(found, ahead), "-", color="0.25", linewidth=1.2, label="Pareto front", zorder=1, drawstyle="steps-pre"
    )
    axes.plot(*_places(found, [found.dense]), "s", color="0.25", label="dense")
    axes.axhline(100 * found.limit, color="tab:red", linestyle="--", linewidth=1, label=f"budget {found.budget}")
    if found.chosen is not None:
        (x,), (y,) = _places(found, [found.chosen])
        axes.plot(x, y, "*", color="tab:red", markersize=14, zorder=3)
        axes.annotate(found.chosen.name, (x, y), (8, 8), textcoords="offset points", fontsize=8)
    what = "loss of cosine, %" if found.budget.metric == "cos" else "perplexity over dense, %"
    away = f" ({beyond} worse than {100 * top:.0f} % not shown)" if beyond else ""
    axes.set(
        xlabel=f"expected speedup of the linear layers over Inductor, {_rows(found)} on {found.target}", ylabel=what
    )
    count = sum(not t.failed for t in found.trials)
    axes.set_title(f"{found.model}: {count} recipe{'s' * (count != 1)}{away}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    if found.limit > 0:  # evenly up to the budget, where the choice is, by decades above
        _scale(axes, 100 * found.limit)
    figure.savefig(path, dpi=130)
    return True


def _scale(axes: Any, limit: float) -> None:
    low, high = axes.get_ylim()
    ticks = [m * limit * 10**e for e in range(4) for m in (1, 2, 5)]
    axes.set_yscale("symlog", linthresh=limit)
    axes.set_yticks([t for t in (0.0, limit / 2, *ticks) if low <= t <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(low if low < -limit else -limit / 10, high)


def _places(found: Found, trials: list[Trial]) -> tuple[list[float], list[float]]:
    return [found.speedup(t) for t in trials], [100 * t.loss for t in trials]
