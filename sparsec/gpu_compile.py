"""The kernels of a model compiled for a GPU that need not be there: a model and a target in, cubins and a table out.

Every prunable weight is profiled, decided and packed as ``torch.compile`` would do it on that target; each distinct
kernel that the decisions name is compiled to machine code and read back. Triton keeps what it compiled in its own
cache, so a machine with the GPU and that cache compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsec.cache import digest, write_atomic
from sparsec.errors import KernelCompileFailed
from sparsec.facts import Decision, Range
from sparsec.options import Policy
from sparsec.passes.graph import DTYPES
from sparsec.targets.cuda import GpuTarget

Step = Callable[[int, int, str], None]
ROWS = (1, 16, 256)  # rows of x that ranges without an end are compiled for


@dataclass(frozen=True)
class CompiledKernel:
    """One machine code. ``rows``: of x it was made for. ``per_unit``: lane instructions a weight or non-zero."""

    format: str
    loop: str
    shape: tuple[int, int]
    rows: int
    kernel: str
    registers: int
    spilled: int
    unit: str
    per_unit: float
    cubin: str


@dataclass(frozen=True)
class CompiledLayer:
    """``runs``: (first row count, last or None, format, loop) for each range of M. ``reason``: of the decision."""

    name: str
    shape: tuple[int, int]
    zeros: float
    runs: tuple[tuple[int, int | None, str, str], ...]
    reason: str


@dataclass(frozen=True)
class CompiledModel:
    """``failed``: sentences about kernels that did not compile; their layers would run dense."""

    target: str
    model: str
    layers: tuple[CompiledLayer, ...]
    kernels: tuple[CompiledKernel, ...]
    failed: tuple[str, ...]
    folder: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_kernels(
    model: nn.Module,
    target: GpuTarget,
    policy: Policy,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "",
    step: Step = lambda done, total, what: None,
) -> CompiledModel:
    """Compile what ``model`` would run on ``target`` with weights of ``dtype``. Raises NoTriton, WriteFailed."""
    from sparsec.codegen.triton import need_triton
    from sparsec.prunable import survey

    need_triton()
    layers, kernels, failed = [], {}, []
    layers_of = survey(model).layers.items()
    found = [(name, layer) for name, layer in layers_of if layer.kind != "conv2d"]  # GPUs have no kernel for those
    with torch.no_grad():
        for number, (layer, held) in enumerate(found):
            step(number, len(found), layer)
            weight = held.matrix.to(dtype).contiguous()
            fact, decision = _decided(weight, target, policy)
            runs = tuple((r.m_lo, r.m_hi, r.format, r.kernel) for r in decision.ranges)
            layers.append(CompiledLayer(layer, held.shape, fact.sparsity, runs, decision.reason))
            for part, rows in _calls(decision):
                key = (part.format, part.kernel, held.shape, rows)
                if key in kernels:
                    continue
                try:
                    kernels[key] = _compiled(weight, part, rows, target, folder)
                except KernelCompileFailed as error:
                    failed.append(str(error))
    return CompiledModel(
        f"cuda:{target.isa}", name, tuple(layers), tuple(kernels.values()), tuple(dict.fromkeys(failed)), str(folder)
    )


def _decided(weight: torch.Tensor, target: GpuTarget, policy: Policy) -> Any:
    from sparsec.gpu_rates import rates_for
    from sparsec.passes.decide import decide
    from sparsec.passes.profile.weights import profile

    fact = profile(weight)
    return fact, decide(fact, DTYPES[weight.dtype], target, rates_for(target, fact, policy.formats), policy)


def _calls(decision: Decision) -> Iterator[tuple[Range, int]]:
    """Each range with the rows it is compiled for: those of ROWS in it, and its first."""
    for part in decision.ranges:
        if part.format == "dense":
            continue
        inside = [m for m in ROWS if part.m_lo <= m <= (part.m_hi or m)]
        yield from ((part, m) for m in dict.fromkeys((part.m_lo, *inside)))


def _compiled(weight: torch.Tensor, part: Range, rows: int, target: GpuTarget, folder: Path) -> CompiledKernel:
    from sparsec.codegen.triton import family_of, pack_verified
    from sparsec.codegen.triton.compile import compile_launch
    from sparsec.codegen.triton.contract import Call
    from sparsec.codegen.triton.launch import Launch
    from sparsec.codegen.triton.sass import analysed
    from sparsec.formats import Format

    format = Format.parse(part.format)
    packed = pack_verified(weight, format, "offline", part.kernel)
    n, k = packed.shape
    call = Call(weight.new_zeros(rows, k), weight.new_empty(rows, n), capability=target.capability)
    family = family_of(format, part.kernel)
    config = family.configs(packed, part.kernel, rows, target.capability)[0]
    made: list[CompiledKernel] = []
    for launch in family.launches(packed, part.kernel, call, config):
        if not isinstance(launch, Launch):
            made += _other(launch, part, rows, (n, k), target, folder)
            continue
        done = compile_launch(launch, target.capability)
        sass = analysed(launch, done)
        path = folder / f"{launch.name}-{digest(done.cubin)[:16]}.cubin"
        write_atomic(path, done.cubin)
        write_atomic(path.with_suffix(".ptx"), done.ptx.encode())
        unit = launch.loop.unit if launch.loop else ""
        made.append(
            CompiledKernel(
                part.format,
                part.kernel,
                (n, k),
                rows,
                launch.name,
                sass.registers,
                sass.local,
                unit,
                round(sass.per_unit, 2),
                path.name,
            )
        )
    return next((m for m in made if m.unit), made[0])


def _other(
    launch: Any, part: Range, rows: int, shape: tuple[int, int], target: GpuTarget, folder: Path
) -> Iterator[CompiledKernel]:
    """A kernel of CUDA C++; none of a library's."""
    from sparsec.codegen.triton.sass import disassembled

    if launch.compile is None:
        return
    cubin = launch.compile(target.capability)
    path = folder / f"{launch.name}-{digest(cubin)[:16]}.cubin"
    write_atomic(path, cubin)
    read = disassembled(cubin)
    yield CompiledKernel(
        part.format, part.kernel, shape, rows, launch.name, read.registers, read.local, "", 0.0, path.name
    )


