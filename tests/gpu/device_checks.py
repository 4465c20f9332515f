"""What every kernel is held to on a GPU: ``python tests/gpu/device_checks.py KIND FORMAT`` for one format of a family.

Each format is checked in a process of its own: a kernel that reaches outside of its memory takes the device down for
the whole process, and kernels of several formats compile at once. A line of JSON before each case and one after it, so
that whoever reads knows what was running. The same functions run on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from sparsec.codegen import reference, triton
from sparsec.codegen.cuda import prefill24
from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.launch import run
from sparsec.codegen.triton.quantize import by_torch
from sparsec.codegen.triton.samples import named_weight
from sparsec.errors import NoNvrtc, NoTriton, PatternMismatch
from sparsec.formats import Format

ROWS = (1, 3, 8, 16, 17, 64, 65)
RAGGED, ALIGNED = (331, 1031), (512, 2048)  # [N, K]: multiples of nothing; of everything
CONFIGS = 3  # tried at the fewest and the most rows of x; at others the best guess alone
GATES = (None, 0.5)  # exact zeros, and a threshold
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}  # of one rounding to nearest
SUMS = 2e-5  # of fp32 sums in any order, relative to the sum of absolute products
SUMS_FP8 = (
    2.0**-11
)  # of e4m3 on Hopper, whose tensor cores add with about 14 bits; a scale or a place that is wrong is seen


@dataclass(frozen=True)
class Case:
    kind: str
    format: str
    loop: str
    m: int
    n: int
    k: int
    config: int = 0
    act: str = ""
    bias: bool = False
    gate: float | None = None

    @property
    def name(self) -> str:
        said = f" {self.act}" if self.act else ""
        return f"{self.kind} {self.format} {self.loop} M={self.m} {self.n}x{self.k} config {self.config}{said}"


@dataclass(frozen=True)
class Outcome:
    """``worst``: largest error over what is allowed. ``failure``: a sentence; ``refused``: one of the packer."""

    case: Case
    worst: float = 0.0
    same_bits: bool = True
    failure: str = ""
    refused: str = ""


class Way(Protocol):
    """How one family computes. ``loops``: with the most rows of x each takes (0: any)."""

    formats: tuple[str, ...]
    loops: dict[str, int]

    def pack(self, weight: torch.Tensor, format: Format, loop: str) -> Any:
        """Packed, and proven by unpacking where that is possible. Raises PatternMismatch."""
        ...

    def configs(self, packed: Any, loop: str, m: int, capability: int) -> list[Any]: ...

    def product(self, packed: Any, case: Case, config: Any, call: Call) -> None:
        """Write ``call.y``."""
        ...


class FamilyWay:
    """A family of Triton kernels, or a gate."""

    def __init__(self, kind: str) -> None:
        self.family: Any = triton.family(kind)
        self.formats, self.loops = tuple(self.family.formats), dict(self.family.loops)

    def pack(self, weight: torch.Tensor, format: Format, loop: str) -> Any:
        packed = self.family.pack(weight, format, "check")
        assert not packed.tensors or torch.equal(self.family.unpack(packed), weight), "unpacking gives another weight"
        return packed

    def configs(self, packed: Any, loop: str, m: int, capability: int) -> list[Any]:
        return list(self.family.configs(packed, loop, m, capability))

    def product(self, packed: Any, case: Case, config: Any, call: Call) -> None:
        run(self.family.launches(packed, case.loop, replace(call, gate=case.gate), config))


class PrefillWay:
    """2:4 for many rows of x by ``mma.sp``, which the registry takes for other GPUs than those of sm_90."""

    formats = ("nm:2:4+bf16", "nm:2:4+fp16")  # mma.sp of e4m3 is emulated on sm_90, and elsewhere the registry has it
    loops: dict[str, int] = {"mma": 0}  # noqa: RUF012

    def pack(self, weight: torch.Tensor, format: Format, loop: str) -> Any:
        packed = prefill24.pack(weight, loop)
        assert torch.equal(prefill24.unpack(packed, loop), weight), "unpacking gives another weight"
        return packed

    def configs(self, packed: Any, loop: str, m: int, capability: int) -> list[Any]:
        return [s for s in prefill24.shapes(packed.format.values, "", m, capability) if s.kind == loop]

    def product(self, packed: Any, case: Case, config: Any, call: Call) -> None:
        prefill24.linear(packed, replace(config, act=call.act), call.x, call.y, call.bias, call.capability)


ON_DEVICE = {"prefill24 mma": PrefillWay}  # besides what the registry has on this GPU
ROUNDS_TWICE = ("cslt",)  # before the activation, and after


@functools.cache
def way(kind: str) -> Way:
    return ON_DEVICE[kind]() if kind in ON_DEVICE else FamilyWay(kind)


def registered(on_device: bool = False) -> list[tuple[str, str]]:
    """(family, format) for all that is registered, gates too; empty where there is no triton."""
    kinds = [*triton.FAMILIES, *triton.GATES, *((*triton.OTHERS, *ON_DEVICE) if on_device else ())]
    try:
        return [(kind, name) for kind in kinds for name in way(kind).formats]
    except NoTriton:
        return []


def cases(kind: str, name: str, shapes: tuple[tuple[int, int], ...] = (RAGGED, ALIGNED)) -> Iterator[Case]:
    """Every loop over ragged shapes; activations and bias take turns, so that each kernel meets them."""
    number = 0
    gates: tuple[float | None, ...] = GATES if kind == "gated" else (None,)
    for loop, most in way(kind).loops.items():
        taken = [m for m in ROWS if not most or m <= most]
        ends = {taken[0], taken[-1]}
        for shape in shapes:
            for m in taken if shape != ALIGNED else sorted(ends):
                for config in range(CONFIGS if m in ends and shape != ALIGNED else 1):
                    act, bias = ACTS[number % len(ACTS)], number % 2 == 0
                    number += 1
                    for gate in gates:
                        yield Case(kind, name, loop, m, *shape, config, act, bias, gate)


def check(case: Case, device: torch.device | str, capability: int, exact: bool = True) -> Outcome | None:
    """Run one case twice. None where the kernel has fewer configurations. ``exact``: bf16 is rounded, not cut off."""
    how = way(case.kind)
    try:
        weight, packed = packed_weight(case.kind, case.format, case.loop, case.n, case.k, str(device))
        configs = how.configs(packed, case.loop, case.m, capability)
        if case.config >= len(configs):
            return None
        x, bias = inputs(case, weight)
        needed = outputs(case, weight)
        read = (needed != 0).any(0)
        found = []
        for _ in range(2):
            y = torch.full((case.m, case.n), float("nan"), dtype=x.dtype, device=x.device)
            call = Call(x, y, bias, case.act, capability, needed=needed, weight=weight)
            how.product(packed, case, configs[case.config], call)
            if y[:, ~read].any():  # NaN too: the model multiplies these by zero
                return Outcome(case, failure="outputs that nobody reads are not zero")
            found.append(y[:, read])
    except (PatternMismatch, NoNvrtc) as error:
        return Outcome(case, refused=str(error))
    worst = error_of(case, found[0], x, weight[read], None if bias is None else bias[read], exact)
    failure = "" if worst <= 1 else f"an error is {worst:.3g} times what is allowed"
    return Outcome(case, worst, torch.equal(found[0], found[1]), failure)


@functools.lru_cache(maxsize=4)
def packed_weight(kind: str, name: str, loop: str, n: int, k: int, device: str) -> tuple[torch.Tensor, Any]:
    """A random weight and its proven pack. Raises PatternMismatch."""
    weight = named_weight(name, n, k, seed=n + k).to(device)
    return weight, way(kind).pack(weight, Format.parse(name), loop)


def inputs(case: Case, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [m, k] with rows further apart than k where m is odd, zeros among its values, and the bias."""
    generator = torch.Generator().manual_seed(case.m)
    wide = torch.randn(case.m, case.k + 3 * (case.m % 2), generator=generator)
    wide *= torch.rand(wide.shape, generator=generator) < 0.9
    x = wide.to(weight)[:, : case.k]
    return x, torch.randn(case.n, generator=generator).to(weight) if case.bias else None


