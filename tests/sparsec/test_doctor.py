"""sparsec doctor and sparsec kernels: complete, never failing, and every refusal with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsec import cli, doctor
from sparsec.codegen import cpp
from sparsec.codegen.cpp import FAMILIES
from sparsec.doctor import checkup, kernel_checks
from sparsec.targets import detect


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    command = [sys.executable, "-m", "sparsec", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_the_block_names_versions_machine_compiler_and_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "entry").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(doctor, "_backend", lambda: "fine")
    facts = dict(checkup(build=False).facts)
    for name in (
        "sparsec",
        "python",
        "system",
        "torch",
        "numpy",
        "cpu",
        "gpu",
        "threads",
        "compiler",
        "cache",
        "backend",
    ):
        assert facts[name], name
        assert not facts[name].startswith("unusable"), facts[name]
    assert detect.detect().isa in facts["cpu"]
    assert facts["cache"] == f"{tmp_path / 'cache'}, 3.0 MiB in 1 files"
    assert facts["SPARSEC_CACHE_DIR"] == str(tmp_path / "cache")
    assert cli.run(["doctor", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "```"
    block = lines[1 : lines.index("```", 1)]
    columns = {len(line) - len(line.partition("  ")[2].lstrip()) for line in block}
    assert len(columns) == 1, block  # values are aligned


def test_a_package_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-here"))
    assert dict(checkup(build=False).facts)["no-such-package-here"] == "not installed"


def test_without_a_compiler_every_family_has_that_reason_and_the_code_is_0(tmp_path: Path) -> None:
    cache = {"SPARSEC_CACHE_DIR": str(tmp_path), "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    done = run("doctor", "--json", **cache)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {kernel["family"] for kernel in found["kernels"]} == set(FAMILIES)
    for kernel in found["kernels"]:
        assert not kernel["built"]
        assert "no C++ compiler was found (looked for no-such-compiler" in kernel["reason"]
    assert found["facts"]["compiler"].startswith("unusable: no C++ compiler was found")
    shown = run("doctor", **cache)
    assert shown.returncode == 0
    for family in FAMILIES:
        assert f"- {family} kernels: no C++ compiler was found" in shown.stdout


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("doctor", "--quick", SPARSEC_CACHE_DIR=str(tmp_path / "file" / "below"))
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout


def test_a_wrong_isa_is_told(tmp_path: Path) -> None:
    done = run("doctor", "--quick", SPARSEC_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert "must be one of avx512, avx2, portable" in done.stdout


def test_a_broken_family_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "index", "sparsec.codegen.cpp.no_such_file:FAMILY")
    cpp.family.cache_clear()
    try:
        found = list(kernel_checks(["portable"], build=False))
    finally:
        cpp.family.cache_clear()
    broken = [kernel for kernel in found if kernel.reason]
    assert [kernel.family for kernel in broken] == ["index"]
    assert "no_such_file" in broken[0].reason
    assert {kernel.family for kernel in found} == set(FAMILIES)


def test_an_isa_that_this_cpu_lacks_is_a_reason_not_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    found = list(kernel_checks(["avx512"], build=True))
    assert found
    for kernel in found:
        assert not kernel.built
        assert "this CPU has no " in kernel.reason
        assert "avx512f" in kernel.reason


def test_kernels_are_listed_as_built_only_once_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path))
    assert cli.run(["kernels", "--isa", "portable", "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert not any(kernel["built"] for kernel in before)
    expected = [
        (kind, loop, dtype, "portable")
        for kind in FAMILIES
        for loop in cpp.family(kind).loops
        for dtype in ("fp32", "bf16")
    ]
    assert [(k["family"], k["loop"], k["dtype"], k["isa"]) for k in before] == expected
    monkeypatch.setattr("sparsec.codegen.cpp.FAMILIES", {"nm": FAMILIES["nm"]})  # one family is enough to build
    built = list(kernel_checks(["portable"], build=True))
    assert all(kernel.built and Path(kernel.source).read_text() for kernel in built)
    assert list(kernel_checks(["portable"], build=False)) == [
        doctor.KernelCheck(k.family, k.loop, k.dtype, k.isa, True, "", k.source) for k in built
    ]


def test_every_isa_is_listed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "--isa", "all", "--json"]) == 0
    assert {kernel["isa"] for kernel in json.loads(capsys.readouterr().out)} == set(detect.ISA_NEEDS)
