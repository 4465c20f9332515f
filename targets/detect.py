"""What this machine is, asked at run time: CPU flags, model name, cores, cache sizes.

Linux says it in /proc/cpuinfo and /sys. Elsewhere torch's own detection is the fallback, and where it cannot prove
that an instruction is there, the narrower ISA is taken.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from sparsec.errors import BadOptionValue
from sparsec.targets.base import Target

# Flags, as Linux spells them, that the code of an ISA may use (codegen/build.py compiles with these and no others).
ISA_NEEDS: dict[str, frozenset[str]] = {
    "avx512": frozenset(
        "avx512f avx512bw avx512vl avx512dq avx512_vbmi2 avx2 fma f16c bmi1 bmi2 abm popcnt".split()  # noqa: SIM905
    ),
    "avx2": frozenset("avx2 fma f16c bmi1 bmi2 abm popcnt".split()),  # noqa: SIM905
    "portable": frozenset(),
}
# Beyond the ISA, for kernels that compute in int8.
INT_DOT_NEEDS: dict[str, tuple[tuple[str, frozenset[str]], ...]] = {
    "avx512": (
        ("amx", frozenset({"amx_tile", "amx_int8", "avx512_vnni", "avx512vbmi"})),
        ("vnni", frozenset({"avx512_vnni", "avx512vbmi"})),
    ),
    "avx2": (("vnni", frozenset({"avx_vnni"})),),
    "portable": (),
}
BF16_DOT = "avx512_bf16"

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def detect(isa: str = "") -> Target:
    """The CPU of this machine. ``isa``: ask for one of ISA_NEEDS; else SPARSEC_ISA, else the widest there is.

    Raises BadOptionValue for an ISA that does not exist or that this CPU cannot run.
    """
    said = isa or os.environ.get("SPARSEC_ISA", "").strip()
    flags = cpu_flags()
    chosen = said or widest(flags)
    if said:
        _check(said, flags, key="target" if isa else "SPARSEC_ISA")
    return Target(
        name="cpu",
        isa=chosen,
        bf16_dot=chosen == "avx512" and BF16_DOT in flags,
        cores=usable_cores(),
        model=cpu_model(),
        l2_bytes=cache_bytes(2),
        l3_bytes=cache_bytes(3),
        int_dot=next((name for name, needs in INT_DOT_NEEDS[chosen] if needs <= flags), ""),
    )


def widest(flags: frozenset[str]) -> str:
    """The first ISA, from wide to narrow, whose every flag is there."""
    return next(isa for isa, needs in ISA_NEEDS.items() if needs <= flags)


def _check(isa: str, flags: frozenset[str], key: str) -> None:
    if isa not in ISA_NEEDS:
        raise BadOptionValue(key=key, value=isa, expected=f"it must be one of {', '.join(ISA_NEEDS)}")
    missing = sorted(ISA_NEEDS[isa] - flags)
    if missing:
        reason = f"this CPU has no {', '.join(missing)}; the widest it runs is {widest(flags)!r}"
        raise BadOptionValue(key=key, value=f"cpu:{isa}" if key == "target" else isa, expected=reason)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """CPU feature flags in Linux's spelling; what torch proves where /proc/cpuinfo cannot be read."""
    said = _cpuinfo("flags") or _cpuinfo("Features")
    return frozenset(said.split()) if said else _flags_by_torch()


def _flags_by_torch() -> frozenset[str]:
    import torch

    # torch's AVX512 does not include VBMI2, which the expand instructions need: AVX2 is all that this proves.
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512", "AVX512_VNNI")
    return ISA_NEEDS["avx2"] if wide else frozenset()


def cpu_model() -> str:
    """The name on the box, for people and for the fingerprint."""
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown CPU"


def _cpuinfo(field: str) -> str:
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes(level: int) -> int:
    """Size of the data or unified cache of a level that core 0 sees; 0 where the machine does not say."""
    for index in sorted(_CACHES.glob("index*")):
        try:
            found = int((index / "level").read_text()), (index / "type").read_text().strip()
            text = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if found[0] == level and found[1] != "Instruction":
            scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
            return int(text.rstrip("KMG")) * scale
    return 0