def outputs(case: Case, weight: torch.Tensor) -> torch.Tensor:
    """[m, n], whose zeros are outputs that nobody reads: of kernels that compute some a few, of others none."""
    shape = (min(case.m, 2), case.n)
    if case.loop != "select":
        return torch.ones(shape).to(weight)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(case.m)) < 0.3).to(weight)


def error_of(
    case: Case, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, exact: bool
) -> float:
    """The largest error over what one rounding of y and fp32 sums allow; infinite for NaN."""
    if case.gate is not None:
        x = torch.where(x.abs() > case.gate, x, 0)
    dtype, fp8 = x.dtype, Format.parse(case.format).values == "fp8"
    if fp8:  # what the kernel multiplies: rounding x is not its error
        codes, scales = by_torch(x)
        x = codes.double() * scales.double()[:, None]
    wide = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    expected = reference.ACT[case.act](wide)
    scale = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    step = STEP[dtype] * (1.0 if exact else 4.0) * (2.2 if case.kind in ROUNDS_TWICE else 1.0)
    allowed = (
        1.05 * step * expected.abs() + (SUMS_FP8 if fp8 else SUMS) * scale + (0.0 if exact else step * scale) + 1e-6
    )
    off = ((y.double() - expected).abs() / allowed).nan_to_num(nan=float("inf"))
    return float(off.max())


def main(kind: str, name: str) -> None:
    """Check all cases of one format on the current GPU; lines of JSON on stdout."""
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    for case in cases(kind, name):
        print(json.dumps({"starts": asdict(case)}), flush=True)
        try:
            found = check(case, "cuda", capability)
            torch.cuda.synchronize()
        except Exception as error:
            said = next((line for line in str(error).splitlines() if line.strip()), "")
            found = Outcome(case, failure=f"{type(error).__name__}: {said}"[:300])
        if found is not None:
            print(json.dumps({"found": asdict(found)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
