"""One trial of a search: prune, read the held-out windows, ask the plan for seconds, put the dense weights back."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsec import evaluate, targets
from sparsec.cache import digest
from sparsec.calibration import calibrate, segments_of
from sparsec.calibration_text import named
from sparsec.errors import InputError, SparsecError, SparsecWarning
from sparsec.expected_time import cost_now
from sparsec.models import LoadedModel
from sparsec.passes.masks.evaluating import evaluating
from sparsec.prunable import survey
from sparsec.recipe import Calibration, Recipe
from sparsec.search_front import Check, Trial
from sparsec.search_space import Space
from sparsec.sparsify import Report, execute, fingerprint, prepare
from sparsec.sparsify_outcome import as_loaded, spread

LEAST_WINDOWS = 4  # two for each half: an interval needs as many
_LOGIT_BYTES = 64 << 20  # of the logits of one batch of windows


def as_loaded_model(model: nn.Module | LoadedModel, tokenizer: Any) -> LoadedModel:
    """A module that the caller holds, or what ``load_model`` gave."""
    return model if isinstance(model, LoadedModel) else as_loaded(model, tokenizer)


class Weights:
    """One copy, on the CPU, of everything in the layers that a recipe may prune; ``restore`` puts it back, bit for bit.

    Tied weights are held once. Parameters keep their identity, so optimisers and ties stay as they were.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = survey(model).layers
        modules = {name: model.get_submodule(name) for name in layers}
        own = {id(p): p for module in modules.values() for p in module.parameters(recurse=False)}
        self._kept = [(p, p.detach().to("cpu", copy=True)) for p in own.values()]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, dense in self._kept:
            parameter.copy_(dense)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Whatever happens inside, the dense weights are back afterwards."""
        try:
            yield
        finally:
            self.restore()


@dataclass(frozen=True, eq=False)
class Bench:
    """What all trials share. ``before``: what the dense model says of each window; even ones choose, odd ones check.

    ``about``: hashes of what trials must share to be compared. ``inductor``: seconds of the linear layers as Inductor
    runs them dense. Rates are measured anew in other processes, so times are kept as ratios to it.
    """

    loaded: LoadedModel
    space: Space
    seed: int
    calibration: Calibration
    samples: Any
    windows: list[list[int]]
    text: str
    before: torch.Tensor
    value: float
    dense: Trial
    inductor: float
    weights: Weights
    about: Mapping[str, str]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        data: Any,
        space: Space,
        seed: int,
        samples: int,
        seqlen: int,
        eval_text: str | os.PathLike[str] | None,
        windows: int,
    ) -> Bench:
        """Raises what reading text and models raises, InputError where there are too few windows or no times."""
        seqlen = min(seqlen, loaded.context or seqlen)
        path = os.fspath(data) if isinstance(data, (str, os.PathLike)) else None
        calibration = Calibration(dataset=path, samples=samples, seqlen=seqlen, seed=seed)
        found, text = _windows(loaded, data, calibration, eval_text, windows)
        calibrated = calibrate(data, calibration, loaded.model, loaded.tokenizer)
        before = _read(loaded, found)
        dense, _ = evaluate.compare_windows(before, before)
        cost = cost_now(_matrices(loaded.model), space.target, space.rows)
        if cost.dense_s <= 0:
            raise InputError(detail=f"no times are known for {loaded.dtype} layers on {space.target}; try --dtype fp32")
        machine = targets.resolve(space.target).fingerprint
        about = {
            "model": fingerprint(loaded.model),
            "data": digest(calibrated.sha, repr(found)),
            "search space": digest(repr(space), str(seed), calibration.model_dump_json(), machine),
        }
        return cls(
            loaded,
            space,
            seed,
            calibration,
            calibrated.samples,
            found,
            text,
            before,
            dense.value if loaded.kind == "causal" else 1.0,
            Trial({}, 0.0, cost.ours_s, _zeros(loaded.model)),
            cost.dense_s,
            Weights(loaded.model),
            about,
            calibrated.notes,
        )

    def counting_from(self, inductor: float) -> Bench:
        """With the seconds that an earlier process counted from."""
        dense = replace(self.dense, seconds=self.dense.seconds * inductor / self.inductor)
        return replace(self, inductor=inductor, dense=dense)

    def recipe(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """With every default filled in; runs again to the same weights."""
        asked = self.space.recipe(params, self.calibration, self.seed)
        return prepare(self.loaded.model, asked).recipe.to_dict()

    def trial(self, params: Mapping[str, Any]) -> Trial:
        """One recipe's numbers. What a SparsecError says of it becomes a failed trial; the weights are dense again."""
        started = time.perf_counter()
        try:
            with self.weights.borrowed():
                found = self._pruned(params)
        except SparsecError as error:
            found = Trial(params, failed=str(error))
        took = time.perf_counter() - started
        return Trial(params, found.loss, found.seconds, found.zeros, found.check, took, found.failed)

    def prune(self, params: Mapping[str, Any]) -> Report:
        """Write the recipe's zeros into the model; the caller has borrowed the weights."""
        asked = Recipe.load(self.space.recipe(params, self.calibration, self.seed))
        prepared = prepare(self.loaded.model, asked)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsecWarning)  # said once, when the data was read
            return execute(prepared, self.samples if prepared.needs_data else None, progress=False)

    def _pruned(self, params: Mapping[str, Any]) -> Trial:
        report = self.prune(params)
        after = _read(self.loaded, self.windows)
        chosen, _, _ = _loss(self.before[0::2], after[0::2])
        check = Check(*_loss(self.before[1::2], after[1::2]))
        cost = cost_now(_matrices(self.loaded.model), self.space.target, self.space.rows)
        return Trial(params, chosen, cost.ours_s / cost.dense_s * self.inductor, report.achieved, check)


