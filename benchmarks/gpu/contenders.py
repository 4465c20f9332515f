"""What can compute a row: dense products, libraries' sparse ones, and every kernel of ours that packs its weight.

In: a row's weight and x. Out: ``Contender`` objects, each a call by number over cold copies. What cannot be made
raises; ``measure.py`` turns that into a sentence.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional as F

from sparsec.codegen import triton
from sparsec.codegen.cuda import prefill24
from sparsec.codegen.cuda.cslt import DENSE, Cslt, unavailable
from sparsec.codegen.spec import Packed
from sparsec.codegen.triton.contract import Call, Family
from sparsec.codegen.triton.launch import run
from sparsec.codegen.triton.quantize import quantized
from sparsec.compat import scaled_mm_fp8
from sparsec.errors import RoundTripMismatch
from sparsec.formats import Format, value_kind
from sparsec.timing_gpu import copies_of

LIBRARY = "cslt"  # a family that is none of ours: measured as a peer, without copies around it
FP8 = "nm:2:4+fp8"
MANY_ROWS = 33
GATE = 0.5  # for kernels that drop small channels of x or compute some outputs: half of uniform values


@dataclass(frozen=True)
class Contender:
    """``call(i)``: y [M, N] by the i-th copy. ``bytes``: of the weight as stored. ``copies``: cold ones."""

    name: str
    call: Callable[[int], torch.Tensor]
    bytes: int
    copies: int
    pack_s: float = 0.0
    config: Mapping[str, int] = field(default_factory=dict)


def cublas(weights: list[torch.Tensor], x: torch.Tensor) -> Contender:
    return Contender("cuBLAS", lambda i: F.linear(x, weights[i % len(weights)]), _bytes(weights[0]), len(weights))


def inductor(function: Callable[..., torch.Tensor], weights: list[torch.Tensor], x: torch.Tensor) -> Contender:
    return Contender("Inductor", lambda i: function(x, weights[i % len(weights)]), _bytes(weights[0]), len(weights))


def compiled_linear(name: str) -> Callable[..., torch.Tensor]:
    """A linear for Inductor to tune, with code of its own: Dynamo limits how often one code object is compiled."""

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    own = types.FunctionType(linear.__code__.replace(co_name=name), globals(), name)
    made: Any = torch.compile(own, mode="max-autotune-no-cudagraphs", dynamic=False)
    return made  # type: ignore[no-any-return]


def cusparselt(weights: list[torch.Tensor], x: torch.Tensor) -> Contender:
    """cuSPARSELt by its own search of algorithms. x is padded to eight rows, as it asks for, outside of the time.

    Raises LookupError where it cannot be used here.
    """
    why = unavailable()
    if why:
        raise LookupError(why)
    library = Cslt()
    started = time.perf_counter()
    packs = [library.compress(w) for w in weights]
    _wait(x)
    seconds = (time.perf_counter() - started) / len(packs)
    padded = F.pad(x, (0, 0, 0, -len(x) % DENSE))

    def call(i: int) -> torch.Tensor:
        return library.linear(padded, packs[i % len(packs)])[: len(x)]

    return Contender("cuSPARSELt", call, _bytes(packs[0].tensor), len(packs), seconds)


def cusparselt_fp8(weights: list[torch.Tensor], x: torch.Tensor, capability: int) -> Contender:
    """As our family runs it, which rounds x first. Raises PatternMismatch where it cannot be used here."""
    family, format = triton.family(LIBRARY), Format.parse(FP8)
    packs = [family.pack(w, format, "bench") for w in weights]
    made = Pack(LIBRARY, family, packs[0], 0.0)
    return Contender(
        "cuSPARSELt fp8", kernel_call(made, packs, "cusparselt", {}, x, capability), packs[0].bytes, len(packs)
    )


def scaled_mm(weights: list[torch.Tensor], x: torch.Tensor) -> Contender:
    """The dense product of e4m3 by torch, with scales of rows: x is rounded by the same kernel as for ours."""
    found = [prefill24.fp8_of(w, Format.parse(FP8)) for w in weights]

    def call(i: int) -> torch.Tensor:
        launch, codes, scale = quantized(x)
        launch.run()
        weight = found[i % len(found)]
        return scaled_mm_fp8(codes, weight.q.t(), scale[:, None], weight.scale[None], x.dtype)

    return Contender("scaled_mm fp8", call, _bytes(found[0].q), len(found))


def torch_bsr(weights: list[torch.Tensor], x: torch.Tensor, block: tuple[int, int]) -> Contender:
    started = time.perf_counter()
    packs = [w.to_sparse_bsr(block) for w in weights]
    _wait(x)
    seconds = (time.perf_counter() - started) / len(packs)
    size = packs[0].values().numel() * x.element_size() + 4 * packs[0].col_indices().numel()
    return Contender("torch BSR", lambda i: F.linear(x, packs[i % len(packs)]), size, len(packs), seconds)


@dataclass(frozen=True)
class Pack:
    """One weight in one format by one family. ``kind``: of the family. ``weight``: of kernels that read it itself."""

    kind: str
    family: Family
    packed: Packed
    seconds: float
    weight: torch.Tensor | None = None


def kinds_of(format: Format, rows: int = 1) -> tuple[str, ...]:
    """The families of ours that take a format; those for many rows of x from ``MANY_ROWS`` on.

    Families may pack a weight's real values whatever the format says of them, so those must be among its own.
    """
    kinds = [k for k in triton.kinds_of(format) if k != LIBRARY and (k not in triton.OTHERS or rows >= MANY_ROWS)]
    values = value_kind(format.values)[0]
    return tuple(
        k for k in kinds if any(value_kind(Format.parse(f).values)[0] == values for f in triton.family(k).formats)
    )


def pack(kind: str, format: Format, weight: torch.Tensor) -> Pack:
    """Pack and prove it. Raises PatternMismatch, RoundTripMismatch, NoTriton."""
    family = triton.family(kind)
    _wait(weight)
    started = time.perf_counter()
    packed = family.pack(weight, format, "bench")
    _wait(weight)
    seconds = time.perf_counter() - started
    if not packed.tensors:
        return Pack(kind, family, packed, seconds, weight)
    if not torch.equal(family.unpack(packed), weight):
        raise RoundTripMismatch(format=str(format), detail="unpacking gives another weight")
    return Pack(kind, family, packed, seconds)


def kernels(
    made: Pack, x: torch.Tensor, l2: int, capability: int, configs: int, needed: torch.Tensor | None = None
) -> Iterator[Contender]:
    """Every loop of the pack that takes x, with its first ``configs`` configurations.

    ``needed``: of loops that compute some outputs only, [M, N].
    """
    size = made.packed.bytes if made.weight is None else _bytes(made.weight)
    weights = [] if made.weight is None else clones(made.weight, l2)
    count = len(weights) or copies_of(size, l2)
    packs = [made.packed, *(_copy(made.packed) for _ in range(count - 1))]
    for loop, most in made.family.loops.items():
        if most and len(x) > most:
            continue
        for config in list(made.family.configs(made.packed, loop, len(x), capability))[:configs]:
            call = kernel_call(made, packs, loop, config, x, capability, weights, needed)
            said = ",".join(f"{k}={v}" for k, v in config.items())
            name = f"{made.packed.format} {made.kind}.{loop} {said}"
            yield Contender(name, call, size, count, made.seconds, dict(config))


def kernel_call(
    made: Pack, packs: list[Packed], loop: str, config: Mapping[str, int], x: torch.Tensor, capability: int,
    weights: Sequence[torch.Tensor] = (), needed: torch.Tensor | None = None,
) -> Callable[[int], torch.Tensor]:  # fmt: skip
    gate = GATE if loop == "skip" else None
    family: Any = made.family

    def call(i: int) -> torch.Tensor:
        y = x.new_empty((len(x), packs[0].shape[0]))
        weight = weights[i % len(weights)] if weights else None
        said = Call(x, y, capability=capability, gate=gate, weight=weight, needed=needed)
        run(family.launches(packs[i % len(packs)], loop, said, config))
        return y

    return call


def clones(weight: torch.Tensor, l2: int) -> list[torch.Tensor]:
    count = copies_of(_bytes(weight), l2)
    return [weight, *(weight.clone() for _ in range(count - 1))]


def _copy(packed: Packed) -> Packed:
    return replace(packed, tensors=tuple(t.clone() for t in packed.tensors))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
