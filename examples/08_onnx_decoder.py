"""A pruned causal model as ONNX with its KV cache: tokens one by one in ONNX Runtime, with our library and without.

python examples/08_onnx_decoder.py [MODEL]      MODEL: a local Hugging Face folder; a tiny random Llama by default
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import sparsec
from sparsec.models import load_model
from sparsec.onnx_decoder import export_decoder, generate

names = [word for word in sys.argv[1:] if not word.startswith("--")]
loaded = load_model(names[0] if names else "tiny:llama", "fp32")
sparsec.sparsify(loaded.model, {"method": "magnitude", "sparsity": 0.8, "ignore": ["lm_head"]}, progress=False)

path = Path(tempfile.mkdtemp()) / "decoder.onnx"
report = export_decoder(loaded.model, path, min_speedup=0)
print(report)

quiet = onnxruntime.SessionOptions()
quiet.log_severity_level = 3
sessions = {
    "our library": sparsec.onnx.session(path),
    "plain": onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"]),
}
ids = loaded.inputs(1, 16)["input_ids"]
model: Any = loaded.model
wanted = model.generate(ids, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))
for name, session in sessions.items():
    started = time.perf_counter()
    tokens = generate(session, ids, 16)
    seconds = time.perf_counter() - started
    same = int((tokens == wanted).sum()) - ids.numel()
    print(f"{name:<12} {16 / seconds:7.1f} tokens/s, {same} of 16 as PyTorch's")
