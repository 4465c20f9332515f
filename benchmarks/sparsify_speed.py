"""``python -m benchmarks.sparsify_speed``: how long pruning takes and what memory, against plain loops. See ``--help``.

Three tables: Wanda and SparseGPT through ``sparsec.sparsify`` against the loops of ``benchmarks.plain_loops`` on the
same weights and tokens; the OBS solver against one that goes column by column; peak memory, each engine in a process
of its own, beside the arithmetic of what must be held.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsec.timing import Ratio, Samples, speedup

if TYPE_CHECKING:
    import torch
    from torch import nn

SIZES: dict[str, Any] = {"hidden_size": 640, "intermediate_size": 1792, "num_attention_heads": 10}
VOCABULARY = 8192  # 61 M parameters with these sizes
SHAPES = ((2048, 2048), (4096, 1024))
METHODS = ("wanda", "sparsegpt")
WITHIN, SOLVER = 1.2, 1.5  # the targets: time over the plain loop's, times as fast as column by column
MB = 2**20
ENOUGH = 6  # rounds from which on lowest to highest is a 95 % interval of the median: 1 - 2 / 2^6 = 97 %
_WORKER = "--worker"


@dataclass(frozen=True)
class Setup:
    """One model with its calibration tokens. ``model``: a checkpoint folder; empty: a random Llama of 61 M."""

    model: str = ""
    samples: int = 16
    seqlen: int = 256
    sparsity: float = 0.5
    threads: int = 2
    layers: int = 10  # of the random model

    def load(self) -> nn.Module:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        if self.model:
            loaded: nn.Module = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            return loaded.eval()
        config = LlamaConfig(
            **SIZES,
            num_hidden_layers=self.layers,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        made: nn.Module = LlamaForCausalLM(config)
        return made.eval()

    def tokens(self, model: nn.Module) -> list[torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(1)
        size = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        return [torch.randint(0, size, (1, self.seqlen), generator=generator) for _ in range(self.samples)]


def blocks_of(model: nn.Module) -> tuple[str, Any]:
    """The name of the model's list of blocks, and the list."""
    from sparsec.blockwise import find_blocks
    from sparsec.prunable import survey

    found = find_blocks(model, list(survey(model).layers))
    name = found.blocks[0][0].rpartition(".")[0]
    return name, model.get_submodule(name)


def recipe(method: str, sparsity: float) -> dict[str, Any]:
    """The plain loop's settings: blocks of 128 columns."""
    from benchmarks.plain_loops import WIDTH

    return {"method": method, "sparsity": sparsity, **({"blocksize": WIDTH} if method == "sparsegpt" else {})}


def ours(method: str, model: nn.Module, tokens: list[torch.Tensor], sparsity: float) -> None:
    from sparsec import sparsify

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration tokens")  # few, so that what is fixed weighs more
        sparsify(model, recipe(method, sparsity), tokens, progress=False)


def plain(method: str, model: nn.Module, tokens: list[torch.Tensor], sparsity: float) -> None:
    from benchmarks import plain_loops

    getattr(plain_loops, method)(model, blocks_of(model)[1], tokens, sparsity)


ENGINES = {"sparsec": ours, "plain": plain}


def rounds(
    functions: Mapping[str, Callable[[], object]], count: int, before: Callable[[], object] = lambda: None
) -> dict[str, Samples]:
    """Seconds of each function, once a round in turning order; ``before`` each call is not timed. One more warms up."""
    names = list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(count + 1):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            before()
            started = time.perf_counter()
            functions[name]()
            if i:
                taken[name].append(time.perf_counter() - started)
    return {name: Samples(tuple(values)) for name, values in taken.items()}


