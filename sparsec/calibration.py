"""Calibration data: whatever a user calls that, in; keyword arguments of the model's forward, sample by sample, out.

  "notes.txt"  "chats.jsonl"  "wikitext:wikitext-2-raw-v1"    segments of text (``sparsec.calibration_text``)
  a list of texts, a dataset with text or messages              the same
  a dataset with input_ids, tensors, keyword dicts              taken as they are, in their order

Text is cut into segments of ``seqlen`` tokens; what the user has already cut into samples or batches stays so, except
that nothing is longer than the model's context.
"""

from __future__ import annotations

import inspect
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsec.cache import digest
from sparsec.calibration_text import Drawn, draw, named, row_of, tokenize_with
from sparsec.collecting import marked
from sparsec.errors import SparsecWarning, UnreadableCalibration
from sparsec.models import LoadedModel, kind_of
from sparsec.prunable import survey
from sparsec.recipe import Calibration

TOKENS_PER_INPUT = 8  # fewer make second-order statistics worse than none at all
_NO_LIMIT = 1 << 20  # tokenizers without a limit say 10^30


@dataclass(frozen=True)
class Calibrated:
    """``samples``: keyword arguments of forward, on the model's device. ``tokens``: positions that count.

    ``sha``: of names, shapes, dtypes and values; the same for the same data, settings and tokenizer.
    """

    samples: list[dict[str, Any]]
    notes: tuple[str, ...]
    sha: str
    tokens: int


@dataclass
class _Wanted:
    """What the samples are for: the model, its limits, and how to call it."""

    model: nn.Module
    tokenizer: Any
    settings: Calibration
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", None)

    @property
    def encoder(self) -> bool:
        causal = type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))  # a config made by hand says less
        return hasattr(self.config, "architectures") and kind_of(self.config) == "encoder" and not causal

    @property
    def context(self) -> int | None:
        """Most tokens the model takes; of encoders the tokenizer may know of less (RoBERTa: 512 of 514)."""
        context = LoadedModel(self.model, None, "", "", "").context
        limit = getattr(self.tokenizer, "model_max_length", None) if self.encoder else None
        known = [n for n in (context, limit) if isinstance(n, int) and n < _NO_LIMIT]
        return min(known) if known else None

    @property
    def vocabulary(self) -> int | None:
        return getattr(self.config, "vocab_size", None)

    def wrong(self, place: int, why: str) -> UnreadableCalibration:
        return UnreadableCalibration(source=f"{self.source}, sample {place + 1}", why=why)


def calibrate(
    data: Any, settings: Calibration, model: nn.Module, tokenizer: Any = None, *, widest: int | None = None
) -> Calibrated:
    """Samples for ``model`` from ``data``: a path, the name of a dataset, or an iterable.

    An iterable gives texts, dicts of a dataset (``text``, ``messages``, ``input_ids``), tensors (token ids [B, T] or
    [T], or floats for forward's first argument), or dicts of forward's arguments. One tensor of ids [B, T] is B
    samples; one of floats is one. ``widest``: in-features of the widest layer, by default of those that can be pruned;
    fewer than 8 tokens for each are a SparsecWarning, as are fewer segments of text than ``settings.samples``.

    Raises UnreadableCalibration, TextTooShort, NoTokenizer or MissingPackage, each with one sentence.
    """
    source, first, rows = _read(data, settings)
    wanted = _Wanted(model, tokenizer, settings, source)
    if isinstance(first, str) or _is_document(first, source):
        samples = _from_text(rows, wanted)
    else:
        samples = _from_inputs(rows, wanted)
    samples = [_moved(sample, model) for sample in samples]
    tokens = sum(_positions(sample) for sample in samples)
    if widest is None:
        widest = max((layer.shape[1] for layer in survey(model).layers.values()), default=0)
    if tokens < TOKENS_PER_INPUT * widest:
        _warn(
            wanted,
            f"{tokens} calibration tokens are few for layers of {widest} in-features: under "
            f"{TOKENS_PER_INPUT * widest}, {TOKENS_PER_INPUT} for each, statistics of pairs (SparseGPT) can do more "
            "harm than good",
        )
    return Calibrated(samples, tuple(wanted.notes), digest(*map(_sample_sha, samples)), tokens)


def _read(data: Any, settings: Calibration) -> tuple[str, Any, Iterable[Any]]:
    """What to call it, its first row, and all of its rows."""
    if isinstance(data, (str, os.PathLike)):
        source, rows = named(data if isinstance(data, str) else Path(data), settings)
    else:
        source, rows = "data", _rows(data, settings)
    return (source, *_peek(rows, source))


