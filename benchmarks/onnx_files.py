"""Exported ONNX files against dense ones: size, load time and time of a call, each engine in a process of its own.

``python -m benchmarks.onnx_files`` prints a table as markdown for a stack of 12 layers and MiniLM at 80 % zeros. In
each round every engine loads its file anew and runs it; ratios are of the best rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

CASES = ("stack", "minilm")
SIDE, LAYERS, ZEROS = 4096, 12, 0.8
TOKENS = 16
INT8 = {"method": "rtn", "bits": 8, "activations": "int8"}
# name: (file, how it is run)
ENGINES = {
    "dense": ("dense.onnx", "plain"),
    "dense int8": ("dense_int8.onnx", "plain"),
    "sparse": ("sparse.onnx", "plain"),
    "sparse, library": ("sparse.onnx", "library"),
    "sparse, torch.compile": ("sparse", "torch"),
    "sparse int8": ("sparse_int8.onnx", "plain"),
    "sparse int8, library": ("sparse_int8.onnx", "library"),
    "sparse int8, torch.compile": ("sparse_int8", "torch"),
}
HEAD = ("engine", "MB", "of dense", "load ms", "of dense", "call ms", "dense / it", "dense int8 / it", "error")


def model_of(case: str, kind: str) -> Any:
    """``dense``, ``sparse`` or ``sparse_int8``; the weights are the same but for zeros and rounding."""
    import torch

    import sparsec
    from sparsec.models import load_model

    torch.manual_seed(0)
    if case == "stack":
        with torch.no_grad():
            layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
            for layer in layers:
                layer.weight.copy_(torch.randn(SIDE, SIDE) / (SIDE * (1 - ZEROS)) ** 0.5)
        model: Any = torch.nn.Sequential(*layers).eval()
    else:
        model = load_model("minilm", "fp32").model
    recipe = [{"method": "magnitude", "sparsity": ZEROS}] if kind != "dense" else []
    recipe += [INT8] if kind == "sparse_int8" else []
    if recipe:
        sparsec.sparsify(model, recipe, progress=False)
    return model


def inputs_of(case: str, batch: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(1)
    if case == "stack":
        return {"input": torch.randn(batch, SIDE)}
    ids = torch.randint(1000, 20000, (batch, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_files(case: str, folder: Path) -> None:
    """The files of all engines, and what PyTorch gives for ``inputs_of(case, 1)`` beside them."""
    import numpy as np
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    import sparsec

    for kind in ("dense", "sparse", "sparse_int8"):
        model, path = model_of(case, kind), folder / f"{kind}.onnx"
        rows, portable = 1 if case == "stack" else 0, kind == "dense"
        sparsec.export_onnx(
            model, (), path, kwargs=inputs_of(case, 2), portable=portable, external=True, rows=rows, verify=False
        )
        with torch.no_grad():
            np.save(folder / f"{kind}.npy", first_of(model(**inputs_of(case, 1))).numpy())
    quantize_dynamic(folder / "dense.onnx", folder / "dense_int8.onnx", weight_type=QuantType.QInt8)


def first_of(outputs: Any) -> Any:
    return outputs if hasattr(outputs, "shape") else next(iter(outputs.values()))


def run(case: str, name: str, folder: Path, threads: int) -> dict[str, float]:
    """One engine in this process: seconds to load, of a call, and the error against PyTorch on the same weights."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    file, how = ENGINES[name]
    inputs = inputs_of(case, 1)
    if how == "torch":
        model, began = model_of(case, file), time.perf_counter()
        compiled: Any = torch.compile(model, backend="sparsec")
        call: Callable[[], Any] = lambda: first_of(compiled(**inputs)).numpy()  # noqa: E731
    else:
        import onnxruntime

        import sparsec

        feed = {key: tensor.numpy() for key, tensor in inputs.items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        path, began = str(folder / file), time.perf_counter()
        if how == "library":
            session = sparsec.onnx.session(path, options)
        else:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        call = lambda: session.run(None, feed)[0]  # noqa: E731
    loaded = time.perf_counter() - began
    with torch.no_grad():
        y = call()
        began = time.perf_counter()
        times: list[float] = []
        while len(times) < 20 or time.perf_counter() - began < 1.0:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    want = np.load(folder / f"{Path(file).stem.replace('dense_int8', 'dense')}.npy")
    return {"load": loaded, "call": median(times), "error": float(np.abs(y - want).max() / np.abs(want).max())}


def table(case: str, folder: Path, rounds: int, threads: int) -> str:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for _ in range(rounds):
        for name, results in found.items():
            command = [sys.executable, "-m", "benchmarks.onnx_files", "--engine", name, "--case", case]
            command += ["--folder", str(folder), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    best = {name: {key: min(r[key] for r in results) for key in results[0]} for name, results in found.items()}
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    sizes = {name: size_of(folder / file) for name, (file, how) in ENGINES.items() if how != "torch"}
    for name, r in best.items():
        mb = [f"{sizes[name] / 1e6:.1f}", f"{sizes[name] / sizes['dense']:.2f}"] if name in sizes else ["", ""]
        load = [f"{1e3 * r['load']:.0f}", f"{r['load'] / best['dense']['load']:.2f}"] if name in sizes else ["", ""]
        ratios = [f"{best[peer]['call'] / r['call']:.2f}" for peer in ("dense", "dense int8")]
        row = [name, *mb, *load, f"{1e3 * r['call']:.2f}", *ratios, f"{r['error']:.0e}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in (path, path.with_name(f"{path.name}.data")) if p.exists())


def main(arguments: Sequence[str] | None = None) -> None:
    said = argparse.ArgumentParser(prog="python -m benchmarks.onnx_files", description=__doc__)
    said.add_argument("--case", choices=CASES, help="one of the cases; all by default")
    said.add_argument("--rounds", type=int, default=3, help="processes of each engine (3)")
    said.add_argument("--threads", type=int, default=2, help="of each engine (2)")
    said.add_argument("--engine", choices=list(ENGINES), help=argparse.SUPPRESS)
    said.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    words = said.parse_args(arguments)
    if words.engine:
        print(json.dumps(run(words.case, words.engine, words.folder, words.threads)))
        return
    import sparsec

    sparsec.onnx.library_path()  # compiled once, before anything is timed
    for case in [words.case] if words.case else CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_files(case, Path(folder))
            print(f"\n## {case}, {ZEROS:.0%} zeros, batch 1, {words.threads} threads\n", flush=True)
            print(table(case, Path(folder), words.rounds, words.threads), flush=True)


if __name__ == "__main__":
    main()