def measure_loops(setup: Setup, count: int) -> list[dict[str, Any]]:
    """sparsec and the plain loop in turns, from the same weights each time; ``agree``: share of equal masks."""
    model = setup.load()
    tokens, name = setup.tokens(model), blocks_of(model)[0]
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    rows = []
    for method in METHODS:
        masks: dict[str, dict[str, torch.Tensor]] = {}

        def restore() -> None:
            model.load_state_dict(dense)

        def call(engine: str, method: str = method, masks: dict[str, Any] = masks) -> None:
            ENGINES[engine](method, model, tokens, setup.sparsity)
            if engine not in masks:  # in the round that warms up
                masks[engine] = {k: v != 0 for k, v in model.state_dict().items() if k.startswith(f"{name}.")}

        samples = rounds({engine: lambda e=engine: call(e) for engine in ENGINES}, count, restore)  # type: ignore[misc]
        same = sum(int((masks["sparsec"][k] == mask).sum()) for k, mask in masks["plain"].items())
        agree = same / sum(mask.numel() for mask in masks["plain"].values())
        rows.append(_row(method, samples["sparsec"], samples["plain"], WITHIN, agree=agree))
        model.load_state_dict(dense)
    return rows


def _row(name: str, ours: Samples, base: Samples, target: float, **more: Any) -> dict[str, Any]:
    """``ratio``: ours over the base where the target bounds that, else the base over ours; with its interval."""
    ratio: Ratio = speedup(ours, base) if target == WITHIN else speedup(base, ours)
    met = ratio.value <= target if target == WITHIN else ratio.value >= target
    seconds = {"seconds": ours.median, "base_seconds": base.median, "rounds": len(ours.seconds)}
    return {"name": name, **seconds, "ratio": asdict(ratio), "target": target, "met": met, **more}


def measure_solver(count: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[dict[str, Any]]:
    """SparseGPT on one weight [N, K] with its X X^T given, factor included, against column by column."""
    import torch

    from benchmarks.plain_loops import WIDTH, prune_blocked, prune_by_column
    from sparsec.passes.masks.pattern import MaskPattern
    from sparsec.passes.masks.select import Selector
    from sparsec.passes.masks.sparsegpt import SparseGPT

    rows = []
    for n, k in shapes:
        torch.manual_seed(0)
        x = torch.randn(2 * k, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5)
        weight, xxt = torch.randn(n, k) / k**0.5, x.t() @ x
        choose, method = Selector(MaskPattern(), 0.5), SparseGPT(blocksize=WIDTH)
        functions: dict[str, Callable[[], Any]] = {
            "sparsec": lambda w=weight, h=xxt, m=method, c=choose: m.update(w, {"xxt": h}, c),  # type: ignore[misc]
            "column": lambda w=weight, h=xxt: prune_by_column(w, h, 0.5),  # type: ignore[misc]
            "blocked": lambda w=weight, h=xxt: prune_blocked(w, h, 0.5),  # type: ignore[misc]
        }
        agree = (functions["sparsec"]().keep == (functions["column"]() != 0)).float().mean().item()
        taken = rounds(functions, count)
        against = asdict(speedup(taken["blocked"], taken["sparsec"]))
        shape = f"{n}x{k}"
        rows.append(_row(shape, taken["sparsec"], taken["column"], SOLVER, agree=agree, against_blocked=against))
    return rows


# --------------------------------------------------------------------------------------------------------------- memory


def measure_memory(setup: Setup) -> list[dict[str, Any]]:
    """Peak bytes beside the model of each engine, in processes of their own; ``forward`` is the one they start from."""
    base = _peak(setup, "forward", "")
    rows = []
    for method in METHODS:
        said = arithmetic(setup, method)
        for engine in ENGINES:
            peak = _peak(setup, engine, method)
            row = {"name": method, "engine": engine, "peak": peak["peak"], "beside_model": peak["peak"] - base["peak"]}
            rows.append({**row, **({"arithmetic": said} if engine == "sparsec" else {})})
    return [{"name": "model and one forward", "engine": "", "peak": base["peak"], "beside_model": 0}, *rows]


def _peak(setup: Setup, engine: str, method: str) -> dict[str, int]:
    # Without a fixed threshold malloc keeps what was freed, and the peak is of its habits.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.sparsify_speed", _WORKER, json.dumps([asdict(setup), engine, method])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True, timeout=1800)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(said: str) -> None:
    """One engine, once; prints the peak of this process in bytes."""
    import torch

    import sparsec  # noqa: F401  the baseline pays for it as well

    fields, engine, method = json.loads(said)
    setup = Setup(**fields)
    torch.set_num_threads(setup.threads)
    model = setup.load()
    tokens = setup.tokens(model)
    with torch.no_grad():
        blocks_of(model)
        model(input_ids=tokens[0], use_cache=False)
    if engine != "forward":
        ENGINES[engine](method, model, tokens, setup.sparsity)
    scale = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}))


