"""2:4 for many rows of x as families of the runtime: our CUDA C++ kernels, and cuSPARSELt.

They pack and launch as the families of ``codegen/triton`` do, so plans, packs, tuning and the op take them alike; what
runs is no Triton kernel, so a launch here is only something with ``run``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sparsec.codegen.cuda import cslt, prefill24
from sparsec.codegen.spec import Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

FORMATS = ("nm:2:4+bf16", "nm:2:4+fp16")
KINDS = ("mma", "wgmma")  # the position in this tuple is the version of a pack
WGMMA = 90  # the one architecture that has wgmma


@dataclass(frozen=True)
class Ready:
    """A launch that is only run. ``compile``: machine code for a capability, where it is compiled by us."""

    name: str
    run: Callable[[], object]
    compile: Callable[[int], bytes] | None = None


class Prefill:
    """``mma.sp`` on sm_80 and after, ``wgmma.sp`` on sm_90: which, the pack says, since their orders differ."""

    kind = "prefill24"
    formats = FORMATS
    loops = LOOPS["prefill24"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        wide = weight.is_cuda and torch.cuda.get_device_capability(weight.device) == divmod(WGMMA, 10)
        kind = KINDS[wide]
        return replace(prefill24.pack(weight, kind, source_key), version=KINDS.index(kind))

    def unpack(self, packed: Packed) -> torch.Tensor:
        return prefill24.unpack(packed, KINDS[packed.version])

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Numbers of ``prefill24.shapes`` whose order of the pack is this one's, the best guess first."""
        found = prefill24.shapes(packed.format.values, "", m, capability)
        return [{"shape": i} for i, shape in enumerate(found) if shape.kind == KINDS[packed.version]]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Ready]:
        shape = prefill24.shapes(packed.format.values, call.act, call.m, call.capability)[config["shape"]]
        run = _bound(prefill24.linear, packed, shape, call.x, call.y, call.bias, call.capability)
        return [Ready(shape.name, run, lambda capability: prefill24.cubin(shape, capability))]


class CuSparseLt:
    """The library of NVIDIA through torch; its search runs at a shape's first call."""

    kind = "cslt"
    formats = FORMATS
    loops = LOOPS["cslt"]

    def __init__(self) -> None:
        self._library: cslt.Cslt | None = None

    @property
    def library(self) -> cslt.Cslt:
        if self._library is None:
            self._library = cslt.Cslt()
        return self._library

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        why = cslt.unavailable() or cslt.unfit(weight)
        if why:
            raise PatternMismatch(format="cuSPARSELt's 2:4", detail=why)
        made = self.library.compress(weight)
        nothing = torch.zeros(0, dtype=torch.int64)
        return Packed(format, made.columns, (made.tensor,), nothing, made.shape, source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """Its order is not documented: the weight is what the identity times it gives, exactly."""
        one = torch.eye(packed.shape[1], dtype=packed.tensors[0].dtype, device=packed.tensors[0].device)
        return self.library.linear(one, _compressed(packed)).t().contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        return [{}]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Ready]:
        def run() -> None:
            call.y.copy_(self.library.linear(call.x, _compressed(packed), call.bias, call.act))

        return [Ready("cusparselt", run)]


def _compressed(packed: Packed) -> cslt.Compressed:
    rows = -(-packed.shape[0] // cslt.SPARSE) * cslt.SPARSE
    return cslt.Compressed(packed.tensors[0], packed.shape, rows, packed.version)


def _bound(function: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: function(*args)


PREFILL = Prefill()
CSLT = CuSparseLt()