def table_of(made: CompiledModel) -> str:
    """Layers by what they run, then the kernels."""
    from sparsec.bench_output import table
    from sparsec.report_fold import merge_names, template

    groups: dict[object, list[CompiledLayer]] = {}
    for layer in made.layers:
        groups.setdefault((template(layer.name), layer.shape, layer.runs, round(layer.zeros, 2)), []).append(layer)
    rows = [
        (
            merge_names([x.name for x in group]) or "(the model)",
            f"{group[0].shape[0]}x{group[0].shape[1]}",
            f"{group[0].zeros:.0%}",
            "; ".join(_run(*run) for run in group[0].runs),
        )
        for group in groups.values()
    ]
    first = ["layer", "shape", "zeros", "rows of x: what runs"]
    lines = [f"{made.model or 'model'} on {made.target}", "", table(first, rows, left=(first[0], first[3]))]
    if made.kernels:
        second = ["kernel", "format", "shape", "rows", "registers", "spilled", "instructions", "cubin"]
        body = [_kernel_row(x) for x in made.kernels]
        lines += ["", table(second, body, left=("kernel", "format", "cubin")), "", f"cubins: {made.folder}"]
    reasons = dict.fromkeys(x.reason for x in made.layers if all(run[2] == "dense" for run in x.runs))
    lines += ["", *(f"dense: {reason}" for reason in reasons)] if reasons else []
    lines += ["", *made.failed] if made.failed else []
    notes = ["expected from counted instructions and data sheets, nothing was run; on the GPU, tune measures"]
    return "\n".join([*lines, "", *notes])


def _kernel_row(x: CompiledKernel) -> list[str]:
    numbers = [str(x.rows), str(x.registers), str(x.spilled), f"{x.per_unit:.2f} a {x.unit}"]
    return [x.kernel, x.format, f"{x.shape[0]}x{x.shape[1]}", *numbers, x.cubin]


def _run(lo: int, hi: int | None, format: str, loop: str) -> str:
    rows = f"{lo}+" if hi is None else str(lo) if lo == hi else f"{lo}-{hi}"
    return f"{rows}: {format}{f' {loop}' if loop else ''}"
