"""Packing never holds more than the dense model and one layer, and leaves what the packs take, by resident sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident sizes are Linux's")

# In a process of its own, after everything that is loaded and compiled once has been.
SCRIPT = """
import copy, gc, json, sys
from pathlib import Path
import torch
from torch import nn
import sparsec
from sparsec.pack import trim
from sparsec.resident import Resident

N, LAYERS, zeros, kind = 2048, 5, float(sys.argv[1]), sys.argv[2]

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def make(n, layers):
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D
        model = nn.Sequential(*(Conv1D(n, n) for _ in range(layers)))
    else:
        model = nn.Sequential(*(nn.Linear(n, n) for _ in range(layers)))
    with torch.no_grad():
        for layer in model:
            for i in range(0, n, 128):
                layer.weight[i : i + 128].masked_fill_(torch.rand(128, n) < zeros, 0)
    return model

def pack(model):
    return sparsec.pack_(model, "reference", options={"min_speedup": 0})

def still(action):
    gc.collect()
    trim()
    return action()

with torch.no_grad():
    pack(make(256, 1))
    model = make(N, LAYERS)
    before = still(Resident)
    report = pack(model)
    peak, after = before.highest(), still(lambda: status("VmRSS"))
    x = torch.randn(2, N)
    y = model(x)
    packed = still(Resident)
    sparsec.unpack_(model)
    print(json.dumps({
        "packed": len(report.packed), "layers": LAYERS, "dense": report.dense_bytes, "bytes": report.bytes,
        "layer": report.rows[0].dense_bytes, "peak": peak - before.before,
        "left": after - before.before + report.dense_bytes,
        "unpack_peak": packed.highest() - packed.before, "same": bool(torch.allclose(model(x), y, atol=1e-4)),
    }))
"""
SLACK = 2 << 20  # what Python and the allocator add by themselves


@pytest.mark.parametrize(("zeros", "kind"), [(0.5, "Linear"), (0.9, "Linear"), (0.8, "Conv1D")])
def test_packing_holds_the_dense_model_and_one_layer_and_leaves_the_packs(zeros: float, kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(zeros), kind], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["packed"] == found["layers"]
    assert found["same"]
    assert found["peak"] <= found["layer"] + SLACK
    assert found["left"] <= 1.05 * found["bytes"] + SLACK
    assert found["bytes"] < 0.6 * found["dense"]
    assert found["unpack_peak"] <= found["dense"] + found["layer"] + SLACK
