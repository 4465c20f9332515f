"""Fixtures of the kernel tests: one compiled-kernel cache per session, and which ISAs this machine can run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsec.codegen.build import build
from sparsec.codegen.build import compile_all as build_all
from sparsec.codegen.cpp import packer
from sparsec.codegen.spec import Kernel, KernelSpec

NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "portable": set(),
}


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory shared by the tests of this session, also between the workers of pytest-xdist; the packer is
    compiled into it too."""
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"
    path.mkdir(exist_ok=True)
    packer.load(path)
    return path


@pytest.fixture(scope="session")
def can_run() -> Callable[[KernelSpec], bool]:
    flags = _cpu_flags()
    integer = {"avx512_vnni", "avx512vbmi"}
    return lambda spec: (
        flags >= NEEDS[spec.isa]
        and (not spec.bf16_dot or "avx512_bf16" in flags)
        and (not spec.x or spec.isa != "avx512" or flags >= integer)
    )


@pytest.fixture(scope="session")
def compiled(kernel_cache: Path) -> Callable[[KernelSpec], Kernel]:
    return lambda spec: build(spec, kernel_cache)


@pytest.fixture
def runnable(
    can_run: Callable[[KernelSpec], bool], compiled: Callable[[KernelSpec], Kernel]
) -> Callable[[KernelSpec], Kernel]:
    """A compiled kernel, or a skipped test where this machine cannot run it."""

    def get(spec: KernelSpec) -> Kernel:
        kernel = compiled(spec)
        if not can_run(spec):
            what = " with bf16 dot" if spec.bf16_dot else " with integer dot products" if spec.x else ""
            pytest.skip(f"compiled; this machine cannot run {spec.isa}{what}")
        return kernel

    return get


@pytest.fixture(scope="session")
def compile_all(kernel_cache: Path, request: pytest.FixtureRequest) -> Callable[[list[KernelSpec]], None]:
    """Compile many specs two at a time, ahead of the tests that use them: those of the tests that were chosen."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {v for found in chosen if found for v in found.params.values() if isinstance(v, KernelSpec)}

    def run(specs: list[KernelSpec]) -> None:
        assert not build_all([spec for spec in specs if spec in wanted], kernel_cache, threads=2)

    return run
