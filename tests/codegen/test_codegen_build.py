"""Building: one compilation whoever asks, damage found before it is loaded, sentences when it cannot be done."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from sparsec.codegen import build as build_module
from sparsec.codegen.build import build, compile_all, compile_shared, find_compiler, isa_flags
from sparsec.codegen.spec import KernelSpec
from sparsec.errors import BuildError, CompileFailed, NoCompiler, SparsecWarning
from sparsec.formats import Format

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'
SPEC = KernelSpec(Format.parse("index+fp32"), "dot", "fp32", "portable")


def answer(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


@pytest.fixture
def counting_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CXX is a script that notes each compilation in the returned file, waits a little and calls the real compiler."""
    log = tmp_path / "calls"
    script = tmp_path / "c++-that-counts"
    script.write_text(
        f"#!{sys.executable}\nimport subprocess, sys, time\n"
        f"if '-o' in sys.argv: open({str(log)!r}, 'a').write('x'); time.sleep(0.3)\n"
        f"sys.exit(subprocess.call([{shutil.which('g++') or shutil.which('c++')!r}, *sys.argv[1:]]))\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def test_a_text_is_compiled_once_and_stays_readable(tmp_path: Path, counting_compiler: Path) -> None:
    path = compile_shared(ANSWER % 42, "kernel", ["-O1"], tmp_path)
    assert answer(path) == 42
    assert path.parent == tmp_path / "kernels"
    assert path.with_suffix(".cpp").read_text() == ANSWER % 42
    assert compile_shared(ANSWER % 42, "kernel", ["-O1"], tmp_path) == path
    assert counting_compiler.read_text() == "x"


def test_other_text_or_other_flags_are_another_object(tmp_path: Path) -> None:
    paths = {
        compile_shared(ANSWER % 1, "kernel", ["-O1"], tmp_path),
        compile_shared(ANSWER % 2, "kernel", ["-O1"], tmp_path),
        compile_shared(ANSWER % 1, "kernel", ["-O2"], tmp_path),
    }
    assert len(paths) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_object_is_built_again_with_a_warning(tmp_path: Path, damage: str) -> None:
    path = compile_shared(ANSWER % 7, "kernel", [], tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.unlink()  # the loader keeps mapped files by inode
    path.write_bytes({"flip": bytes(data), "truncate": bytes(data[: len(data) // 2]), "empty": b""}[damage])
    with pytest.warns(SparsecWarning, match="is damaged; it is built again"):
        again = compile_shared(ANSWER % 7, "kernel", [], tmp_path)
    assert answer(again) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_shared(ANSWER % 7, "kernel", [], tmp_path)


def test_an_interrupted_build_is_finished_quietly(tmp_path: Path) -> None:
    path = compile_shared(ANSWER % 8, "kernel", [], tmp_path)
    path.with_suffix(".json").unlink()  # killed between the object and its record
    path.write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(compile_shared(ANSWER % 8, "kernel", [], tmp_path)) == 8


def test_no_compiler_is_said_with_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/my-c++ -fancy")
    with pytest.raises(NoCompiler, match=r"/nowhere/my-c\+\+ -fancy, g\+\+, clang\+\+, c\+\+.*Install g\+\+"):
        find_compiler()
    with pytest.raises(NoCompiler):
        build(SPEC, tmp_path)


def test_without_a_compiler_an_earlier_object_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compile_shared(ANSWER % 9, "kernel", ["-O1"], tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert compile_shared(ANSWER % 9, "kernel", ["-O1"], tmp_path) == path
    with pytest.raises(NoCompiler):
        compile_shared(ANSWER % 10, "kernel", ["-O1"], tmp_path)
    path.write_bytes(b"damaged")
    with pytest.raises(NoCompiler):
        compile_shared(ANSWER % 9, "kernel", ["-O1"], tmp_path)


def test_cxx_may_hold_arguments_and_is_preferred(tmp_path: Path, counting_compiler: Path) -> None:
    script = os.environ["CXX"]
    os.environ["CXX"] = f"{script} -DVALUE=5"
    text = 'extern "C" __attribute__((visibility("default"))) int answer() { return VALUE; }'
    assert answer(compile_shared(text, "kernel", [], tmp_path)) == 5
    assert counting_compiler.read_text() == "x"


def test_a_text_that_does_not_compile_gives_the_compilers_first_errors(tmp_path: Path) -> None:
    with pytest.raises(CompileFailed, match=r"nonsense.*The source was kept") as failure:
        compile_shared("int f() { return nonsense; }", "kernel", [], tmp_path)
    assert Path(str(failure.value.fields["source"])).read_text() == "int f() { return nonsense; }"
    assert not list((tmp_path / "kernels").glob("*.part"))
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_a_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\ncase $1 in --version) echo slow;; *) sleep 30;; esac\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(build_module, "TIMEOUT_S", 0.2)
    with pytest.raises(CompileFailed, match="timed out"):
        compile_shared(ANSWER % 1, "kernel", [], tmp_path)


def test_an_object_that_cannot_be_loaded_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> ctypes.CDLL:
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(BuildError, match="failed to map segment"):
        build(SPEC, tmp_path)


def _compile_in_a_process(folder: str, start: float) -> None:
    import time

    time.sleep(max(0.0, start - time.time()))
    compile_shared(ANSWER % 11, "kernel", [], Path(folder))


def test_two_processes_compile_once(tmp_path: Path, counting_compiler: Path) -> None:
    import time

    context = multiprocessing.get_context("fork")
    start = time.time() + 0.2
    processes = [context.Process(target=_compile_in_a_process, args=(str(tmp_path), start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counting_compiler.read_text() == "x"


def test_a_spec_is_built_once_per_process(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = build(SPEC, kernel_cache)
    monkeypatch.setattr(build_module, "compile_shared", None)  # a second look must not compile
    assert build(SPEC, kernel_cache) is kernel
    assert all((kernel.run, kernel.prepare, kernel.prepare_units, kernel.scratch))
    assert SPEC.name in kernel.source.read_text()


def test_flags_name_the_isa_and_nothing_of_this_machine() -> None:
    for isa in ("avx512", "avx2", "portable"):
        flags = isa_flags(KernelSpec(Format.parse("bitmap+bf16"), "dot", "bf16", isa))
        assert not any("native" in flag or "fast-math" in flag for flag in flags)
        assert ("-mavx512vbmi2" in flags) == (isa == "avx512")
        assert ("-mfma" in flags) == (isa != "portable")
    with_dot = KernelSpec(Format.parse("bitmap+bf16"), "dot", "bf16", "avx512", bf16_dot=True)
    assert "-mavx512bf16" in isa_flags(with_dot)


MANY = [KernelSpec(Format.parse(f"{pattern}+fp32"), loop, "fp32", isa)
        for pattern in ("bitmap", "index") for loop in ("dot", "outer") for isa in ("avx2", "portable")]  # fmt: skip


def test_many_kernels_are_compiled_ahead_and_each_is_the_object_that_it_is_alone(tmp_path: Path) -> None:
    assert compile_all(MANY, tmp_path / "all") == {}
    for spec in MANY[:3]:
        alone = build(spec, tmp_path / "alone").source.with_suffix(".so")
        together = tmp_path / "all" / "kernels" / alone.name
        assert together.read_bytes() == alone.read_bytes()
    assert len(list((tmp_path / "all" / "kernels").glob("*.so"))) == len(MANY)
    assert not list((tmp_path / "all" / "kernels").glob("*.gch"))


def test_what_is_compiled_already_is_left_alone(tmp_path: Path, counting_compiler: Path) -> None:
    compile_all(MANY, tmp_path)
    assert counting_compiler.read_text() == "x" * (len(MANY) + 1)  # and a header for the four of AVX2
    compile_all(MANY, tmp_path)
    build(MANY[0], tmp_path)
    assert counting_compiler.read_text() == "x" * (len(MANY) + 1)


@pytest.mark.parametrize("version", ["clang version 16", "g++ 12"])
def test_a_compiler_that_takes_no_precompiled_header_compiles_all_the_same(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clang is not asked for one; a GCC that cannot make one goes without."""
    script = tmp_path / "other"
    script.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        f"if '--version' in sys.argv: print({version!r}); sys.exit()\n"
        f"if 'c++-header' in sys.argv: sys.exit({'g++' in version} or 'clang was asked for a header')\n"
        f"assert '-include' not in sys.argv\n"
        f"sys.exit(subprocess.call([{shutil.which('g++') or shutil.which('c++')!r}, *sys.argv[1:]]))\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert compile_all(MANY, tmp_path) == {}


def test_kernels_that_fail_are_told_apart_from_those_that_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(build_module.family("index"))
    text = real.text
    monkeypatch.setattr(real, "text", lambda self, spec: text(self, spec) + ("nonsense" if spec.loop == "dot" else ""))
    failed = compile_all(MANY, tmp_path)
    assert set(failed) == {spec for spec in MANY if spec.format.pattern.kind == "index" and spec.loop == "dot"}
    assert all(isinstance(error, CompileFailed) for error in failed.values())
    with pytest.raises(CompileFailed):
        build(next(iter(failed)), tmp_path)
