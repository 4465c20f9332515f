"""What GPU kernels say where Triton is missing or old, and where a kernel does not compile."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

from sparsec.codegen import triton as gpu
from sparsec.errors import KernelCompileFailed, NoTriton, RoundTripMismatch
from sparsec.formats import Format


def test_without_triton_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NoTriton, match=r"triton 3\.6 or newer, and it cannot be imported .* pip install triton"):
        gpu.need_triton()


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("triton")
    old.__version__ = "3.2.0"
    monkeypatch.setitem(sys.modules, "triton", old)
    with pytest.raises(NoTriton, match=r"3\.2\.0 is installed"):
        gpu.need_triton()


def test_importing_the_table_of_families_imports_no_triton() -> None:
    import subprocess

    names = "sparsec.codegen.triton, sparsec.targets.cuda, sparsec.gpu_rates"
    code = f"import sys, {names}; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pack_that_loses_a_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    family = gpu.family("index")
    monkeypatch.setattr(type(family), "unpack", lambda self, packed: torch.zeros(packed.shape))
    with pytest.raises(RoundTripMismatch, match="1 values, the first in row 1, column 2"):
        gpu.pack_verified(torch.tensor([[0.0, 0, 0], [0, 0, 5.0]]), Format.parse("index+fp32"), "test")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles kernels")
def test_what_the_compiler_says_is_in_the_error() -> None:
    pytest.importorskip("triton")
    from dataclasses import replace

    from sparsec.codegen.triton.compile import compile_launch
    from sparsec.codegen.triton.samples import samples

    launch = next(samples(90, ("index",))).launches[0]
    broken = replace(launch, constants={**launch.constants, "LANES": 3})
    with pytest.raises(KernelCompileFailed, match=r"gather could not be compiled for sm_90: .*stays dense"):
        compile_launch(broken, 90)
