"""``sparsec targets``: the names that ``target`` takes, which of them this machine runs, and what it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsec.cli.common import console, emit_json

EXAMPLE = """\
sparsec targets
sparsec targets --rates"""


def command(
    rates: Annotated[
        bool, typer.Option("--rates", help="Also what was measured here; measures it if need be.")
    ] = False,
    threads: Annotated[int, typer.Option("--threads", "-t", help="For --rates; 0: as torch would use.", min=0)] = 0,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Where measurements are kept.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """The machines kernels can be made for, and this one.

    A target is taken as options={"target": NAME}; SPARSEC_ISA narrows what auto means. --rates shows what decisions
    rest on: memory bandwidth, seconds of a dense linear per million weights, and of each sparse kernel.
    """
    from sparsec import targets

    found = {"this": asdict(targets.resolve("auto")), "targets": [_about(name) for name in targets.names()]}
    if rates:
        found["rates"] = _rates(threads, cache_dir)
    if as_json:
        emit_json(found)
        return
    _show(found)


def _about(name: str) -> dict[str, Any]:
    from sparsec import targets
    from sparsec.errors import SparsecError

    line = targets.TARGETS[targets.DEFAULT if name == "auto" else name.partition(":")[0]][2]
    try:
        target = targets.resolve(name)
    except SparsecError as error:
        why = str(error).partition(", but ")[2].rpartition(" [")[0]
        return {"name": name, "isa": name.partition(":")[2], "runs_here": False, "line": why.strip(". ")}
    return {"name": name, "isa": target.isa, "runs_here": getattr(target, "here", True), "line": line}


def _rates(threads: int, cache: Path | None) -> dict[str, Any]:
    import torch

    from sparsec import targets
    from sparsec.cache import cache_dir
    from sparsec.measure import rates

    count = threads or torch.get_num_threads()
    return asdict(rates(targets.resolve("auto"), count, cache_dir(str(cache) if cache else "")))


def _show(found: dict[str, Any]) -> None:
    this, out = found["this"], console()
    caches = f"L2 {this['l2_bytes'] >> 10} KiB, L3 {this['l3_bytes'] >> 20} MiB"
    bf16 = ", bf16 dot products" if this["bf16_dot"] else ""
    lines = [f"this machine: {this['model']}, {this['cores']} cores, {this['isa']}{bf16}, {caches}", ""]
    lines += [
        f"{t['name']:14} {t['isa']:9} {'yes' if t['runs_here'] else 'no':4} {t['line']}" for t in found["targets"]
    ]
    lines[2:2] = [f"{'target':14} {'isa':9} {'runs':4} "]
    if "rates" in found:
        lines += ["", *_rate_lines(found["rates"])]
    out.print("\n".join(lines), markup=False, soft_wrap=True)


def _rate_lines(rates: dict[str, Any]) -> list[str]:
    lines = [
        f"{rates['threads']} threads: {rates['bandwidth'] / 1e9:.1f} GB/s; a call costs "
        f"{rates['overhead'] * 1e6:.1f} us (dense {rates['dense_overhead'] * 1e6:.1f} us)",
        "dense, us per million weights at M rows of x:",
    ]
    for dense in rates["dense"]:
        lines.append(f"  {dense['dtype']}: " + "  ".join(f"{m}: {s * 1e12:.0f}" for m, s in dense["points"]))
    lines.append("our kernels, GB/s, then at M rows of x us per million columns + positions + kept values:")
    for k in rates["kernels"]:
        costs = "  ".join(f"{m}: " + "+".join(f"{c * 1e12:.0f}" for c in costs) for m, *costs in k["points"])
        name = f"{k['pattern']}/{k['loop']}"
        lines.append(f"  {name:18} {k['dtype']}  {k['bandwidth'] / 1e9:6.1f}  {costs}")
    return lines
