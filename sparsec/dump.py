"""What a stage saw, for people: ``SPARSEC_DUMP=dir`` writes files, ``SPARSEC_REPRO=dir`` a script for a failure."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sparsec.pipeline import Compilation

_numbers = itertools.count()


def stage(number: int, c: Compilation) -> None:
    """Write ``<dir>/graph<g>/<n>_<stage>.py`` (the graph as Python, its history on the first line) and ``.json``."""
    folder = os.environ.get("SPARSEC_DUMP", "")
    if not folder:
        return
    if not hasattr(c, "dump_number"):
        c.dump_number = next(_numbers)  # type: ignore[attr-defined]
    base = Path(folder) / f"graph{c.dump_number}"  # type: ignore[attr-defined]
    base.mkdir(parents=True, exist_ok=True)
    last = c.record.stages[-1]
    history = ", ".join(f"{s.name} {s.ms:.0f} ms ({s.changed})" for s in c.record.stages)
    (base / f"{number}_{last.name}.py").write_text(f"# {history}\n{graph_text(c.gm)}\n")
    (base / f"{number}_{last.name}.json").write_text(json.dumps(asdict(c.record), indent=1))


def graph_text(gm: torch.fx.GraphModule) -> str:
    return str(gm.print_readable(print_output=False))


def reproducer(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: str, error: BaseException) -> None:
    """Write a script that compiles the graph which failed, on random tensors of the same shapes."""
    folder = os.environ.get("SPARSEC_REPRO", "")
    if not folder:
        return
    path = Path(folder) / f"repro_{os.getpid()}_{next(_numbers)}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = "\n".join(f"    {_input_text(value)}," for value in example_inputs)
    path.write_text(
        f"# {type(error).__name__}: {error}\n"
        "import torch\nfrom torch import device\nimport sparsec.backend\n\n"
        f"{graph_text(gm).replace('class <lambda>', 'class Graph').replace('class GraphModule', 'class Graph')}\n\n"
        f"inputs = [\n{inputs}\n]\n"
        f"with torch.no_grad():\n    print(torch.compile(Graph(), backend='sparsec', options={options})(*inputs))\n"
    )


def _input_text(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(int(value)) if isinstance(value, (int, torch.SymInt)) else repr(value)
    shape = tuple(int(s) for s in value.shape)
    made = f"torch.randn({shape}, dtype=torch.float32).to({value.dtype})"
    zeros = float((value == 0).sum()) / max(value.numel(), 1) if type(value) is torch.nn.Parameter else 0.0
    if not zeros:
        return made
    return f"torch.nn.Parameter({made} * (torch.rand({shape}) > {zeros:.3f}), requires_grad=False)"
