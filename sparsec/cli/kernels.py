"""``sparsec kernels``: what kernels exist, which are built, and where the generated C++ is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sparsec.cli.common import emit_json, progress

EXAMPLE = "sparsec kernels --isa all"


def command(
    isa: Annotated[str, typer.Option(help="avx512, avx2, portable, or all; else the widest of this machine.")] = "",
    build: Annotated[bool, typer.Option("--build", help="Build what is not built yet (about 2 s each).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Kernel families x loops x dtypes x instruction sets: built or not, and the source to read.

    loop: dot (rows of x against rows of W, small batches) or outer (x transposed, larger batches).
    """
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
