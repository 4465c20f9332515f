"""What sparsec writes for people who look inside: stage dumps, reproducers; and calls from many threads."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsec import pipeline
from sparsec.errors import SparsecWarning
from sparsec.pipeline import STAGES

FORCED: dict[str, Any] = {"min_speedup": 0, "formats": ["bitmap"]}


pytestmark = pytest.mark.usefixtures("fresh_graphs")


def pruned(n: int = 256) -> nn.Module:
    model = nn.Sequential(nn.Linear(256, n), nn.ReLU()).eval()
    model[0].weight.mul_(torch.rand_like(model[0].weight) > 0.7)
    return model


def test_every_stage_dumps_its_graph_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_DUMP", str(tmp_path))
    torch.compile(pruned(), backend="sparsec", options=FORCED)(torch.randn(2, 256))
    folder = next(tmp_path.iterdir())
    for number, stage in enumerate(STAGES):
        text = (folder / f"{number}_{stage.__name__}.py").read_text()
        assert text.startswith("# capture")
        record = json.loads((folder / f"{number}_{stage.__name__}.json").read_text())
        assert [s["name"] for s in record["stages"]] == [s.__name__ for s in STAGES[: number + 1]]
    assert "sparsec.linear" in (folder / "4_rewrite.py").read_text()


def test_a_failure_leaves_a_script_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> int:
        raise RuntimeError("planted")

    monkeypatch.setenv("SPARSEC_REPRO", str(tmp_path))
    monkeypatch.setattr(pipeline, "STAGES", (*STAGES[:3], broken))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsecWarning)
        torch.compile(pruned(), backend="sparsec", options=FORCED)(torch.randn(2, 256))
    script = next(tmp_path.glob("repro_*.py"))
    assert "planted" in script.read_text()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "tensor(" in done.stdout


def test_one_compiled_model_serves_many_threads_while_its_weights_change() -> None:
    model = pruned()
    run = torch.compile(model, backend="sparsec", options=FORCED)
    x = torch.randn(4, 256)
    model[0].bias.zero_()
    run(x)
    want = {scale: torch.relu(x @ (model[0].weight * scale).t()) for scale in (1.0, 2.0)}

    def call(_: int) -> bool:
        with torch.no_grad():
            got = run(x)
        return any(torch.allclose(got, w, rtol=1e-3, atol=1e-3) for w in want.values())

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(call, i) for i in range(60)]
        original = model[0].weight.clone()
        for i in range(6):
            model[0].weight.data = original * (1.0 if i % 2 else 2.0)
        assert all(r.result() for r in results)