def _warn(wanted: _Wanted, note: str) -> None:
    wanted.notes.append(note)
    warnings.warn(note, SparsecWarning, stacklevel=3)


def _rows(data: Any, settings: Calibration) -> Iterable[Any]:
    """The samples or rows of anything that is no path."""
    if isinstance(data, torch.Tensor):
        return [data] if data.is_floating_point() or data.dim() < 2 else [data[i : i + 1] for i in range(len(data))]
    if isinstance(data, Mapping):
        if not data or any(isinstance(value, torch.Tensor) for value in data.values()):
            return [data]
        if settings.split in data:  # the splits of a dataset
            return data[settings.split]  # type: ignore[no-any-return]
        if any(isinstance(value, (str, Sequence)) for value in data.values()):
            return [data]
        why = f"it has no split {settings.split!r}; it has: {', '.join(map(str, data))}"
        raise UnreadableCalibration(source="data", why=why)
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        why = f"{type(data).__name__} is no path, dataset, or iterable of tensors, texts or keyword dicts"
        raise UnreadableCalibration(source="data", why=why)
    return data  # type: ignore[no-any-return]


def _peek(rows: Iterable[Any], source: str) -> tuple[Any, Iterable[Any]]:
    """The first row, and all of them; what has a length keeps it, since it can be drawn from."""
    if isinstance(rows, Sized) and hasattr(rows, "__getitem__"):
        if len(rows):
            return rows[0], rows
    else:
        rest = iter(rows)
        for first in rest:
            return first, itertools.chain([first], rest)
    raise UnreadableCalibration(source=source, why="it holds nothing")


def _is_document(row: Any, source: str) -> bool:
    """Whether a row is text. Raises UnreadableCalibration for a dict that is neither that nor arguments."""
    if not isinstance(row, Mapping) or any(isinstance(value, torch.Tensor) for value in row.values()):
        return False
    return row_of(row, f"{source}, row 1")[0] != "input_ids"


def segments_of(data: Any, settings: Calibration, model: nn.Module, tokenizer: Any = None) -> Drawn | None:
    """The segments that ``calibrate`` takes from text and those that it leaves; None where ``data`` is no text.

    ``data``: a path, a name, or an iterable that can be read more than once. Raises as ``calibrate`` does.
    """
    source, first, rows = _read(data, settings)
    is_text = isinstance(first, str) or _is_document(first, source)
    return _drawn(rows, _Wanted(model, tokenizer, settings, source)) if is_text else None


def _drawn(rows: Iterable[Any], wanted: _Wanted) -> Drawn:
    """Segments no longer than the model's context; ``wanted`` gets the notes, and the settings as they were used."""
    if wanted.context is not None and wanted.settings.seqlen > wanted.context:
        wanted.notes.append(
            f"seqlen {wanted.settings.seqlen} was cut to {wanted.context}: the model takes no more tokens"
        )
        wanted.settings = wanted.settings.model_copy(update={"seqlen": wanted.context})
    name = type(wanted.model).__name__
    how = tokenize_with(wanted.tokenizer, wanted.source, name, wanted.vocabulary, wanted.encoder)
    drawn = draw(rows, how, wanted.settings, wanted.source)
    wanted.notes += drawn.notes
    return drawn


def _from_text(rows: Iterable[Any], wanted: _Wanted) -> list[dict[str, Any]]:
    drawn = _drawn(rows, wanted)
    settings = wanted.settings
    if len(drawn.segments) < settings.samples:
        _warn(
            wanted,
            f"{wanted.source} gives {len(drawn.segments)} segments of {settings.seqlen} tokens, and "
            f"{settings.samples} were asked for (calibration.samples)",
        )
    return [_of_ids(torch.tensor([ids]), wanted, i) for i, ids in enumerate(drawn.segments)]


def _from_inputs(rows: Iterable[Any], wanted: _Wanted) -> list[dict[str, Any]]:
    """The first ``samples`` of what the user has cut into samples or batches already."""
    most = wanted.settings.samples
    if isinstance(rows, Sized) and hasattr(rows, "__getitem__"):  # torch's map-style datasets have no end by themselves
        rows = map(rows.__getitem__, range(len(rows)))
    made = [_sample(row, wanted, place) for place, row in zip(range(most + 1), rows, strict=False)]
    if len(made) > most:
        wanted.notes.append(f"only the first {most} samples of {wanted.source} were read (calibration.samples)")
    return made[:most]