def arithmetic(setup: Setup, method: str) -> dict[str, int]:
    """Bytes that must be held beside the model, part by part; their ``sum`` is what a dry run says."""
    from sparsec.forecast import memory_parts
    from sparsec.sparsify import prepare

    prepared = prepare(setup.load(), recipe(method, setup.sparsity))
    parts = memory_parts(prepared, setup.samples * setup.seqlen)
    return {**parts, "sum": sum(parts.values())}


# --------------------------------------------------------------------------------------------------------------- report


def markdown(report: Mapping[str, Any]) -> str:
    """The three tables."""
    setup = report["setup"]
    tokens = f"{setup['samples']} x {setup['seqlen']} tokens, {setup['threads']} threads"
    lines = [f"{setup['model'] or 'a random Llama'}, {report['parameters'] / 1e6:.0f} M parameters, {tokens}", ""]
    timed = [*report.get("loops", []), *report.get("solver", [])]
    interval = "95 % interval" if all(row["rounds"] >= ENOUGH for row in timed) else "lowest to highest"
    head = f"| sparsify | sparsec / plain loop | {interval} | target | masks that agree |"
    lines += [head, "|---|---|---|---|---|"]
    lines += [_line(row, "at most") for row in report.get("loops", [])]
    lines += ["", f"| solver | times as fast as column by column | {interval} | target | masks that agree |"]
    lines += ["|---|---|---|---|---|", *[_line(row, "at least") for row in report.get("solver", [])]]
    lines += ["", "| peak memory, MB | engine | beside the model | arithmetic |", "|---|---|---|---|"]
    for row in report.get("memory", []):
        said = row.get("arithmetic", {})
        parts = " + ".join(f"{name} {size / MB:.0f}" for name, size in said.items() if name != "sum")
        told = f"{said['sum'] / MB:.0f} = {parts}" if said else ""
        lines.append(f"| {row['name']} | {row['engine']} | {row['beside_model'] / MB:.0f} | {told} |")
    return "\n".join([*lines, ""])


def _line(row: Mapping[str, Any], bound: str) -> str:
    ratio, verdict = row["ratio"], "met" if row["met"] else "missed"
    interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    target = f"{bound} {row['target']}: {verdict}"
    return f"| {row['name']} | {ratio['value']:.2f} | {interval} | {target} | {row['agree']:.4%} |"


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder; empty: a random Llama of 61 M parameters.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 16,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens of each.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the random model.")] = 10,
    count: Annotated[int, typer.Option("--rounds", min=1, help="Rounds; one more warms up.")] = ENOUGH,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = min(2, os.cpu_count() or 1),
    parts: Annotated[str, typer.Option(help="Which of loops, solver and memory, separated by commas.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("bench_report"),
    work: Annotated[str, typer.Option(_WORKER, hidden=True)] = "",
) -> None:
    """Time Wanda and SparseGPT against plain loops, and the solver against one column at a time; measure peak memory.

    Writes sparsify_speed.json and sparsify_speed.md.
    """
    if work:
        worker(work)
        return
    import torch

    torch.set_num_threads(threads)
    setup = Setup(model, samples, seqlen, threads=threads, layers=layers)
    size = sum(p.numel() for p in setup.load().parameters())
    report: dict[str, Any] = {"setup": asdict(setup), "parameters": size, "torch": torch.__version__}
    steps: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "solver": lambda: measure_solver(count),
        "memory": lambda: measure_memory(setup),
        "loops": lambda: measure_loops(setup, count),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name in [name for name in steps if name in (parts or ",".join(steps)).split(",")]:
        print(f"sparsify_speed: {name} ...", file=sys.stderr)
        report[name] = steps[name]()
        (output / "sparsify_speed.json").write_text(json.dumps(report, indent=2) + "\n")
    table = markdown(report)
    (output / "sparsify_speed.md").write_text(table)
    print(table)


if __name__ == "__main__":
    typer.run(main)
