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
from sparsec.codegen.triton.launch import Launch, Runs
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

FORMATS = ("nm:2:4+bf16", "nm:2:4+fp16", "nm:2:4+fp8")
KINDS = ("mma", "wgmma")  # the position in this tuple is the version of a pack
WGMMA = 90  # the one architecture that has wgmma


@dataclass(frozen=True)
class Ready:
    """A launch that is only run. ``compile``: machine code for a capability, where it is compiled by us."""

    name: str
    run: Callable[[], object]
    compile: Callable[[int], bytes] | None = None


class Prefill:
    """``mma.sp`` on sm_80 and after, ``wgmma.sp`` on sm_90: which, the pack says, since their orders differ.

    fp8: x is rounded to e4m3 by a launch before, which loses bits whatever the weight is; nothing plans it by itself.
    """

    kind = "prefill24"
    formats = FORMATS
    loops = LOOPS["prefill24"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        capability = _capability(weight)
        kind = KINDS[capability == WGMMA]
        if format.values != "fp8":
            return replace(prefill24.pack(weight, kind, source_key), version=KINDS.index(kind))
        if capability and capability not in prefill24.FP8:
            detail = f"sm_{capability} has no sparse products of e4m3"
            raise PatternMismatch(format=str(format), detail=detail)
        return replace(prefill24.pack_fp8(weight, kind, source_key), version=KINDS.index(kind))

    def unpack(self, packed: Packed) -> torch.Tensor:
        return prefill24.unpack(packed, KINDS[packed.version])

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Numbers of ``prefill24.shapes`` whose order of the pack is this one's, the best guess first."""
        found = _shapes(packed, "", m, capability)
        return [{"shape": i} for i, shape in enumerate(found) if shape.kind == KINDS[packed.version]]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Runs]:
        shape = _shapes(packed, call.act, call.m, call.capability)[config["shape"]]
        before, x, scales = _quantized(packed, call)
        run = _bound(prefill24.linear, packed, shape, x, call.y, call.bias, call.capability, *scales)
        return [*before, Ready(shape.name, run, lambda capability: prefill24.cubin(shape, capability))]


def _capability(weight: torch.Tensor) -> int:
    """Of the GPU that a weight is on, 90 for sm_90; 0 on a CPU."""
    if not weight.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(weight.device)
    return 10 * major + minor


def _shapes(packed: Packed, act: str, m: int, capability: int) -> list[prefill24.Shape]:
    """Of a pack; those of fp8 make y in the dtype of the weight that was packed."""
    values = packed.format.values
    if values != "fp8":
        return prefill24.shapes(values, act, m, capability)
    return prefill24.shapes(prefill24.DTYPES[packed.tensors[3].dtype], act, m, capability, values)


def _quantized(packed: Packed, call: Call) -> tuple[list[Launch], torch.Tensor, tuple[torch.Tensor, ...]]:
    """What has to run before, x as the kernel takes it, and the scales of its rows where it has them."""
    if packed.format.values != "fp8":
        return [], call.x, ()
    from sparsec.codegen.triton.quantize import quantized

    launch, x, scale = quantized(call.x)
    return [launch], x, (scale,)


class CuSparseLt:
    """The library of NVIDIA through torch; its search runs at a shape's first call."""

    kind = "cslt"
    formats = FORMATS
    loops = LOOPS["cslt"]

    def __init__(self) -> None:
        self._products: cslt.Cslt | None = None

    @property
    def products(self) -> cslt.Cslt:
        if self._products is None:
            self._products = cslt.Cslt()
        return self._products

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        fp8 = format.values == "fp8"
        why = cslt.unavailable(fp8) or cslt.unfit(weight)
        if why:
            raise PatternMismatch(format="cuSPARSELt's 2:4", detail=why)
        if fp8:
            made = self.products.compress_fp8(prefill24.fp8_of(weight, format))
        else:
            made = self.products.compress(weight)
        scales = () if made.scale is None else (made.scale, weight.new_empty(0))
        nothing = torch.zeros(0, dtype=torch.int64)
        return Packed(format, made.columns, (made.tensor, *scales), nothing, made.shape, source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """Its order is not documented: the weight is what the identity times it gives, exactly."""
        tensor, made = packed.tensors[0], _compressed(packed)
        one = torch.eye(packed.shape[1], device=tensor.device).to(tensor.dtype)
        if made.scale is None:
            return self.products.linear(one, made).t().contiguous()
        ones = torch.ones(len(one), device=tensor.device)
        return self.products.linear_fp8(one, ones, made, None, "", packed.tensors[2].dtype).t().contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        return [{}]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Runs]:
        made = _compressed(packed)
        before, x, scales = _quantized(packed, call)

        def run() -> None:
            if scales:
                y = self.products.linear_fp8(x, scales[0], made, call.bias, call.act, call.y.dtype)
            else:
                y = self.products.linear(x, made, call.bias, call.act)
            call.y.copy_(y)

        return [*before, Ready("cusparselt", run)]


def _compressed(packed: Packed) -> cslt.Compressed:
    fp8 = len(packed.tensors) > 1
    multiple = cslt.SPARSE * (2 if fp8 else 1)
    rows = -(-packed.shape[0] // multiple) * multiple
    return cslt.Compressed(packed.tensors[0], packed.shape, rows, packed.version, packed.tensors[1] if fp8 else None)


def _bound(function: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: function(*args)


PREFILL = Prefill()
CSLT = CuSparseLt()
