"""The engines. Each lives alone in a worker process. In: a ``Case``. Out: a ``Built`` that can be called and timed.

Weights are normal and cut at a magnitude, so that a case has the zeros of magnitude pruning. Matrices beyond the first
are rotations of it: other memory, same statistics.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import BYTES, Case, packed_bytes
from benchmarks.quantised_targets import VALUE_BYTES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Built:
    """``call`` runs ``case.calls`` layers. ``path``: what ran. ``error``: largest difference to fp32 torch, relative.

    ``limit``: speedup that the bytes read would allow if memory were all that counts (0: not known).
    """

    call: Callable[[], object]
    path: str
    error: float
    limit: float = 0.0


class Declines(Exception):
    """This engine cannot run the case; the text says why."""


@dataclass(frozen=True)
class Engine:
    """``dense`` engines do the same work whatever the zeros, and are the peers that ratios are taken against.

    ``takes``: cases that are any of its business; for others it is not even asked.
    """

    name: str
    dense: bool
    build: Callable[[Case], Built]
    env: tuple[tuple[str, str], ...] = ()
    takes: Callable[[Case], bool] = lambda case: not case.quantised and not case.gated


def weights(case: Case, bytes_each: float = 0.0) -> list[Tensor]:
    """Tensors [n, k], as many as fill several caches at ``bytes_each`` (0: dense); ``case.calls`` layers share them."""
    if case.quantised:
        from benchmarks.quantised_weights import several

        return [w.dense(DTYPES[case.dtype]) for w in several(case, bytes_each or case.n * case.k * BYTES[case.dtype])]
    rng = np.random.Generator(np.random.SFC64(case.n * 31 + case.k))
    first = rng.standard_normal((case.n, case.k), dtype=np.float32) * np.float32(case.k**-0.5)
    if case.sparsity > 0:
        cut = statistics.NormalDist().inv_cdf((1 + case.sparsity) / 2) * case.k**-0.5
        first[np.abs(first) < cut] = 0
    base = torch.from_numpy(first).to(DTYPES[case.dtype])
    count = case.distinct(bytes_each or base.nbytes)
    return [base, *(base.roll(37 * i, 0) for i in range(1, count))]


def inputs(case: Case) -> list[Tensor]:
    """One x [m, k] for each layer of a call; each its own, so that no engine can merge the calls."""
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(case.calls, case.m, case.k, generator=generator).to(DTYPES[case.dtype]))


class Layers(nn.Module):
    """Applies weight ``i`` to input ``i``; with fewer weights than inputs they take turns."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [F.linear(x, self.weights[i % len(self.weights)]) for i, x in enumerate(xs)]


def reference(case: Case, tensors: list[Tensor], xs: list[Tensor]) -> list[Tensor]:
    """The answers of the first and the last layer in fp32."""
    return [xs[i].float() @ tensors[i % len(tensors)].float().t() for i in (0, case.calls - 1)]


def difference(found: list[Any], wanted: list[Tensor]) -> float:
    """Largest absolute difference of the first and the last output, relative to the largest value."""
    pairs = ((torch.as_tensor(found[i]).float(), w) for i, w in zip((0, -1), wanted, strict=True))
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in pairs)


def on_torch(
    compile_: Callable[[nn.Module], Callable[..., Any]],
    path: str,
    bytes_each: Callable[[Case], float] = lambda case: 0.0,
) -> Callable[[Case], Built]:
    """An engine that takes a module of torch: eager, Inductor, sparsec."""

    def build(case: Case) -> Built:
        if case.gated:
            from benchmarks.activation_engines import build as build_gated

            return build_gated(compile_, path, case)
        if case.kind == "encoder":
            model, kwargs = encoder(case)
            run = compile_(model)
            wanted = model(**kwargs).last_hidden_state.float()
            found = run(**kwargs).last_hidden_state.float()
            return Built(lambda: run(**kwargs), path, float((found - wanted).abs().max() / wanted.abs().max()))
        tensors, xs = weights(case, bytes_each(case)), inputs(case)
        run = compile_(Layers(tensors))
        return Built(lambda: run(*xs), path, difference(run(*xs), reference(case, tensors, xs)))

    return build


