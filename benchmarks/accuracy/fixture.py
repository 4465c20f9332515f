"""A model, its calibration draws and its test windows. In: a checkpoint and text. Out: costs, one a window.

causal   cost of a window: mean negative log-likelihood a token, in nats, compressed - dense (so dense is 0)
encoder  cost of a paragraph: 1 - cosine of its mean-pooled embedding to the dense model's
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from benchmarks.accuracy.control import RANDOM
from benchmarks.accuracy.grid import Row, bits
from benchmarks.accuracy.unread import gate_facts
from sparsec import sparsify
from sparsec.cache import digest
from sparsec.calibration import calibrate
from sparsec.errors import InputError, SparsecWarning
from sparsec.models import LoadedModel, load_model
from sparsec.passes.gates.layers import gated_tokens, gates_of
from sparsec.recipe import Calibration

SHORTEST = 16  # tokens of a paragraph; headings say nothing
BATCH = 8
EVERY = 32  # one channel of so many gets the planted factor


@dataclass(frozen=True)
class Settings:
    """``samples`` calibration segments of ``seqlen`` tokens; ``windows`` test windows of as many."""

    samples: int = 64
    seqlen: int = 256
    windows: int = 48


@dataclass
class Fixture:
    """``costs`` of a model are comparable window by window between all rows of one fixture."""

    loaded: LoadedModel
    calib: Path
    test: Path
    settings: Settings
    suits: str = ""  # the kind of rows that it is measured by, where that is not its own
    _draws: dict[tuple[int, int], list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def kind(self) -> str:
        return self.loaded.kind

    @cached_property
    def key(self) -> str:
        """Of everything but the row: rows with another key are of another benchmark."""
        texts = [path.read_bytes() for path in (self.calib, self.test)]
        return digest(_known_by(self.loaded.model), *texts, repr(self.settings))[:16]

    @cached_property
    def windows(self) -> list[list[int]]:
        """Token ids. Raises InputError where the text gives fewer than two."""
        text = self.test.read_text(encoding="utf-8")
        tokenizer, n, length = self.loaded.tokenizer, self.settings.windows, self.settings.seqlen
        if tokenizer is None:
            raise InputError(detail=f"{self.name} has no tokenizer, and accuracy is measured on text")
        if self.kind == "causal":
            ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            found = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        else:
            paragraphs = text.split("\n\n")
            each = (list(tokenizer(p, verbose=False)["input_ids"]) for p in paragraphs[: 40 * n])
            found = [ids[:length] for ids in each if len(ids) >= SHORTEST]
        if len(found) < 2:
            raise InputError(detail=f"{self.test.name} gives {len(found)} windows of {length} tokens; two are needed")
        return found[:n]

    def draw(self, number: int, samples: int | None) -> list[dict[str, Any]]:
        """Calibration inputs of one draw, kept for the next row."""
        count = samples or self.settings.samples
        if (number, count) not in self._draws:
            wanted = Calibration(samples=count, seqlen=self.settings.seqlen, seed=number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SparsecWarning)  # rows with too little data have it on purpose
                found = calibrate(self.calib, wanted, self.loaded.model, self.loaded.tokenizer)
            self._draws[number, count] = found.samples
        return self._draws[number, count]

    @cached_property
    def dense(self) -> list[float] | torch.Tensor:
        """Causal: nats a token of each window; encoder: embeddings [windows, hidden]."""
        return self._nll(self.loaded.model) if self.kind == "causal" else self._embeddings(self.loaded.model)

    @cached_property
    def late(self) -> list[float]:
        """Nats a token of the last half of each window."""
        return self._nll(self.loaded.model, late=True)

    def costs(self, model: torch.nn.Module, late: bool = False) -> list[float]:
        """One number a window, 0 for the dense model, higher is worse. Raises InputError where it is not finite.

        ``late``: only what the last half of each window predicts is scored; of causal models.
        """
        dense = self.late if late else self.dense
        if isinstance(dense, torch.Tensor):
            found = (1 - cosine_similarity(self._embeddings(model), dense, dim=-1)).tolist()
        else:
            found = [ours - theirs for ours, theirs in zip(self._nll(model, late), dense, strict=True)]
        if not all(map(math.isfinite, found)):
            raise InputError(detail="the model's outputs are not finite")
        return found

    def _nll(self, model: torch.nn.Module, late: bool = False) -> list[float]:
        found: list[float] = []
        batch = 1 if any(gate.request for _, _, gate in gates_of(model)) else BATCH  # a batch shares one set of neurons
        with torch.no_grad():
            for i in range(0, len(self.windows), batch):
                ids = torch.tensor(self.windows[i : i + batch])
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
                found += nll[:, (ids.shape[1] // 2 if late else 0) :].double().mean(-1).tolist()
        return found

    def _embeddings(self, model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            each = [model(input_ids=torch.tensor([ids]))[0].double().mean(1) for ids in self.windows]
        return torch.cat(each)

    def measure(self, row: Row, draw: int) -> dict[str, Any]:
        """Prune a copy of the model by ``row`` and judge it. JSON types. Raises what sparsify raises."""
        started = time.perf_counter()
        model = copy.deepcopy(self.loaded.model)
        if row.planted:
            plant(model, row.planted)
        recipe = {**row.recipe, "steps": [dict(step) for step in row.recipe["steps"]]}
        for step in recipe["steps"]:
            if step["method"] == RANDOM:
                step["seed"] = draw
        data = self.draw(draw, row.samples) if row.draws_differ and row.pieces != [RANDOM] else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsecWarning)
            report = sparsify(model, recipe, data, progress=False)
        took = time.perf_counter() - started
        with gated_tokens(model, row.tokens):
            costs = self.costs(model, row.late)
        return {
            "costs": [round(cost, 6) for cost in costs],
            "achieved": round(report.achieved, 5),
            "bits": round(bits(report.recipe), 4),
            "seconds": round(took, 1),
            **(gate_facts(model, report.gates, self.windows) if report.gates else {}),
        }


def fixture(spec: str, calib: Path, test: Path, settings: Settings) -> Fixture:
    """Raises InputError and its kin for what cannot be read, or is no causal model or encoder."""
    for path in (calib, test):
        if not path.is_file():
            raise InputError(detail=f"there is no file {path}; give text with --calib and --test")
    loaded = load_model(spec, "fp32")
    if loaded.kind not in ("causal", "encoder"):
        raise InputError(detail=f"{loaded.name} is {loaded.kind}; accuracy is measured on language models and encoders")
    return Fixture(loaded, calib, test, settings)


def plant(model: Any, factor: float) -> None:
    """Outlier channels that change no output: a norm's gain times ``factor``, the columns that read it divided.

    A power of two rounds nothing. Raises InputError where the model is not of Llama's layout.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not hasattr(layers[0], "post_attention_layernorm"):
        raise InputError(detail="outlier channels are planted in models of Llama's layout only")
    with torch.no_grad():
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[::EVERY] *= factor
                for reader in readers:
                    reader.weight[:, ::EVERY] /= factor


