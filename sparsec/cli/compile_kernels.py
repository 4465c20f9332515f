"""``sparsec compile-kernels``: the GPU kernels of a model, compiled where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsec.cli.common import emit_json, progress
from sparsec.errors import BadOptionValue

EXAMPLE = "sparsec compile-kernels tiny:llama@80 --target cuda:sm_90 --min-speedup 0 -o cubins"
DTYPES = ("bf16", "fp16", "fp32")


def command(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id, file.py:factory, minilm, tiny:llama.")],
    target: Annotated[str, typer.Option("--target", help="cuda:sm_80, sm_89, sm_90, sm_100 or sm_120.")] = "cuda:sm_90",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights on the GPU: bf16, fp16 or fp32.")] = "bf16",
    formats: Annotated[str, typer.Option("--formats", help="Formats that may be chosen, as index,nm:2:4.")] = "",
    min_speedup: Annotated[
        float, typer.Option("--min-speedup", help="Expected gain below which a layer stays dense; 0: none does.")
    ] = 1.05,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the cubins.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Decide, pack and compile every kernel of a model for a GPU architecture, without a GPU.

    Prints what each layer would run for which rows of x, and for each kernel its registers and instructions. Decisions
    rest on the architecture's data sheet and on counted instructions; on the GPU, options={"tune": "quick"} measures.
    """
    import torch

    from sparsec import targets
    from sparsec.cache import cache_dir
    from sparsec.gpu_compile import compile_kernels, table_of
    from sparsec.models import load_model
    from sparsec.options import Options
    from sparsec.targets.cuda import GpuTarget

    if dtype not in DTYPES:
        raise BadOptionValue(key="--dtype", value=dtype, expected=f"it must be one of {', '.join(DTYPES)}")
    machine = targets.resolve(target)
    if not isinstance(machine, GpuTarget):
        raise BadOptionValue(key="--target", value=target, expected="it must be a GPU, such as cuda:sm_90")
    said = {"target": target, "min_speedup": min_speedup}
    options = Options.parse({**said, "formats": formats.split(",")} if formats else said)
    folder = output or cache_dir("") / "gpu" / machine.isa
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    with progress("sparsec compile-kernels") as step:
        loaded = load_model(model)
        made = compile_kernels(loaded.model, machine, options.policy, folder, kind, model, step)
    if as_json:
        emit_json(made.to_dict())
        return
    print(table_of(made))