def encoder(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned MiniLM encoder and its inputs: ids of real sentences, [batch, tokens]."""
    from sparsec.demo import prune
    from sparsec.demo_models import SENTENCES, load_encoder

    loaded = load_encoder("minilm")
    prune(loaded.model, case.sparsity)
    texts = SENTENCES[: case.batch] if case.batch > 1 else [" ".join(SENTENCES)]
    return loaded.model, loaded.tokenized(texts, case.tokens)


def inductor(module: nn.Module) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(module, dynamic=False)


def build_unseen(case: Case) -> Built:
    """sparsec where it cannot see that activations hold zeros: the dense peer of our own kernels."""
    return build_sparsec(case, seen=False)


def build_sparsec(case: Case, seen: bool = True) -> Built:
    """The backend with its default options; the path comes from the records of the compilation."""
    from sparsec.records import recording

    options: dict[str, Any] | None = {"tune": os.environ["BENCH_TUNE"]} if os.environ.get("BENCH_TUNE") else None

    def compile_(module: nn.Module) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(module, backend="sparsec", options=options, dynamic=False)

    with recording() as records:
        if case.gated:
            from benchmarks.activation_engines import build as build_gated

            built = build_gated(compile_, "", case, seen)
        elif case.quantised:
            from benchmarks.quantised_engines import on_grid

            built = on_grid(compile_, case)
        else:
            built = on_torch(compile_, "sparsec", lambda c: packed_bytes(c.n, c.k, c.dtype, c.sparsity))(case)
    for record in records:
        if record.failure:
            raise RuntimeError(f"sparsec fell back to dense: {record.failure}")
    rows = case.batch * case.tokens if case.kind == "encoder" else case.m
    layers = [(layer.decision, layer.fact) for record in records for layer in record.layers]
    ranges = [next((r for r in d.gated if r.holds(rows)), d.at(rows)) for d, _ in layers]
    chosen = [f"{r.format} {r.kernel}".strip() for r in ranges]
    path = ", ".join(f"{chosen.count(c)} {c}" if len(set(chosen)) > 1 else c for c in dict.fromkeys(chosen))
    width = VALUE_BYTES.get(case.weights, BYTES[case.dtype])
    return Built(built.call, path or "nothing taken", built.error, byte_limit(layers, ranges, case.zeros, width))


def byte_limit(layers: list[tuple[Any, Any]], ranges: list[Any], zeros: float, width: float) -> float:
    """Bytes of the dense weights, ``width`` each, over bytes that are read of what was chosen."""
    dense = ours = 0.0
    for (decision, fact), chosen in zip(layers, ranges, strict=True):
        weight = fact.n * fact.k * width
        dense += weight
        read = 1 - zeros if chosen in decision.gated else 1.0
        ours += read * next((c.bytes for c in decision.candidates if c.format == chosen.format), weight)
    return dense / ours if ours else 0.0


def build_csr(case: Case) -> Built:
    """torch.sparse: compressed rows, multiplied by MKL."""
    if case.kind == "encoder":
        raise Declines("CSR weights do not go through nn.Linear")
    if case.dtype != "fp32":
        raise Declines("MKL has no bf16 sparse product")
    tensors, xs = weights(case, case.n * case.k * (1 - case.sparsity) * 8), inputs(case)  # a value and an int32 index
    wanted = reference(case, tensors, xs)
    rows = [t.to_sparse_csr() for t in tensors]
    columns = [x.t().contiguous() for x in xs]

    def call() -> list[Tensor]:
        return [rows[i % len(rows)] @ x for i, x in enumerate(columns)]

    return Built(call, "MKL CSR", difference([y.t() for y in call()], wanted))


def build_onnxruntime(case: Case) -> Built:
    from benchmarks.onnx_engines import build_onnxruntime

    return build_onnxruntime(case)


def build_openvino(case: Case) -> Built:
    if case.quantised:
        from benchmarks.quantised_onnx import build_openvino as build_quantised

        return build_quantised(case)
    from benchmarks.onnx_engines import build_openvino

    return build_openvino(case)


def build_ort_int8(case: Case) -> Built:
    from benchmarks.quantised_onnx import build_int8

    return build_int8(case)


def build_ort_nbits(case: Case) -> Built:
    from benchmarks.quantised_onnx import build_nbits

    return build_nbits(case)


def build_torch_int(case: Case) -> Built:
    from benchmarks.quantised_engines import build_torch_int

    return build_torch_int(case)


def any_layer(case: Case) -> bool:
    """Also quantised layers, as floats; a stack would not fit beside the others."""
    return case.kind != "stack"


ENGINES = {
    e.name: e
    for e in (
        Engine("eager", True, on_torch(lambda module: module, "torch eager")),
        Engine("inductor", True, on_torch(inductor, "Inductor"), takes=any_layer),
        Engine("unseen", True, build_unseen, takes=lambda case: case.gated),
        Engine("freezing", True, on_torch(inductor, "Inductor, frozen"), env=(("TORCHINDUCTOR_FREEZING", "1"),)),
        Engine("onnxruntime", True, build_onnxruntime, takes=lambda case: any_layer(case) and not case.gated),
        Engine("ort-int8", True, build_ort_int8, takes=lambda case: case.quantised),
        Engine("ort-nbits", True, build_ort_nbits, takes=lambda case: case.quantised),
        Engine("torch-int", True, build_torch_int, takes=lambda case: case.quantised),
        Engine("openvino", True, build_openvino, takes=lambda case: not case.gated),
        Engine("csr", False, build_csr),
        Engine("sparsec", False, build_sparsec, takes=lambda case: True),
    )
}