def trigram(text: Sequence[int], windows: Sequence[Sequence[int]], vocabulary: int) -> float:
    """Nats a token of ``windows`` under a trigram model of ``text``, orders mixed as Witten and Bell (1991) do."""
    counts = [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for n in (1, 2, 3)]
    seen: list[Counter[tuple[int, ...]]] = [Counter(), Counter(), Counter()]
    kinds: list[Counter[tuple[int, ...]]] = [Counter(), Counter(), Counter()]
    for order, table in enumerate(counts):
        for gram, count in table.items():
            seen[order][gram[:-1]] += count
            kinds[order][gram[:-1]] += 1
    total, tokens = 0.0, 0
    for window in windows:
        for i in range(1, len(window)):
            p = 1 / vocabulary
            for order in range(min(i, 2) + 1):
                gram = tuple(window[i - order : i + 1])
                times, novel = seen[order][gram[:-1]], kinds[order][gram[:-1]]
                if times:
                    p = (counts[order][gram] + novel * p) / (times + novel)
            total -= math.log(p)
            tokens += 1
    return total / tokens


def _known_by(model: nn.Module) -> str:
    """Names, shapes, dtypes and 512 values of every tensor. Rows are kept under this, so it must not change."""
    parts: list[str | bytes] = []
    for name, tensor in model.state_dict().items():
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.numel():
            places = torch.linspace(0, tensor.numel() - 1, min(512, tensor.numel())).long()
            index = torch.unravel_index(places, tensor.shape) if tensor.ndim else ()
            parts.append(tensor.detach()[index].double().numpy().tobytes())
    return digest(*parts)
