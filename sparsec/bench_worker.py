"""One process of ``sparsec bench``: a job as JSON on stdin, events as JSON lines on stdout, chatter on stderr.

Events: ``{"event": "progress", done, total, what}``, ``{"event": "record", record}``, ``{"event": "error", ...}``.
"""

from __future__ import annotations

import datetime
import inspect
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec import __version__, models, records, whole_model
from sparsec.bench import BenchRecord, summary
from sparsec.errors import BadOptionValue, SparsecError
from sparsec.options import Options
from sparsec.targets import resolve
from sparsec.timing import Samples, speedup

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """One thing to time. ``units``: tokens (or samples) that one timed call works through."""

    name: str
    batch: int
    n_prompt: int
    n_gen: int
    units: int
    unit: str
    make: whole_model.Make


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not end up between the events

    def emit(event: dict[str, Any]) -> None:
        out.write(json.dumps(event, default=str) + "\n")
        out.flush()

    try:
        work(json.load(sys.stdin), emit)
    except SparsecError as error:
        emit({"event": "error", "error": type(error).__name__, "fields": error.fields})
    except Exception as error:
        if os.environ.get("SPARSEC_DEBUG"):
            raise
        emit({"event": "error", "error": type(error).__name__, "detail": f"{type(error).__name__}: {error}"})


def work(job: Mapping[str, Any], emit: Emit) -> None:
    """Load the model, then time each test. Raises what ``load_model`` and ``Options.parse`` raise."""
    options = Options.parse(job["options"])
    if job["threads"][0]:
        torch.set_num_threads(job["threads"][0])
    emit({"event": "progress", "done": 0, "total": 100, "what": "loading"})
    loaded = models.load_model(job["models"][0], job["dtype"])
    cases = cases_of(loaded, job)
    common = {
        "sparsec_version": __version__,
        "build_commit": job["commit"],
        "torch_version": torch.__version__,
        **_machine(options.policy.target),
        "model_filename": job["models"][0],
        **_about(loaded),
        "n_threads": torch.get_num_threads(),
    }
    for number, case in enumerate(cases):

        def tell(what: str, share: float, number: int = number, case: Case = case) -> None:
            done = int(100 * (number + share))
            emit({"event": "progress", "done": done, "total": 100 * len(cases), "what": f"{case.name} {what}"})

        for record in time_case(loaded, case, job, common, tell):
            emit({"event": "record", "record": record.to_dict()})


def cases_of(loaded: models.LoadedModel, job: Mapping[str, Any]) -> list[Case]:
    """Causal models: pp (a prompt) and tg (tokens one by one); others: one forward. Raises BadOptionValue."""
    prompts = job["prompts"] if job["prompts"] is not None else [min(512, loaded.context or 512)]
    cases = []
    for batch in job["batches"]:
        if loaded.kind in ("vision", "module"):
            cases.append(_forward(loaded, batch, prompts[0] or 1))
            continue
        cases += [_forward(loaded, batch, p) for p in prompts if p]
        if loaded.kind == "causal":
            cases += [_generation(loaded, batch, n) for n in job["gens"] if n]
    if not cases:
        raise BadOptionValue(key="-p", value=0, expected="-p or -n must ask for at least one token")
    return cases


def _forward(loaded: models.LoadedModel, batch: int, tokens: int) -> Case:
    kwargs = loaded.prompt(batch, tokens)
    causal, counts = loaded.kind == "causal", loaded.kind in ("causal", "encoder")
    if not counts:
        return Case("fwd", batch, 0, 0, batch, "samples", lambda call: lambda: call(**kwargs))
    name = f"pp{tokens}" if causal else f"fwd{tokens}"
    return Case(name, batch, tokens, 0, batch * tokens, "tokens", lambda call: lambda: call(**kwargs))


