"""What a prepared recipe would do, before it is done: module -> step -> pattern, memory and time.

In: what ``sparsify.prepare`` gives. Out: JSON types, and the lines that ``--dry-run`` prints. Nothing is written and
the model is not run: memory is counted from shapes, time from multiplications at the rate of one small product here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsec.blockwise import find_blocks
from sparsec.models import LoadedModel
from sparsec.passes.masks.allocate.contract import Learns, Measures
from sparsec.passes.masks.contract import GRADIENTS, Updates, prune
from sparsec.passes.masks.magnitude import Magnitude
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector
from sparsec.prunable import Job, Selection
from sparsec.recipe_steps import Gates, Piece, Spread, Values, pattern_of
from sparsec.report_data import megabytes
from sparsec.report_fold import merge_names, template
from sparsec.sparsify_report import layer_notes, short_count, table
from sparsec.stages import Stage

if TYPE_CHECKING:
    from sparsec.sparsify import Prepared

_SCRATCH = 24  # bytes a weight beside the model while its layer is pruned: scores, keys, masks, the new values
_TIMED = 1 << 18  # weights of the largest layer that are timed
_ROWS = 256  # tokens that are timed
_TIMES = 7
_REST = 2.0  # attention, norms and copies take as long again: 1.8 to 2.6 measured with six recipes on a small model
_BACKWARD = 3  # a forward with a backward costs so many forwards
_WIDE = {"histogram": 8 * 256, "entropy": 8 * 256, "sample": 4 * 512}  # bytes an in-feature
_FACTOR = 4 * 8  # bytes a pair: the damped X X^T, its factor, the inverse of that and the products it is made of, fp64
_OUTPUTS = ("o_", "out", "down", "c_proj", "dense", "fc2", "fc_out")
_DOES = {"reparam": "rewritten, same outputs", "allocate": "given their shares", "post": "repaired",
         "structure": "made smaller"}  # fmt: skip

_KEEPS = {"": "", "mean": "mean ", "time": "time of "}  # what an allocator makes of the sparsity


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine: of a multiply-add in a matrix product, and of choosing about one weight."""

    product: float
    choice: float


def forecast(prepared: Prepared, tokens: int | None = None, memory: int = 4 << 30) -> dict[str, Any]:
    """The forecast as JSON types. ``tokens``: of the calibration data; None: as many as the recipe asks for at most.

    ``scratch_bytes`` is beside the model, ``spilled_bytes`` goes to disk, ``calibration_seconds`` are in ``seconds``.
    """
    guessed = tokens is None and prepared.needs_data
    count = _asked_tokens(prepared) if tokens is None else tokens
    count = count if prepared.needs_data else 0
    jobs = prepared.jobs
    sizes = {job.layer.name: job.layer.weight.numel() for _, job in jobs}  # a layer may be in several steps
    weights = sum(sizes.values()) or sum(p.numel() for p in prepared.model.parameters())
    rates = _rates(jobs)
    choosing = sum(rates.choice * j.layer.weight.numel() * (4 if j.step.scope == "global" else 1) for _, j in jobs)
    again = 3 if prepared.recipe.true_sequential else 0  # a pass for each group of layers that read the same
    passes = _REST * sum(rates.product * _products(stage, chosen, count, again) for stage, chosen in prepared.stages)
    spilled = _activations(prepared, count, memory)[1]
    steps = list(_steps(prepared))
    told = [f"{stage.structure.method}: time and memory are not forecast ({stage.structure.method_object().cost})"
            for stage, _ in prepared.stages if stage.structure]  # fmt: skip
    return {
        "recipe": prepared.recipe.to_dict(),
        "recipe_sha": prepared.recipe.sha,
        "model_sha": prepared.model_sha,
        "steps": steps,
        "layers": [layer for step in steps for layer in step.pop("layers")],
        "weights": weights,
        "scratch_bytes": sum(memory_parts(prepared, count, memory).values()),
        "spilled_bytes": spilled,
        "seconds": choosing + passes,
        "calibration_seconds": passes,
        "calibration_tokens": count,
        "calibration_guessed": guessed,
        "notes": [*told, *prepared.notes],
    }