def _sample(row: Any, wanted: _Wanted, place: int) -> dict[str, Any]:
    if isinstance(row, (tuple, list)) and len(row) == 1:
        row = row[0]  # what a DataLoader over a TensorDataset gives
    if isinstance(row, (tuple, list)) and row and all(isinstance(i, int) for i in row):
        row = torch.tensor(row)
    if isinstance(row, torch.Tensor):
        if not row.is_floating_point():
            return _of_ids(row, wanted, place)
        if not bool(row.isfinite().all()):
            raise wanted.wrong(place, "it holds NaN or infinite values")
        return {_first_argument(wanted, place): row}
    if not isinstance(row, Mapping):
        raise wanted.wrong(place, f"it is {type(row).__name__}, not a tensor, a text, or a dict of forward's arguments")
    if not any(isinstance(value, torch.Tensor) and value.dim() > 1 for value in row.values()):
        return _of_ids(_ids_of(row, wanted, place), wanted, place)
    sample = dict(row)
    for key, value in sample.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            raise wanted.wrong(place, f"{key} holds NaN")
    try:
        inspect.signature(wanted.model.forward).bind(**sample)
    except TypeError as error:
        raise wanted.wrong(place, f"{type(wanted.model).__name__}'s forward does not take it: {error}") from None
    return sample


def _ids_of(row: Mapping[str, Any], wanted: _Wanted, place: int) -> torch.Tensor:
    """[1, T] from one row of a tokenized dataset, without what its mask says is padding."""
    _, value = row_of({k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}, wanted.source)
    if isinstance(value, str) or not all(isinstance(i, int) for i in value):
        raise wanted.wrong(place, "its input_ids are not one list of whole numbers")
    mask = row.get("attention_mask")
    kept = [True] * len(value) if mask is None else [bool(m) for m in mask]
    return torch.tensor([[i for i, keep in zip(value, kept, strict=False) if keep]], dtype=torch.long)


def _of_ids(ids: torch.Tensor, wanted: _Wanted, place: int) -> dict[str, Any]:
    """Forward's arguments of token ids [B, T] or [T]; encoders also get the mask that says all of them count."""
    ids = ids.long().reshape(1, -1) if ids.dim() < 2 else ids.long()
    context, vocabulary = wanted.context, wanted.vocabulary
    if not ids.numel():
        raise wanted.wrong(place, "it holds no tokens")
    if isinstance(vocabulary, int):
        for token in (int(ids.min()), int(ids.max())):
            if not 0 <= token < vocabulary:
                raise wanted.wrong(place, f"it holds token {token}; the model's are 0 to {vocabulary - 1}")
    if context is not None and ids.shape[-1] > context:
        note = f"samples of {wanted.source} were cut to {context} tokens: the model takes no more"
        wanted.notes += [note] if note not in wanted.notes else []
        ids = ids[..., :context].clone()
    parameters = inspect.signature(wanted.model.forward).parameters
    if "input_ids" not in parameters:
        return {_first_argument(wanted, place): ids}
    sample: dict[str, Any] = {"input_ids": ids}
    if wanted.encoder and "attention_mask" in parameters:
        sample["attention_mask"] = torch.ones_like(ids)
    if getattr(wanted.config, "is_encoder_decoder", False):
        sample["decoder_input_ids"] = ids
    return sample


def _first_argument(wanted: _Wanted, place: int) -> str:
    parameters = inspect.signature(wanted.model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not named:
        raise wanted.wrong(place, f"{type(wanted.model).__name__}'s forward names no argument for it")
    return named[0]


def _moved(sample: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """On the device of the model's weights."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    return {k: v.to(device) if isinstance(v, torch.Tensor) and device else v for k, v in sample.items()}


def _positions(sample: Mapping[str, Any]) -> int:
    """How many vectors count in the statistics of a linear layer: those that a 2-D attention mask marks, for
    ``collecting`` leaves padding out; else token ids, or all but the last dimension (of images: all but channels)."""
    if (mask := marked(sample)) is not None:
        return int(mask.count_nonzero())
    for value in sample.values():
        if isinstance(value, torch.Tensor) and value.dim():
            if not value.is_floating_point():
                return value.numel()
            return value.numel() // max(1, value.shape[1] if value.dim() == 4 else value.shape[-1])
    return 0


def _sample_sha(sample: Mapping[str, Any]) -> str:
    return digest(*itertools.chain.from_iterable(_parts(key, sample[key]) for key in sorted(sample)))


def _parts(key: str, value: Any) -> Iterator[str | bytes]:
    yield key
    if not isinstance(value, torch.Tensor):
        yield repr(value)
        return
    yield f"{tuple(value.shape)} {value.dtype}"
    yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