def _generation(loaded: models.LoadedModel, batch: int, tokens: int) -> Case:
    """``tokens`` decoding steps from an empty static cache.

    The tokens are given (random, as llama-bench has it): both engines do the same work, and their last logits can be
    compared, which a token chosen the other way by a rounding would prevent.
    """
    if loaded.context is not None and tokens > loaded.context:
        raise BadOptionValue(key="-n", value=tokens, expected=f"{loaded.name} takes at most {loaded.context}")
    from transformers import StaticCache

    cache: Any = StaticCache(config=loaded.config, max_cache_len=tokens)
    ids = loaded.inputs(batch, tokens)["input_ids"].split(1, dim=1)
    positions = [torch.full((batch, 1), i) for i in range(tokens)]
    masks = _masks(tokens, next(loaded.model.parameters()).dtype, cache)
    names = inspect.signature(loaded.model.forward).parameters
    held = "cache" if "cache" in names else "past_key_values"  # transformers renamed it in 5.24

    def kwargs(i: int) -> dict[str, Any]:
        said = {"input_ids": ids[i], "position_ids": positions[i], "attention_mask": masks[i], held: cache}
        return {**{k: v for k, v in said.items() if k in names}, "use_cache": True}

    with torch.no_grad():
        loaded.model(**kwargs(0))  # eagerly once: the cache allocates itself at its first use

    def make(call: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            cache.reset()
            for i in range(tokens):
                logits = call(**kwargs(i)).logits
            return logits  # type: ignore[no-any-return]

        return run

    return Case(f"tg{tokens}", batch, 0, tokens, batch * tokens, "tokens", make)


def _masks(tokens: int, dtype: torch.dtype, cache: Any) -> Sequence[torch.Tensor | None]:
    """Step i sees positions 0..i: additive [1, 1, 1, tokens]. Made outside the timing, as ``generate`` makes them
    outside the graph. Models with sliding layers make their own."""
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return [None] * tokens
    hidden = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)
    return [hidden[i].view(1, 1, 1, tokens).clone() for i in range(tokens)]


def time_case(
    loaded: models.LoadedModel,
    case: Case,
    job: Mapping[str, Any],
    common: Mapping[str, Any],
    tell: Callable[[str, float], None],
) -> list[BenchRecord]:
    """Time one case with both engines; [dense record, sparsec record]."""
    torch.compiler.reset()  # type: ignore[no-untyped-call]
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    timed = whole_model.time_both(
        loaded.model, case.make, job["options"], rounds=job["rounds"], warmup=2 if job["warmup"] else 1, tell=tell
    )
    rest = {**common, "test_time": started, "notes": " ".join(timed.notes)}
    path = path_taken(timed.seen)
    return [
        _record(case, rest, timed.base, timed.dense, timed.dense, "as it is", 0.0),
        _record(case, rest, "sparsec", timed.sparse, timed.dense, path, timed.difference),
    ]


def path_taken(seen: Sequence[records.CompileRecord]) -> str:
    """``"bitmap 24, dense 13"``: layers by the format they ran at the rows of this test."""
    layers = {}
    for record in seen:
        if record.failure:
            return "dense (fallback)"  # the reason was a warning, so it is in the notes
        layers.update({(layer.name, layer.site.node): layer for layer in record.layers})
    chosen = Counter(layer.decision.at(_rows(layer.site.x_shape)).format for layer in layers.values())
    return ", ".join(f"{name.partition('+')[0]} {count}" for name, count in chosen.most_common()) or "no linear layer"


def _rows(x_shape: Sequence[int | str]) -> int:
    return max(1, math.prod(size for size in x_shape[:-1] if isinstance(size, int)))


def _record(
    case: Case, common: Mapping[str, Any], backend: str, ours: Samples, base: Samples, path: str, difference: float
) -> BenchRecord:
    ns = tuple(1e9 * s for s in ours.seconds)
    rates = tuple(case.units / s for s in ours.seconds)
    ratio = speedup(base, ours)
    (avg_ns, stddev_ns), (avg_ts, stddev_ts) = summary(ns), summary(rates)
    return BenchRecord(
        **common,
        backend=backend,
        n_batch=case.batch,
        n_prompt=case.n_prompt,
        n_gen=case.n_gen,
        test=case.name,
        unit=case.unit,
        avg_ns=avg_ns,
        stddev_ns=stddev_ns,
        avg_ts=avg_ts,
        stddev_ts=stddev_ts,
        speedup=ratio.value,
        speedup_low=ratio.low,
        speedup_high=ratio.high,
        path=path,
        difference=difference,
        samples_ns=ns,
        samples_ts=rates,
    )


def _machine(target: str) -> dict[str, Any]:
    found = resolve(target)
    return {"cpu_info": found.model, "isa": found.isa + ("+bf16" if found.bf16_dot else "")}


def _about(loaded: models.LoadedModel) -> dict[str, Any]:
    matrices = [p for p in loaded.model.parameters() if p.dim() >= 2]
    zero = sum(p.numel() - int(p.count_nonzero()) for p in matrices)
    return {
        "model_type": f"{getattr(loaded.config, 'model_type', type(loaded.model).__name__)} {loaded.kind}",
        "model_size": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        "model_n_params": loaded.weights,
        "zeros": zero / max(sum(p.numel() for p in matrices), 1),
        "dtype": loaded.dtype,
    }


if __name__ == "__main__":
    main()
