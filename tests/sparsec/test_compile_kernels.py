"""``sparsec compile-kernels`` on a machine without a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparsec import cli

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles kernels")


def test_every_layer_is_told_and_every_kernel_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "compile-kernels",
        "tiny:llama@80",
        "--min-speedup",
        "0",
        "--formats",
        "index",
        "-o",
        str(tmp_path),
        "--json",
    ]
    assert cli.run(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["target"] == "cuda:sm_90"
    assert len(said["layers"]) == 15
    assert not said["failed"]
    assert {k["format"] for k in said["kernels"]} == {"index+bf16"}
    for kernel in said["kernels"]:
        assert kernel["spilled"] == 0
        assert (tmp_path / kernel["cubin"]).read_bytes()[:4] == b"\x7fELF"
        assert (tmp_path / kernel["cubin"]).with_suffix(".ptx").read_text().startswith("//")


def test_what_stays_dense_has_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compile-kernels", "tiny:llama@80", "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "dense: too small: at 64x64 a call costs more than sparsity saves" in said
    assert "nothing was run" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target", "cuda:sm_75"], "unknown target 'cuda:sm_75'"),
        (["--target", "cpu"], "it must be a GPU, such as cuda:sm_90"),
        (["--dtype", "int8"], "it must be one of bf16, fp16, fp32"),
    ],
)
def test_bad_input_is_a_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compile-kernels", "tiny:llama", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_counts_of_gpu_kernels_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "--sass"]) == 0
    said = capsys.readouterr().out
    assert "| nm:2:4+bf16" in said
    assert "over budget" in said
    assert cli.run(["kernels", "--sass", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "sm_90"
