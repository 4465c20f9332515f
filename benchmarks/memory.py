"""How much memory packing takes and leaves: a table of ``sparsec.pack_``, ``save`` and ``load``, each case in processes
of its own, by the resident sizes that Linux keeps.

``python -m benchmarks.memory`` prints it as markdown; ``--case NAME`` runs one case here and prints its JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CASES = ("stack@50", "stack@80", "stack@90", "minilm@80")
SIDE, LAYERS = 4096, 6
OPTIONS = {"min_speedup": 0}
HEAD = ("model", "dense MB", "packed MB", "peak over dense", "in layers", "after / packed", "loaded MB", "private MB")


def stack(zeros: float, device: str) -> Any:
    """LAYERS linear layers of SIDE x SIDE; zeros are set in bands, so that making the model takes no more than it."""
    import torch

    with torch.device(device), torch.no_grad():
        layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
        for weight in (layer.weight for layer in layers if device == "cpu"):
            for first in range(0, SIDE, 256):
                weight[first : first + 256].masked_fill_(torch.rand(256, SIDE) < zeros, 0)
    return torch.nn.Sequential(*layers).eval()


def model_of(case: str, device: str = "cpu") -> Any:
    """The pruned model of a case; on ``meta`` only its shapes."""
    import torch

    name, _, percent = case.partition("@")
    zeros = int(percent) / 100
    if name == "stack":
        return stack(zeros, device)
    from sparsec.models import load_model

    # deepcopy: from_pretrained maps the file, and pages of it that were written to go only with its last tensor
    model = copy.deepcopy(load_model("minilm").model)
    if device == "meta":
        return model.to("meta")
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            layer.weight.masked_fill_(torch.rand(layer.weight.shape) < zeros, 0)
    return model


def resident(key: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def packed(case: str, file: Path) -> dict[str, Any]:
    """Pack a case in this process, once everything that is loaded and compiled only once has been."""
    import torch

    from sparsec import pack_, save
    from sparsec.pack import trim
    from sparsec.resident import Resident

    torch.manual_seed(0)
    small = [torch.nn.Linear(512, 512) for _ in range(3)]
    with torch.no_grad():
        for weight, zeros in zip((layer.weight for layer in small), (0.5, 0.8, 0.9), strict=True):
            weight.masked_fill_(torch.rand(512, 512) < zeros, 0)
    pack_(torch.nn.Sequential(*small), options=OPTIONS)
    model = model_of(case)
    gc.collect()
    trim()
    before = Resident()
    report = pack_(model, options=OPTIONS)
    peak, after = before.highest(), resident()
    save(model, file)
    largest = max(row.dense_bytes for row in report.rows)
    return {
        "dense": report.dense_bytes,
        "packed": report.bytes,
        "largest": largest,
        "peak": peak - before.before,
        "after": after - (before.before - report.dense_bytes),  # what is left of the linear weights
    }


def loaded(case: str, file: Path) -> dict[str, Any]:
    """Load the file of a case in this process and call the model once."""
    import torch

    from sparsec import load
    from sparsec.runtime import library

    library.load()  # what any first use imports is not the file's
    model = model_of(case, "meta")
    before, private = resident(), resident("RssAnon")
    load(file, model)
    with torch.no_grad():
        if case.startswith("stack"):
            model(torch.randn(1, SIDE))
    return {"loaded": resident() - before, "private": resident("RssAnon") - private}


def row(case: str, run: Callable[[str, str, Path], dict[str, Any]]) -> list[str]:
    """One case as cells of the table."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        p, q = run("packed", case, file), run("loaded", case, file)
    mega = [f"{p[key] / 1e6:.1f}" for key in ("dense", "packed", "peak")]
    layers, left = f"{p['peak'] / p['largest']:.2f}", f"{p['after'] / p['packed']:.3f}"
    return [case, *mega, layers, left, f"{q['loaded'] / 1e6:.1f}", f"{q['private'] / 1e6:.1f}"]


def in_own_process(half: str, case: str, file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--half", half, "--case", case, "--file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="", help=f"one of {', '.join(CASES)}; default: all")
    parser.add_argument("--half", default="", choices=("", "packed", "loaded"), help="run this half here, print JSON")
    parser.add_argument("--file", type=Path, default=Path("model.safetensors"))
    said = parser.parse_args(argv)
    if said.half:
        print(json.dumps({"packed": packed, "loaded": loaded}[said.half](said.case, said.file)))
        return
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for case in (said.case,) if said.case else CASES:
        print(f"| {' | '.join(row(case, in_own_process))} |", flush=True)


if __name__ == "__main__":
    main()