def _loss(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float, float]:
    """Loss and its paired interval: ratio of perplexities - 1, or 1 - mean cosine. Raises InputError: not finite."""
    found, _ = evaluate.compare_windows(before, after)
    assert found.delta is not None
    low, high = found.interval or (found.delta, found.delta)
    if found.metric == "ppl":
        loss, low, high = (
            torch.tensor([found.delta, low, high], dtype=torch.float64).clamp(max=700.0).expm1()
        ).tolist()
        return loss, low, high
    return -found.delta, -high, -low


def _matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.matrix for name, layer in survey(model).layers.items()}


def _zeros(model: nn.Module) -> float:
    matrices = _matrices(model).values()
    return sum(int((m == 0).sum()) for m in matrices) / max(sum(m.numel() for m in matrices), 1)


def _read(loaded: LoadedModel, windows: Sequence[list[int]]) -> torch.Tensor:
    vocabulary = int(getattr(loaded.config, "vocab_size", 1))
    batch = max(1, min(8, _LOGIT_BYTES // (4 * vocabulary * max(map(len, windows)))))
    with evaluating(loaded.model):
        return evaluate.read_windows(loaded, windows, batch=batch)


def _windows(
    loaded: LoadedModel, data: Any, calibration: Calibration, eval_text: str | os.PathLike[str] | None, most: int
) -> tuple[list[list[int]], str]:
    """Token ids that calibration does not see, and what they were cut from. Raises InputError for too few."""
    size = evaluate.check_window(None, loaded)
    if eval_text is not None:
        source, rows = named(Path(eval_text), Calibration())
        text = "\n\n".join(row if isinstance(row, str) else str(row.get("text", "")) for row in rows)
        found = evaluate.text_windows(loaded, text, window=size)
    else:
        drawn = segments_of(data, calibration, loaded.model, loaded.tokenizer)
        if drawn is None:
            raise InputError(detail="the calibration data is no text; name text to measure on with --eval-text")
        source = "parts of the text that calibration did not see"
        found, size = drawn.rest, min(size, calibration.seqlen)
        if loaded.kind == "causal":
            found = [ids[i : i + size] for ids in found for i in range(0, len(ids) - size + 1, size)]
    if len(found) < LEAST_WINDOWS:
        raise InputError(
            detail=f"{len(found)} windows of {size} tokens are left to measure on, and {LEAST_WINDOWS} are the least; "
            "name more text with --eval-text, or calibrate on fewer samples"
        )
    return spread(found, most), source
