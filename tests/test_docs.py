"""What is written is executed: examples, README blocks, and every path, command and option that the texts name."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import bench_table, explain_text, fill

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("README.md", "CONTRIBUTING.md")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(name: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_runs(path: Path, tmp_path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") < 60
    assert re.match(r"\d\d_\w+\.py", path.name)
    done = run(sys.executable, str(path), "--small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
    assert "SparsecWarning" not in done.stderr


def test_the_first_example_prints_a_speedup_and_the_difference() -> None:
    done = run(sys.executable, str(EXAMPLES[0]), "--small")
    assert re.search(r"speedup +\d+\.\d\dx", done.stdout)
    difference = re.search(r"difference to Inductor: (\S+)", done.stdout)
    assert difference is not None
    assert float(difference.group(1)) < 2e-2


def test_generate_gives_the_tokens_of_eager() -> None:
    done = run(sys.executable, str(ROOT / "examples" / "04_generate.py"), "--small")
    assert "equal to eager" in done.stdout, done.stdout + done.stderr


def test_python_blocks_of_the_readme_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from torch import nn

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval(),
        "x": torch.randn(4, 128),
    }
    found = blocks("README.md", "python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), names)


def test_code_in_contributing_is_the_code_of_the_repository() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```\w+ file=(\S+)\n(.*?)^```", text, re.S | re.M)
    assert {path.split("/")[0] for path, _ in quoted} >= {"passes", "codegen", "targets"}
    for path, block in quoted:
        assert block in (ROOT / path).read_text(encoding="utf-8"), f"{path} no longer holds:\n{block}"


def shell_lines(name: str) -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks(name, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_make_targets_named_in_the_texts_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for name in TEXTS:
        named = set(re.findall(r"`make ([\w-]+)", (ROOT / name).read_text(encoding="utf-8")))
        named |= {line.split()[1] for line in shell_lines(name) if line.startswith("make ")}
        assert named
        assert named <= targets, f"{name}: {named - targets}"


def test_commands_and_flags_named_in_the_readme_exist() -> None:
    lines = [line for line in shell_lines("README.md") if line.startswith("sparsec ")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        shown = run(sys.executable, "-m", "sparsec", words[1], "--help")
        assert shown.returncode == 0, f"{line}: {shown.stderr}"
        for flag in (word.split("=")[0] for word in words[2:] if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown.stdout), f"{line}: no {flag}"


@pytest.mark.parametrize("name", TEXTS)
def test_files_named_in_the_texts_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:sparsec|passes|codegen|targets|tests|benchmarks|examples)/[\w./]+)`", text)
    named += [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert named
    missing = [path for path in named if not path.endswith("...") and not (ROOT / path).exists()]
    assert not missing


def test_options_named_in_the_readme_are_accepted() -> None:
    from dataclasses import fields

    from sparsec.options import Policy

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text.partition("## Options")[2].partition("\n## ")[0], re.M))
    assert rows == {f.name for f in fields(Policy)} | {"inductor"}


def test_error_classes_of_the_readme_are_real() -> None:
    from sparsec import errors

    for name in re.findall(r"sparsec\.errors\.(\w+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert hasattr(errors, name)


def report_row(name: str, **case: Any) -> dict[str, Any]:
    times = {"us": {"median": 2000.0}, "path": "bitmap+bf16 dot"}
    ratio = {"value": 2.0, "low": 1.9, "high": 2.1}
    return {
        "name": name,
        "case": {
            "threads": 2,
            "dtype": "bf16",
            "sparsity": 0.8,
            "kind": "linear",
            "n": 4096,
            "k": 4096,
            "m": 8,
            **case,
        },
        "best_dense": "freezing",
        "ratio": ratio,
        "ratio_to_inductor": {**ratio, "value": 3.0},
        "engines": {"freezing": times, "inductor": times, "sparsec": {**times, "us": {"median": 1000.0}}},
    }


def test_the_table_shows_the_best_dense_peer_and_inductor() -> None:
    report = {
        "environment": {"cpu": "X", "isa": "AVX512", "torch": "2.13", "onnxruntime": "1"},
        "rows": [
            report_row("4096x4096 bf16 M=8 cold 80% t2"),
            report_row("minilm 1x16 fp32 80% t2", kind="encoder", batch=1, tokens=16, dtype="fp32"),
            report_row("4096x4096 bf16 M=8 hot 80% t2"),
        ],
    }
    lines = bench_table(report).splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert len(rows) == 2
    assert "2.00 ms (Inductor, frozen) | 1.00 ms | **2.00x** (1.90 - 2.10) | 3.00x |" in rows[0]
    assert "MiniLM, batch 1 x 16 tokens" in rows[1]


def test_filling_changes_only_what_is_between_the_markers() -> None:
    text = "a\n<!-- bench -->\nold\n<!-- /bench -->\nb\n"
    once = fill(text, "bench", "| new |")
    assert once == "a\n<!-- bench -->\n| new |\n<!-- /bench -->\nb\n"
    assert fill(once, "bench", "| new |") == once
    with pytest.raises(ValueError, match="explain"):
        fill(text, "explain", "")


def test_the_readme_has_the_parts_that_are_filled() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("bench", "explain"):
        fill(text, name, "")
    assert "```text" in explain_text({"encoder": {"explain": {"text": "table"}}})
