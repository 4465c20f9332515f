"""``search``: the fastest recipe for a model that keeps an accuracy budget, and the front of what can be had.

In: a model, text, a budget such as ``ppl<=1.02x``. Out: ``Found``: every trial, the Pareto front of accuracy loss over
expected time, the recipe chosen. A trial prunes the model as ``sparsify`` does, reads held-out windows, asks the plan
what the pruned weights cost on the target, and puts the dense weights back bit for bit from one copy.

Windows are read in two halves: by one the search chooses, the other it never sees, so what is promised of the chosen
recipe is not the luckiest of many draws. Trials are proposed by optuna's multi-objective TPE (Ozaki et al., 2020); the
same seed and the same finished trials give the same next proposal, so a killed search goes on as if it had not been.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import BadOptionValue, InputError, MissingPackage
from sparsec.search_front import Budget, Trial, fastest, front
from sparsec.search_space import Space, key_of
from sparsec.search_store import Store

if TYPE_CHECKING:
    import os

    from torch import nn

    from sparsec.models import LoadedModel

__all__ = ["Budget", "Found", "Space", "Trial", "explore", "search"]

TRIALS = 20
SAMPLES, SEQLEN = 64, 512  # of calibration: enough to rank methods, and many trials pay for it
WINDOWS = 64
_STARTUP = 8  # random trials before the sampler models anything
_BRACKETS = 3  # sparsities after the first one, each halfway to where the budget must lie
_REPEATED = 5  # proposals in a row that are known already, after which one that is not is drawn
Measure = Callable[[Mapping[str, Any]], Trial]
Tick = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Found:
    """What a search found. ``dense``: the dense model with loss 0; ``value``: its perplexity (or 1.0, a cosine).
    ``inductor``: seconds of the linear layers as Inductor runs them.

    ``trials`` in the order in which they were proposed; ``chosen`` is None where no recipe keeps the budget and is
    expected to be faster than dense. ``recipe``: the chosen one, for ``sparsify``. ``rows``: of x, for which times are.
    """

    model: str
    budget: Budget
    value: float
    dense: Trial
    inductor: float
    trials: tuple[Trial, ...]
    chosen: Trial | None
    recipe: dict[str, Any] | None
    rows: int
    target: str
    text: str
    windows: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        return self.budget.limit(self.value)

    @property
    def front(self) -> tuple[Trial, ...]:
        """What no other beats in both, the slowest first; the dense model stands at its beginning."""
        return front((self.dense, *self.trials))

    def speedup(self, trial: Trial) -> float:
        """Of all linear layers over Inductor's dense ones, as expected; the dense model may gain too (panels)."""
        return self.inductor / trial.seconds

    def to_dict(self) -> dict[str, Any]:
        from sparsec.search_report import to_dict

        return to_dict(self)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write search.json, recipe.yaml where one was chosen, pareto.png where matplotlib is there."""
        from sparsec.search_report import save

        return save(self, Path(folder))

    def __str__(self) -> str:
        from sparsec.search_report import lines

        return "\n".join(lines(self))


def search(
    model: nn.Module | LoadedModel,
    data: Any,
    budget: str | Budget,
    *,
    tokenizer: Any = None,
    space: Space | None = None,
    trials: int = TRIALS,
    minutes: float | None = None,
    seed: int = 0,
    samples: int = SAMPLES,
    seqlen: int = SEQLEN,
    eval_text: str | os.PathLike[str] | None = None,
    windows: int = WINDOWS,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """Search ``space`` for the fastest recipe within ``budget``; the model's weights are the same afterwards.

    ``data``: calibration text (a path, or a list of texts), read for ``samples`` segments of ``seqlen`` tokens.
    ``eval_text``: a file to measure on, else what calibration leaves of ``data``; ``windows`` of it, half for choosing
    and half for what is promised. ``minutes``: no trial begins later. ``output``: a folder whose trials.jsonl is gone
    on with where model, data and space are the same.

    Raises BadOptionValue (budget, space), MissingPackage (optuna), InputError (text, model), OtherRun, RecipeError.
    """
    from sparsec.cli.common import progress as progress_bar
    from sparsec.search_trial import Bench, as_loaded_model

    started = time.monotonic()
    wanted, space = Budget.parse(budget), space or Space()
    if trials < 1 or (minutes is not None and not minutes > 0):
        raise BadOptionValue(key="trials", value=trials, expected="it must be at least 1, and minutes above 0")
    need_optuna()
    loaded = as_loaded_model(model, tokenizer)
    check_metric(wanted, loaded)
    space, notes = space.fitted(loaded.model)
    with progress_bar("sparsec search", quiet=not progress) as tick:
        tick(0, trials, "reads the dense model")
        bench = Bench.of(loaded, data, space, seed, samples, seqlen, eval_text, windows)
        limit = wanted.limit(bench.value)
        if limit < 0:
            raise BadOptionValue(
                key="budget", value=str(wanted), expected=f"the dense model itself has perplexity {bench.value:.4g}"
            )
        store = Store.at(output, bench.about, bench.inductor)
        bench = bench.counting_from(store.inductor)
        deadline = None if minutes is None else started + 60.0 * minutes
        done = explore(bench.trial, space, limit, trials, seed=seed, store=store, deadline=deadline, tick=tick)
    chosen = fastest(done, limit, bench.dense.seconds)
    return Found(
        loaded.name,
        wanted,
        bench.value,
        bench.dense,
        bench.inductor,
        tuple(done),
        chosen,
        bench.recipe(chosen.params) if chosen else None,
        space.rows,
        space.target,
        bench.text,
        len(bench.windows),
        time.monotonic() - started,
        (*notes, *bench.notes),
    )


def explore(
    measure: Measure,
    space: Space,
    limit: float,
    trials: int,
    *,
    seed: int = 0,
    store: Store | None = None,
    deadline: float | None = None,
    tick: Tick | None = None,
) -> list[Trial]:
    """Up to ``trials`` different recipes of ``space`` by ``measure``, in the order of their proposal.

    What ``store`` holds is not measured again. ``limit``: the loss around which the sampler looks. ``deadline``: of
    ``time.monotonic``. Fewer come back where the space has no more, or the time is over; one is measured in any case.
    """
    optuna = need_optuna()
    store = store or Store()
    done: dict[str, Trial] = {}
    everything = {key_of(params): params for params in space.all()}
    repeated, brackets = 0, _BRACKETS
    with _quiet(optuna):
        study = _study(optuna, space, seed)
        while len(done) < min(trials, len(everything)):
            asked = study.ask()
            params = space.suggest(asked)
            key = key_of(params)
            repeated = repeated + 1 if key in done else 0
            found = done.get(key) or store.get(key)
            if found is None:
                if done and deadline is not None and time.monotonic() >= deadline:
                    break
                if tick:
                    tick(len(done), trials, Trial(params).name)
                found = store.add(key, measure(params))
            done[key] = found
            if found.failed:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                asked.set_constraint("over the budget", found.loss - limit)
                study.tell(asked, [found.loss, found.seconds])
            if brackets and params["pattern"] == "unstructured" and _plain(params, space):
                brackets -= 1
                if (share := _bracketed(done.values(), space, limit)) is not None:
                    study.enqueue_trial({**params, "sparsity": share})
            if repeated >= _REPEATED:
                unseen = [params for key, params in everything.items() if key not in done]
                study.enqueue_trial(random.Random(f"{seed} {len(done)}").choice(unseen))
    return list(done.values())


def _plain(params: Mapping[str, Any], space: Space) -> bool:
    """Whether a recipe is one of the line on which the budget is looked for: the first of everything but sparsity."""
    first = {"method": space.methods[0], "allocator": space.allocators[0]}
    return all(params[key] == value for key, value in first.items()) and params["repair"] in ("none", space.repairs[0])


def _bracketed(done: Iterable[Trial], space: Space, limit: float) -> float | None:
    """The next sparsity of the line, by which of those tried kept the budget."""
    line = [t for t in done if t.params["pattern"] == "unstructured" and _plain(t.params, space) and not t.failed]
    kept = max((t.params["sparsity"] for t in line if t.loss <= limit), default=None)
    missed = min((t.params["sparsity"] for t in line if t.loss > limit), default=None)
    return space.between(kept, missed)


def _study(optuna: Any, space: Space, seed: int) -> Any:
    """In memory: what was told to it comes again from the store, in the same order."""
    sampler = optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=_STARTUP,
        multivariate=True,
        group=True,  # parameters that only some patterns have
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for params in space.starts():
        study.enqueue_trial(params)
    return study


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """No log lines and no warnings about what optuna calls experimental; both as they were afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def need_optuna() -> Any:
    """The module optuna. Raises MissingPackage."""
    try:
        import optuna
    except ImportError:
        raise MissingPackage(feature="sparsec search", package="optuna", extra="search") from None
    return optuna


def check_metric(budget: Budget, loaded: LoadedModel) -> None:
    """Raises InputError for a model that no budget fits, BadOptionValue for a budget of the other kind."""
    metric = {"causal": "ppl", "encoder": "cos"}.get(loaded.kind)
    if metric is None:
        raise InputError(detail=f"{loaded.name} takes no text, and the search measures accuracy on text")
    if metric != budget.metric:
        like = "ppl<=1.02x" if metric == "ppl" else "cos>=0.95"
        raise BadOptionValue(
            key="budget", value=str(budget), expected=f"{loaded.name} is measured by {metric}, as in {like}"
        )
