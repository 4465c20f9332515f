"""``cuda``, ``cuda:sm_90``: NVIDIA GPUs, read off the device, or by architecture alone on a machine without one.

Frozen data per architecture; what a device says of itself (SMs, L2, clock, memory) replaces the numbers of the table.
Sources: NVIDIA's data sheets and tuning guides; sparse tensor-core instructions as found in compiled SASS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from sparsec.errors import BadOptionValue, did_you_mean, listed
from sparsec.targets.base import Target


@dataclass(frozen=True)
class GpuTarget(Target):
    """``cores``: SMs. ``bandwidth``: bytes/s of memory; ``copy``: the share of it that a copy reaches.

    ``dense_flops``: dtype -> tensor-core rate of dense products, FLOP/s. ``clock``: Hz, boost. ``native``: sparse
    tensor-core instructions that are not emulated. ``here``: a device of this kind is in this machine.
    """

    capability: int = 90
    bandwidth: float = 0.0
    copy: float = 0.9
    dense_flops: tuple[tuple[str, float], ...] = ()
    clock: float = 0.0
    native: tuple[str, ...] = ()
    here: bool = False

    @property
    def device(self) -> str:
        return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

    @property
    def fingerprint(self) -> str:
        return f"{self.name}/{self.model}/{self.isa}/{self.cores}sm"

    def flops(self, dtype: str) -> float:
        """FLOP/s of dense tensor-core products; those of fp32 are without tensor cores."""
        return dict(self.dense_flops).get(dtype, 0.0)


def _arch(capability: int, model: str, sms: int, bandwidth: float, l2: int, clock: float, bf16: float, fp8: float,
          fp32: float, native: str) -> GpuTarget:  # fmt: skip
    flops = (("bf16", bf16), ("fp16", bf16), ("fp8", fp8), ("int8", max(fp8, 2 * bf16)), ("fp32", fp32))
    return GpuTarget(
        name="cuda", isa=f"sm_{capability}", bf16_dot=True, cores=sms, model=model, l2_bytes=l2, capability=capability,
        bandwidth=bandwidth, dense_flops=flops, clock=clock, native=tuple(native.split()),
    )  # fmt: skip


# The most common board of each architecture. bf16, fp8 and fp32 in FLOP/s, dense.
ARCHITECTURES = {
    "sm_80": _arch(80, "A100-80", 108, 2.04e12, 40 << 20, 1.41e9, 312e12, 0.0, 19.5e12, "mma.sp imma.sp"),
    "sm_89": _arch(89, "RTX 4090", 128, 1.01e12, 72 << 20, 2.52e9, 165e12, 330e12, 82.6e12, "mma.sp imma.sp qmma.sp"),
    "sm_90": _arch(90, "H200", 132, 4.8e12, 60 << 20, 1.98e9, 989e12, 1979e12, 67e12, "mma.sp imma.sp wgmma.sp"),
    "sm_100": _arch(100, "B200", 148, 8.0e12, 126 << 20, 1.97e9, 2250e12, 4500e12, 80e12, "mma.sp imma.sp"),
    "sm_120": _arch(120, "RTX 5090", 170, 1.79e12, 96 << 20, 2.41e9, 210e12, 419e12, 105e12, "mma.sp imma.sp qmma.sp"),
}
OLDEST = 80
EXAMPLE = "sm_90"  # what a machine without a GPU compiles for unless told


def make(variant: str) -> GpuTarget:
    """``variant``: an architecture such as ``sm_90``, or empty for the GPU of this machine.

    Raises BadOptionValue where there is none and none is named, or where it is older than sm_80.
    """
    found = device()
    if not variant:
        if found is None:
            expected = (
                f"this machine has no NVIDIA GPU; name an architecture: {listed(f'cuda:{a}' for a in ARCHITECTURES)}"
            )
            raise BadOptionValue(key="target", value="cuda", expected=expected)
        return found
    if found is not None and found.isa == variant:
        return found
    if variant not in ARCHITECTURES:
        near = did_you_mean(variant, ARCHITECTURES)
        hint = f"; did you mean cuda:{near}?" if near else ""
        raise BadOptionValue(
            key="target", value=f"cuda:{variant}", expected=f"it must be one of {listed(ARCHITECTURES)}{hint}"
        )
    return ARCHITECTURES[variant]


def device(index: int | None = None) -> GpuTarget | None:
    """The GPU of this machine, or None. Initialises CUDA. Raises BadOptionValue for one older than sm_80."""
    import torch

    if not torch.cuda.is_available():
        return None
    said = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return described(said.name, said.major * 10 + said.minor, said.multi_processor_count, int(said.L2_cache_size))


def described(name: str, capability: int, sms: int, l2: int) -> GpuTarget:
    """A target from what a device says. An architecture newer than the table takes the rates of the newest before it.

    Raises BadOptionValue for one older than sm_80: its tensor cores know no sparsity, and bf16 is emulated.
    """
    if capability < OLDEST:
        raise BadOptionValue(
            key="target",
            value="cuda",
            expected=f"{name} is sm_{capability}, and kernels are made for sm_{OLDEST} or newer",
        )
    known = max(int(a.removeprefix("sm_")) for a in ARCHITECTURES if int(a.removeprefix("sm_")) <= capability)
    like = ARCHITECTURES[f"sm_{known}"]
    return replace(
        like, isa=f"sm_{capability}", capability=capability, model=name.removeprefix("NVIDIA "), cores=sms,
        l2_bytes=l2 or like.l2_bytes, here=True,
    )  # fmt: skip
