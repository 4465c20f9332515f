"""``sparsec.calibrate``: a model and data in, how often each layer's inputs are zero out, kept for the compiler.

The model runs eagerly, unchanged, with a hook on every linear-type layer that counts exact zeros, by channel and over
tokens that come one after the other (what a batch of decode steps has to skip together). Thresholds, top-k and masks
are part of the model, so what is counted is what the compiled model will see.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sparsec.activation_rates import FOLDER, keep
from sparsec.cache import cache_dir, unwritable, wanted_dir
from sparsec.calibrate_report import ActivationReport, CalibratedLayer
from sparsec.calibration import Calibrated
from sparsec.calibration import calibrate as samples_of
from sparsec.collecting import given, marked, rows_of
from sparsec.errors import InputError, SparsecError, SparsecWarning, TuningNotKept
from sparsec.facts import Rates
from sparsec.options import Options
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.profile.weights import content_key
from sparsec.prunable import Layer, survey
from sparsec.recipe import Calibration

TOGETHER = (2, 4, 8)  # tokens in a row whose common zeros are counted
FEW = 256  # tokens under which a share is known to a few percent only
Progress = Callable[[int, int, str], None]  # samples done, of how many, what


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    tokenizer: Any = None,
    cache_dir: str = "",
    on_progress: Progress | None = None,
) -> ActivationReport:
    """Count how often the inputs of every linear-type layer are exactly zero, and keep it for later compilations.

    ``data``: as for ``sparsify``: a text or JSONL file (which needs ``tokenizer``), an iterable of input tensors, or of
    keyword dicts for forward; at most ``samples`` of them, text in segments of ``seqlen`` tokens drawn by ``seed``.
    ``cache_dir``: as the option of ``torch.compile``. The model is not changed; it runs once a sample, in eval mode.

    Raises UnreadableCalibration, TextTooShort or NoTokenizer for data that cannot be used, InputError for a model
    without such layers, and TuningNotKept where nothing can be written.
    """
    started = time.perf_counter()
    model = getattr(model, "_orig_mod", model)
    layers = survey(model).layers
    if not layers:
        raise InputError(
            detail=f"{type(model).__name__} has no nn.Linear, Conv1D or 1x1 nn.Conv2d whose inputs could be counted; "
            "calibrate the model before it is packed"
        )
    if why := unwritable(place := wanted_dir(cache_dir)):  # counting is for later processes
        raise TuningNotKept(path=str(place), why=why)
    read = samples_of(data, Calibration(samples=samples, seqlen=seqlen, seed=seed), model, tokenizer, widest=0)
    counts = _counted(model, layers, read, on_progress or (lambda done, total, what: None))
    origins, notes = _origins(model, read.samples[0])
    found = [_layer(layers[name], count, origins.get(name, "")) for name, count in counts.items()]
    found = _kept(found, layers, counts, cache_dir)
    ours = [*notes, *_notes(found, read.tokens)]
    for note in ours:
        warnings.warn(note, SparsecWarning, stacklevel=2)
    return ActivationReport(
        tuple(found), (*read.notes, *ours), read.tokens, _folder(cache_dir), time.perf_counter() - started
    )


def _folder(chosen: str) -> str:
    return str(cache_dir(chosen) / FOLDER)


@dataclass
class Count:
    """What one layer read: zeros by channel, of how many tokens; for M tokens in a row (channels zero in all, of how
    many); tokens that were not finite."""

    channels: torch.Tensor
    tokens: int = 0
    together: dict[int, tuple[int, int]] = field(default_factory=dict)
    nonfinite: int = 0

    def add(self, x: torch.Tensor) -> None:
        """x: [tokens, K] in the order in which they come."""
        tokens, k = x.shape
        self.tokens += tokens
        self.nonfinite += int((~x.isfinite().all(-1)).count_nonzero())
        zero = x == 0
        self.channels += zero.sum(0).to(self.channels.device)
        for m in TOGETHER:
            groups = tokens // m
            if groups:
                common, of = self.together.get(m, (0, 0))
                all_of = zero[: groups * m].view(groups, m, k).all(1)
                self.together[m] = common + int(all_of.count_nonzero()), of + all_of.numel()

    def plus(self, other: Count) -> Count:
        """Both together: what one weight reads at two places."""
        together = {
            m: tuple(map(sum, zip(self.together.get(m, (0, 0)), other.together.get(m, (0, 0)), strict=True)))
            for m in {**self.together, **other.together}
        }
        channels, nonfinite = self.channels + other.channels, self.nonfinite + other.nonfinite
        return Count(channels, self.tokens + other.tokens, together, nonfinite)  # type: ignore[arg-type]

    @property
    def zeros(self) -> float:
        return float(self.channels.sum()) / max(self.tokens * self.channels.numel(), 1)

    @property
    def rows(self) -> tuple[tuple[int, float], ...]:
        return tuple((m, common / of) for m, (common, of) in sorted(self.together.items()))

    @property
    def shares(self) -> list[float]:
        return [count / max(self.tokens, 1) for count in self.channels.tolist()]


@torch.no_grad()
def _counted(model: nn.Module, layers: Mapping[str, Layer], read: Calibrated, tell: Progress) -> dict[str, Count]:
    counts = {name: Count(torch.zeros(layer.shape[1], dtype=torch.int64)) for name, layer in layers.items()}
    mask: list[torch.Tensor | None] = [None]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in layers:
            hook = _hook(counts[name], mask)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for done, sample in enumerate(read.samples):
            tell(done, len(read.samples), "samples")
            mask[0] = marked(sample)
            model(**sample)
    return counts


def _hook(count: Count, mask: list[torch.Tensor | None]) -> Callable[..., None]:
    def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        count.add(rows_of(module, given(args, kwargs), mask[0]))

    return see


def _origins(model: nn.Module, sample: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """By layer, what makes the zeros of its inputs, from the graph; or why that is not known."""
    from sparsec.pipeline import sites_of

    try:
        with torch.no_grad(), evaluating(model):
            sites = sites_of(model, (), sample, Options())
    except SparsecError:
        raise
    except Exception as error:  # what Dynamo cannot trace can be counted all the same
        why = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return {}, [f"where zeros come from is not known: the model could not be captured ({why[0]})"]
    return {site.fqn: site.gate.origin for site in sites if site.gate is not None}, []


def _layer(layer: Layer, count: Count, origin: str) -> CalibratedLayer:
    shares = count.shares
    return CalibratedLayer(
        name=layer.name,
        shape=layer.shape,
        origin=origin,
        tokens=count.tokens,
        zeros=count.zeros,
        low=min(shares, default=0.0),
        high=max(shares, default=0.0),
        dead=sum(share == 1.0 for share in shares) if count.tokens else 0,
        rows=count.rows,
        nonfinite=count.nonfinite,
    )


def _kept(
    found: list[CalibratedLayer], layers: Mapping[str, Layer], counts: Mapping[str, Count], cache: str
) -> list[CalibratedLayer]:
    """The layers with ``key``, after the rates of those that have something to say are on disk.

    A weight that is used at several places has one rate, of all of them.
    """
    keyed = [replace(one, key=content_key(layers[one.name].matrix) if one.worth_keeping else "") for one in found]
    together: dict[str, tuple[str, Count]] = {}
    for one in keyed:
        if one.key:
            origin, before = together.get(one.key, (one.origin, None))
            count = counts[one.name]
            together[one.key] = origin if origin == one.origin else "", before.plus(count) if before else count
    for key, (origin, count) in together.items():
        keep(Rates(key, origin, count.tokens, count.zeros, count.rows, tuple(count.shares), time.time()), cache)
    return keyed


def _notes(found: list[CalibratedLayer], tokens: int) -> Iterator[str]:
    """What is wrong with what was counted, a sentence each."""
    if tokens < FEW:
        yield f"{tokens} tokens are few: rates of zeros are sure to a few percent only from {FEW} on; pass more data"
    dead = [one.name for one in found if one.never_activated]
    if dead:
        yield (
            f"{_some(dead)} read nothing but zeros in {tokens} tokens; no rate is kept of that, for other data may "
            "activate more: look at the data, or at the layer before"
        )
    broken = [one.name for one in found if one.nonfinite]
    if broken:
        yield f"{_some(broken)} read NaN or infinite values; no rate is kept of that: find where they come from first"
    uncalled = [one.name for one in found if not one.tokens]
    if uncalled:
        yield f"{_some(uncalled)} got no call from these samples, so nothing is known there"
    if not any(one.zeros for one in found):
        yield (
            "no layer reads exact zeros, so there is nothing to skip: use a model with ReLU, or put thresholds before "
            "its layers first"
        )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
