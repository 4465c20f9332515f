"""A pruned encoder as one ONNX file, in ONNX Runtime with our library and without: size, load time, latency, error.

python examples/07_onnx.py [MODEL]      MODEL: a local Hugging Face folder; a tiny random BERT by default
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

import sparsec
from sparsec.export_onnx import OnnxReport
from sparsec.models import load_model
from sparsec.timing import interleave

names = [word for word in sys.argv[1:] if not word.startswith("--")]
loaded = load_model(names[0] if names else "tiny:bert", "fp32")
sparsec.sparsify(loaded.model, {"method": "magnitude", "sparsity": 0.8}, progress=False)

folder = Path(tempfile.mkdtemp())
inputs = loaded.inputs(2, 16)
dense = sparsec.export_onnx(loaded.model, (), folder / "dense.onnx", kwargs=inputs, portable=True)
ours = sparsec.export_onnx(loaded.model, (), folder / "sparse.onnx", kwargs=inputs, min_speedup=0)
print(ours)

quiet = onnxruntime.SessionOptions()
quiet.log_severity_level = 3
sparsec.onnx.library_path()  # compiles once


def plain(report: OnnxReport) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(report.path, quiet, providers=["CPUExecutionProvider"])


def run(name: str) -> None:
    sessions[name].run(None, feed)


makers: dict[str, Callable[[], Any]] = {
    "dense file": lambda: plain(dense),
    "sparse file": lambda: plain(ours),
    "sparse file, our library": lambda: sparsec.onnx.session(ours.path),
}
feed = {name: tensor.numpy() for name, tensor in loaded.inputs(1, 16).items()}
sessions: dict[str, Any] = {}
seconds: dict[str, float] = {}
for name, make in makers.items():
    started = time.perf_counter()
    sessions[name] = make()
    seconds[name] = time.perf_counter() - started
calls: dict[str, Callable[[], object]] = {name: partial(run, name) for name in sessions}
taken = interleave(calls, rounds=30)
for name, samples in taken.items():
    print(f"{name:<25} loads in {seconds[name]:.2f} s, runs in {1e3 * samples.median:.2f} ms")
