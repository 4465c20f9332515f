"""What this installation is and what works in it, as a block to paste into an issue. Never raises.

In: nothing but the machine. Out: a ``Checkup``; every kernel that cannot be used here has a reason.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsec import __version__
from sparsec.errors import SparsecError, SparsecWarning

PACKAGES = ("torch", "numpy", "sympy", "transformers", "safetensors", "onnx", "onnxruntime", "triton")
VARIABLES = ("CXX", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_FREEZING")
Step = Callable[[int, int, str], None]


@dataclass(frozen=True)
class KernelCheck:
    """One kernel on one ISA. ``reason``: why it cannot be used here, or "". ``source``: the generated C++, if there."""

    family: str
    loop: str
    dtype: str
    isa: str
    built: bool
    reason: str
    source: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkup:
    """Facts as (name, value) pairs in the order to show them, and the kernels."""

    facts: tuple[tuple[str, str], ...]
    kernels: tuple[KernelCheck, ...] = ()
    problems: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        said = asdict(self)
        return {**said, "facts": dict(self.facts)}


def checkup(build: bool = True, step: Step | None = None) -> Checkup:
    """Look at everything. ``build``: also build the kernels for this machine (cached; the first time 2 s each)."""
    facts = [
        ("sparsec", f"{__version__} at {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        *((name, _version(name)) for name in PACKAGES),
        *_safely("cpu", _cpu),
        *_safely("threads", _threads),
        *_safely("gpu", _gpu),
        *_safely("compiler", _compiler),
        *_safely("cache", _cache),
        *_safely("backend", _backend),
        *((name, os.environ[name]) for name in (*VARIABLES, *_own_variables()) if name in os.environ),
    ]
    problems = [f"{name}: {value}" for name, value in facts if value.startswith("unusable")]
    kernels = tuple(kernel_checks(build=build, step=step))
    return Checkup(tuple(facts), kernels, tuple(problems))


def kernel_checks(isas: Sequence[str] = (), build: bool = True, step: Step | None = None) -> Iterator[KernelCheck]:
    """Every family x loop x dtype on each of ``isas`` (default: the widest this machine has)."""
    from sparsec.codegen.cpp import FAMILIES, family
    from sparsec.targets.detect import ISA_NEEDS, cpu_flags, detect

    try:
        chosen = list(isas) or [detect().isa]
    except SparsecError as error:  # a wrong SPARSEC_ISA
        chosen, wrong = [os.environ.get("SPARSEC_ISA", "")], str(error)
        yield from (KernelCheck(kind, "", "", chosen[0], False, wrong) for kind in FAMILIES)
        return
    wanted: list[tuple[str, str, str, str]] = []
    for isa in chosen:
        missing = sorted(ISA_NEEDS[isa] - cpu_flags())
        for kind in FAMILIES:
            try:
                loops = family(kind).loops
            except Exception as error:
                yield KernelCheck(kind, "", "", isa, False, _sentence(error))
                continue
            if missing:
                reason = f"this CPU has no {', '.join(missing)}"
                yield from (KernelCheck(kind, loop, dtype, isa, False, reason) for loop in loops for dtype in _DTYPES)
                continue
            wanted += [(kind, loop, dtype, isa) for loop in loops for dtype in _DTYPES]
    for number, (kind, loop, dtype, isa) in enumerate(wanted):
        if step:
            step(number, len(wanted), f"{kind} {loop} {dtype} {isa}")
        yield _check(kind, loop, dtype, isa, build)


_DTYPES = ("fp32", "bf16")


def _check(kind: str, loop: str, dtype: str, isa: str, build: bool) -> KernelCheck:
    from sparsec.cache import cache_dir
    from sparsec.codegen import build as builder
    from sparsec.codegen.spec import KernelSpec
    from sparsec.formats import Format, Pattern
    from sparsec.targets.detect import detect

    spec = KernelSpec(Format(Pattern.parse(kind), dtype), loop, dtype, isa, bf16_dot=_bf16_dot(dtype, isa, detect()))
    cache = cache_dir()
    if not build:
        found = sorted((cache / "kernels").glob(f"{spec.name}-*.so"))
        source = str(found[0].with_suffix(".cpp")) if found else ""
        return KernelCheck(kind, loop, dtype, isa, bool(found), "", source)
    started = time.perf_counter()
    try:
        kernel = builder.build(spec, cache)
    except Exception as error:
        return KernelCheck(kind, loop, dtype, isa, False, _sentence(error))
    return KernelCheck(kind, loop, dtype, isa, True, "", str(kernel.source), time.perf_counter() - started)


def _gpu() -> str:
    """The GPU that kernels would run on, and whether they can be compiled; a machine without one is no problem."""
    from sparsec.codegen.triton import KNOWN, need_triton
    from sparsec.errors import NoTriton
    from sparsec.targets import cuda

    try:
        version = need_triton()
    except NoTriton as error:
        compiles = f"GPU kernels cannot be compiled: {error.__class__.__name__}, {_sentence(error)}"
    else:
        newer = tuple(map(int, version.split(".")[:2])) > tuple(map(int, KNOWN[1].split(".")))
        known = f"; newer than {KNOWN[1]}, the last that kernels were tried with" if newer else ""
        compiles = f"triton {version} compiles GPU kernels{known}"
    found = cuda.device()
    if found is None:
        return f"none; {compiles}"
    return f"{found.model}, {found.isa}, {found.cores} SMs; {compiles}"


def _bf16_dot(dtype: str, isa: str, machine: Any) -> bool:
    return dtype == "bf16" and isa == machine.isa and bool(machine.bf16_dot)


def _safely(name: str, look: Callable[[], str]) -> Iterator[tuple[str, str]]:
    """The fact, or why it could not be found: a checkup must not fail on the machine it is meant for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SparsecWarning)
        try:
            yield name, look()
        except Exception as error:
            yield name, f"unusable: {_sentence(error)}"
    for warning in caught:
        yield f"{name} warning", str(warning.message)


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text and isinstance(error, SparsecError) else f"{type(error).__name__}: {text[0] if text else ''}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    from sparsec.targets.detect import detect

    found = detect()
    caches = f"L2 {found.l2_bytes // 1024} KiB, L3 {found.l3_bytes // 1024} KiB"
    return (
        f"{found.model}, {found.isa}{' + bf16 dot products' if found.bf16_dot else ''}, {found.cores} cores, {caches}"
    )


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} (torch), {torch.backends.cpu.get_cpu_capability()}"


def _compiler() -> str:
    import shlex
    import subprocess

    from sparsec.codegen.build import find_compiler

    command = find_compiler()
    done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=60)
    lines = (done.stdout or done.stderr).splitlines()
    return f"{command} ({lines[0] if lines else 'no version'})"


def _cache() -> str:
    from sparsec.cache import cache_dir

    folder = cache_dir()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{folder}, {sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files"


def _backend() -> str:
    if not importlib.metadata.entry_points(group="torch_dynamo_backends", name="sparsec"):
        return "unusable: torch.compile cannot find backend 'sparsec'; install sparsec again"
    from sparsec.runtime import library

    library.load()
    return "torch.compile(backend='sparsec') is registered, the C++ op loads"


def _own_variables() -> list[str]:
    return sorted(name for name in os.environ if name.startswith("SPARSEC_"))