def _asked_tokens(prepared: Prepared) -> int:
    said = prepared.recipe.calibration
    context = LoadedModel(prepared.model, None, "", "", "").context
    return said.samples * min(said.seqlen, context or said.seqlen)


# ------------------------------------------------------------------------------------------------ module, step, pattern


def _steps(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Every step of the recipe in its order; only those of mask methods have layers."""
    number = 0
    for stage, chosen in prepared.stages:
        jobs = chosen.jobs
        modules = _modules(prepared, [job.layer.name for job in jobs])
        for piece in stage.pieces:
            number += 1
            method = piece.method_object()
            yield {
                "step": number,
                "method": piece.method,
                "role": piece.role,
                "needs": list(method.needs),
                "cost": method.cost,
                "sparsity": piece.sparsity if isinstance(piece, Spread) else None,
                "keeps": getattr(method, "keeps", ""),
                "modules": modules,
                "layers": [_layer(job, number, stage) for job in jobs] if piece is stage.mask else [],
            }


def _layer(job: Job, number: int, stage: Stage) -> dict[str, Any]:
    return {
        "name": job.layer.name,
        "shape": list(job.layer.shape),
        "step": number,
        "method": job.step.method,
        "pattern": pattern_of(job.step),
        "scope": job.step.scope,
        "values": job.step.grid if isinstance(job.step, (Values, Gates)) else "",
        "outliers": job.step.outliers,
        "sparsity": job.step.sparsity,
        "allocated": stage.allocate.method_object().keeps if stage.allocate else "",
        "notes": list(job.notes),
    }


def _modules(prepared: Prepared, layers: Sequence[str]) -> list[str]:
    """The blocks that hold ``layers``, and the layers outside of them; [""] is the model as one."""
    if not layers:
        return [""]
    blocks = find_blocks(prepared.model, layers, prepared.recipe.blocks).blocks
    inside = {layer: name for layer in layers for name, _ in blocks if layer == name or layer.startswith(f"{name}.")}
    found = dict.fromkeys(inside.get(layer, layer) for layer in layers)
    return list(found) if inside else [""]


# ----------------------------------------------------------------------------------------------------------------- time


def _rates(jobs: Sequence[tuple[int, Job]]) -> Rates:
    """Timed on a piece of the largest layer. The least of several: the first call pays for what torch loads late, and
    whatever else the machine does only adds."""
    if not jobs:
        return Rates(0.0, 0.0)
    job = max((job for _, job in jobs), key=lambda job: job.layer.weight.numel())
    piece = job.layer.matrix[: max(1, _TIMED // job.layer.shape[1])]
    rows = torch.ones(_ROWS, piece.shape[1], dtype=piece.dtype, device=piece.device)
    choose = Selector(MaskPattern.parse(pattern_of(job.step)), float(job.step.sparsity or 0.0))
    product = choice = math.inf
    with torch.no_grad():
        for _ in range(_TIMES):
            started = time.perf_counter()
            nn.functional.linear(rows, piece)
            between = time.perf_counter()
            prune(Magnitude(), piece, {}, choose)
            product = min(product, between - started)
            choice = min(choice, time.perf_counter() - between)
    return Rates(product / (piece.numel() * _ROWS), choice / piece.numel())


def _products(stage: Stage, chosen: Selection, tokens: int, again: int) -> float:
    """Multiply-adds of one stage: passes over the data, statistics of pairs, factorisations."""
    jobs = chosen.jobs
    if not stage.walks or not jobs:
        return 0.0
    forward = tokens * sum(job.layer.weight.numel() for job in jobs)
    total = forward * sum(_forwards(piece) for piece in stage.pieces)
    total += forward * (3 + again + _compares(stage))  # capture, statistics, outputs; the dense outputs
    for piece in stage.pieces:
        method = piece.method_object()
        for job in jobs:
            n, k = job.layer.shape
            total += tokens * k * k * ("xxt" in method.needs)
            total += (k**3 + n * k**2) * (isinstance(method, Updates) or "xxt" in method.needs)
    return float(total)


def _forwards(piece: Piece) -> float:
    """Passes over the data that a step adds, in forwards."""
    method = piece.method_object()
    gradients = [need for need in method.needs if need in GRADIENTS]
    if gradients:
        return 2.0 if gradients == ["spsa"] else _BACKWARD
    if piece.role == "post":
        return _BACKWARD * getattr(method, "epochs", 1) if "tokens" in method.needs else 0
    if isinstance(method, Learns):
        return 1 + _BACKWARD * getattr(method, "epochs", 1)
    return {"reparam": 2, "gate": 4, "allocate": 3 * isinstance(method, Measures)}.get(piece.role, 0)


def _compares(stage: Stage) -> bool:
    """Whether the outputs of dense blocks are kept, for steps that compare with them."""
    learns = stage.allocate is not None and isinstance(stage.allocate.method_object(), Learns)
    return learns or any(post.method_object().compares for post in stage.posts)


# --------------------------------------------------------------------------------------------------------------- memory


def memory_parts(prepared: Prepared, tokens: int, memory: int = 4 << 30) -> dict[str, int]:
    """Bytes held beside the model where the stage that needs most of them needs most, part by part, from shapes.

    ``activations``: what enters a block and what leaves it, for all tokens. ``block``: an fp32 copy and a mask of each
    weight of one block. ``statistics``: of its distinct inputs. ``layer``: what is needed while one mask is made.
    """
    stages = [_stage_parts(stage, chosen) for stage, chosen in prepared.stages]
    most = max(stages, key=lambda parts: sum(parts.values()), default={})
    return {"activations": _activations(prepared, tokens, memory)[0], **most}


def _stage_parts(stage: Stage, chosen: Selection) -> dict[str, int]:
    if not stage.walks:
        return {"layer": _SCRATCH * max((job.layer.weight.numel() for job in chosen.jobs), default=0)}
    needs = {need for piece in stage.pieces for need in piece.method_object().needs} | {"sample"}
    put_back = bool(stage.reparams) or (
        stage.allocate is not None and isinstance(stage.allocate.method_object(), Learns)
    )
    blocks: dict[str, list[Job]] = {}
    for job in chosen.jobs:
        blocks.setdefault(_block_of(job.layer.name), []).append(job)
    held = [_block_parts(jobs, needs, put_back) for jobs in blocks.values()]
    most = max(held, key=lambda parts: sum(parts.values()), default={})
    gradients = 4 * sum(job.layer.weight.numel() for job in chosen.jobs) * len(needs & set(GRADIENTS))
    return {**most, **({"gradients": gradients} if gradients else {})}


def _block_parts(jobs: Sequence[Job], needs: set[str], put_back: bool) -> dict[str, int]:
    """Of one block: while its last layer is at work, or while its inputs are summed up, whichever is more."""
    inputs = _inputs(jobs)
    pairs = [k * k for k in inputs if "xxt" in needs]
    per_input = sum(_WIDE.get(need, 4) for need in needs - set(GRADIENTS) - {"xxt"})
    rest = sum(per_input * k for k in inputs)
    layer = max(_SCRATCH * job.layer.weight.numel() + (4 * job.layer.shape[1] ** 2 if pairs else 0) for job in jobs)
    working = {
        "block": sum((5 + put_back * job.layer.weight.element_size()) * job.layer.weight.numel() for job in jobs),
        "statistics": 4 * sum(pairs) + rest,
        "layer": max(layer, _FACTOR * max(pairs, default=0)),
    }
    summing = {"statistics": 8 * sum(pairs) + 4 * max(pairs, default=0) + rest}
    return max(working, summing, key=lambda parts: sum(parts.values()))


def _inputs(jobs: Sequence[Job]) -> list[int]:
    """In-features of each distinct input of a block. Layers of one parent and width read the same one (q, k and v;
    gate and up), or so it is in decoders; those that give a parent's output have their own."""
    found: dict[object, int] = {}
    for job in jobs:
        parent, _, last = job.layer.name.rpartition(".")
        own = last if last.startswith(_OUTPUTS) or last.isdigit() else ""
        found[parent, own, job.layer.shape[1]] = job.layer.shape[1]
    return list(found.values())


def _block_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``: up to the first number."""
    parts = name.split(".")
    return ".".join(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts))])


def _activations(prepared: Prepared, tokens: int, memory: int) -> tuple[int, int]:
    """Bytes (in memory, on disk) of a block's inputs and outputs, and its dense outputs where they are kept."""
    walks = [(stage, chosen) for stage, chosen in prepared.stages if stage.walks and chosen.jobs]
    if not tokens or not walks:
        return 0, 0
    config = getattr(prepared.model, "config", None)
    job = walks[0][1].jobs[0]
    width = getattr(config, "hidden_size", None) or job.layer.shape[1]
    lists = 3 if any(_compares(stage) for stage, _ in walks) else 2
    each = tokens * width * job.layer.weight.element_size()
    return lists * min(each, memory), lists * max(each - memory, 0)


# ---------------------------------------------------------------------------------------------------------------- lines


def forecast_table(said: Mapping[str, Any]) -> list[str]:
    """The lines of a dry run, from ``forecast``."""
    rows = [row for step in said["steps"] for row in _rows(step, said["layers"])]
    if not said["layers"]:
        size = f"the whole model, {short_count(said['weights'])} weights"
    else:
        size = f"{len({layer['name'] for layer in said['layers']})} layers, {short_count(said['weights'])} weights"
    disk = f" and {megabytes(said['spilled_bytes'])} on disk" if said["spilled_bytes"] else ""
    needs = f"; about {megabytes(said['scratch_bytes'])} beside the model{disk}, about {_duration(said['seconds'])}"
    own = layer_notes([(layer["name"], layer["notes"]) for layer in said["layers"]])
    notes = [f"note: {note}" for note in (*_calibration(said), *said["notes"], *own)]
    head = ("layer", "shape", "step", "pattern", "sparsity")
    return [
        f"dry run: {size}{needs if said['layers'] else ''}",
        "",
        *table(head, rows),
        "",
        *notes,
        "nothing was changed",
    ]


def _rows(step: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    title = f"{step['step']} {step['method']}"
    if step["role"] not in ("mask", "quantize", "gate"):
        names = [name for name in step["modules"] if name]
        share = "" if step["sparsity"] is None else f"{_KEEPS[step['keeps']]}{step['sparsity']:.1%}"
        blocks = f"{len(names)} module{'s' * (len(names) > 1)}" if names else ""
        yield ", ".join(_merged(names)) or "(the model)", blocks, title, _DOES[step["role"]], share
        return
    groups: dict[object, list[Mapping[str, Any]]] = {}
    for layer in layers:
        if layer["step"] == step["step"]:
            same = [layer[key] for key in ("pattern", "values", "scope", "outliers", "sparsity")]
            groups.setdefault((template(layer["name"]), tuple(layer["shape"]), *same), []).append(layer)
    for group in groups.values():
        first = group[0]
        fixed = first["scope"] == "layer" or MaskPattern.parse(first["pattern"]).sparsity is not None
        pattern = first["values"] or first["pattern"] if fixed else f"{first['pattern']}, {first['scope']}"
        pattern += f", {first['outliers']} aside" if first["outliers"] else ""
        name = merge_names([layer["name"] for layer in group]) or "(the model)"
        none = step["role"] == "quantize" or first["sparsity"] is None
        share = "-" if none else f"{_KEEPS[first['allocated']]}{first['sparsity']:.1%}"
        yield name, "x".join(map(str, first["shape"])), title, pattern, share


def _merged(names: Sequence[str]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(template(name), []).append(name)
    return [merge_names(group) for group in kinds.values()]


def _calibration(said: Mapping[str, Any]) -> Iterator[str]:
    tokens = said["calibration_tokens"]
    if not tokens or not said["layers"]:
        return
    estimated = f"about {_duration(said['calibration_seconds'])} of these are passes over {tokens} calibration tokens"
    guessed = ", as many as the recipe asks for at most; --data counts them" if said["calibration_guessed"] else ""
    yield f"{estimated}{guessed}; estimated from one small product"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes" if seconds < 7200 else (
        f"{seconds / 3600:.1f} hours"
    )  # fmt: skip
