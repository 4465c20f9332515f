"""``sparsec doctor``: a block to paste into an issue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sparsec.cli.common import emit_json, progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparsec.doctor import Checkup, KernelCheck

EXAMPLE = "sparsec doctor --quick"


def command(
    quick: Annotated[bool, typer.Option("--quick", help="Do not build kernels, only look which are built.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Versions, CPU, compiler, caches, and every kernel that cannot be used here with its reason.

    The first run builds all kernels for this machine (about a minute); later runs take them from the cache. The exit
    code is 0 whatever is found.
    """
    from sparsec.doctor import checkup

    with progress("sparsec doctor") as step:
        found = checkup(build=not quick, step=step)
    if as_json:
        emit_json(found.to_dict())
        return
    for line in lines(found):
        print(line)


def lines(found: Checkup) -> Iterator[str]:
    """The block: facts, then one line per kernel family, then what is wrong."""
    families = {kernel.family: f"{kernel.family} kernels" for kernel in found.kernels}
    width = max(map(len, [*(name for name, _ in found.facts), *families.values()]))
    yield "```"
    for name, value in found.facts:
        yield f"{name:<{width}}  {value}"
    for family, label in families.items():
        yield f"{label:<{width}}  {_family([k for k in found.kernels if k.family == family])}"
    yield "```"
    unusable = {f"{k.family} kernels: {k.reason}" for k in found.kernels if k.reason}
    wrong = [*found.problems, *sorted(unusable)]
    yield "Nothing is wrong." if not wrong else "What is wrong (layers that need it run dense):"
    yield from (f"- {sentence}" for sentence in wrong)


def _family(kernels: list[KernelCheck]) -> str:
    built = [k for k in kernels if k.built]
    text = f"{len(built)} of {len(kernels)} built ({', '.join(dict.fromkeys(k.isa for k in kernels))})"
    reasons = dict.fromkeys(k.reason for k in kernels if k.reason)
    return text + "".join(f"; unusable: {reason}" for reason in reasons)
