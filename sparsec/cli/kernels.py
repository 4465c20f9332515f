"""``sparsec kernels``: what kernels exist, which are built, and where the generated C++ is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sparsec.cli.common import emit_json, progress

EXAMPLE = """\
sparsec kernels --isa all
sparsec kernels --sass"""


def command(
    isa: Annotated[str, typer.Option(help="avx512, avx2, portable, or all; else the widest of this machine.")] = "",
    build: Annotated[bool, typer.Option("--build", help="Build what is not built yet (about 2 s each).")] = False,
    sass: Annotated[
        bool, typer.Option("--sass", help="The GPU kernels instead, and what their machine code costs.")
    ] = False,
    target: Annotated[
        str, typer.Option("--target", help="With --sass: count again for cuda:sm_80, ...; else as stored.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Kernel families x loops x dtypes x instruction sets: built or not, and the source to read.

    loop: dot (rows of x against rows of W, small batches) or outer (x transposed, larger batches).

    --sass shows GPU kernels by the instructions of their main loop, which need no GPU to be counted: lane instructions
    for each weight of the dense matrix, or for each one that is kept, beside what an H200 has time for while it reads
    that weight from memory.
    """
    if sass or target:
        _sass(target, as_json)
        return
    from sparsec.doctor import kernel_checks
    from sparsec.errors import BadOptionValue
    from sparsec.targets.detect import ISA_NEEDS

    if isa and isa != "all" and isa not in ISA_NEEDS:
        raise BadOptionValue(key="--isa", value=isa, expected=f"it must be one of {', '.join([*ISA_NEEDS, 'all'])}")
    isas = list(ISA_NEEDS) if isa == "all" else [isa] if isa else []
    with progress("sparsec kernels", quiet=not build) as step:
        found = list(kernel_checks(isas, build=build, step=step))
    if as_json:
        emit_json([asdict(kernel) for kernel in found])
        return
    from sparsec.bench_output import table

    header = ["family", "loop", "dtype", "isa", "built", "source, or why not"]
    rows = [
        [k.family, k.loop, k.dtype, k.isa, "yes" if k.built else "no", k.reason or k.source or "built when first used"]
        for k in found
    ]
    print(table(header, rows, left=header))


def _sass(target: str, as_json: bool) -> None:
    from sparsec import targets
    from sparsec.codegen.triton import census
    from sparsec.errors import BadOptionValue
    from sparsec.targets.cuda import GpuTarget

    if target:
        machine = targets.resolve(target)
        if not isinstance(machine, GpuTarget):
            raise BadOptionValue(key="--target", value=target, expected="it must be a GPU, such as cuda:sm_90")
        from sparsec.codegen.triton import need_triton

        made, isa = need_triton(), machine.isa
        with progress("sparsec kernels") as step:
            counts = []
            for number, one in enumerate(census.count(machine.capability)):
                step(number, 0, one.format)
                counts.append(one)
    else:
        counts, made, isa = list(census.stored()), census.stored_version(), f"sm_{census.COUNTED}"
    if as_json:
        emit_json({"triton": made, "target": isa, "counts": [asdict(one) for one in counts]})
        return
    from sparsec.bench_output import table

    header = ["format", "loop", "rows", "instructions", "budget", "registers", "spills", "16-byte loads", "conversions"]
    rows = [
        [c.format, c.loop, str(c.m), f"{c.per_unit:.2f} a {c.unit}", f"{c.budget:.1f}", str(c.registers), str(c.local),
         str(c.wide), str(c.conversions)]
        for c in counts
    ]  # fmt: skip
    print(table(header, rows, left=header[:2]))
    over = [c for c in counts if c.per_unit > c.budget]
    print(f"\n{isa}, Triton {made}; lane instructions of the longest loop. {len(over)} of {len(counts)} over budget:")
    for reason in dict.fromkeys(c.reason for c in over):
        names = dict.fromkeys(f"{c.format} {c.loop}" for c in over if c.reason == reason)
        print(f"  {', '.join(names)}: {reason or 'no reason is known'}")
