"""Kernels read no further than they may: every buffer ends at a page that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsec.codegen.cpp.values import is_coded
from sparsec.codegen.spec import Kernel, KernelSpec
from sparsec.formats import Format

SPECS = [
    "bitmap+fp32 dot avx512",
    "bitmap+bf16 outer avx512",
    "bitmap+bf16 dot avx2",
    "index+fp32 dot avx512",
    "index+bf16 outer avx512",
    "index+bf16 dot avx2",
    "nm:2:4+fp32 dot avx512",
    "block:16x1+fp32 dot avx512",
    "block:1x16+fp32 outer avx512",
    "index+fp32 dot portable",
    "panel+int8 dot avx512",
    "panel+int4g32 dot avx512",
    "panel+ternary outer avx512",
    "bitmap+int8 dot avx512",
    "bitmap+int4g64 dot avx512",
    "bitmap+ternary dot avx2",
    "bitmap+codebook outer avx2",
    "index+int4 dot avx512",
    "index+int8 outer avx2",
    "block:1x16+codebook dot avx512",
    "block:1x16+ternary outer avx2",
    *("panel+int8 dot avx512 int8", "bitmap+int4g32 dot avx512 int8", "index+int8 dot avx512 int8"),
    *("bitmap+int8 dot avx2 int8", "index+int4 dot avx2 int8", "block:4x1+int8 dot avx512 int8"),
]

SCRIPT = """
import ctypes, json, mmap, sys
from pathlib import Path
import torch
from sparsec.codegen import direct, reference
from sparsec.codegen.build import build
from sparsec.codegen.cpp import family, packer
from sparsec.codegen.cpp.values import is_coded
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format

kept_alive = []

def at_the_edge(tensor):
    # a copy whose last byte is the last byte of a page, followed by a page without any access
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = address + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    flat = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=pages * mmap.PAGESIZE - size)
    flat.copy_(tensor.flatten())
    kept_alive.append(area)
    return flat.view(tensor.shape)

cache, specs = Path(sys.argv[1]), json.loads(sys.argv[2])
packer.load(cache)
generator = torch.Generator().manual_seed(1)
for text in specs:
    format, loop, isa, *x = text.split()
    values = Format.parse(format).values
    coded = is_coded(values)
    spec = KernelSpec(Format.parse(format), loop, "fp32" if coded else values, isa, x="".join(x))
    dtype = torch.float32 if spec.dtype == "fp32" else torch.bfloat16
    kernel = build(spec, cache)
    for n, k, m, density in [(16, 128, 1, 1.0), (17, 130, 3, 0.5), (33, 31, 20, 0.2), (5, 256, 2, 0.9)]:
        weight = torch.randint(1, 9, (n, k), generator=generator).to(dtype)
        if spec.format.pattern.kind == "nm":
            weight = weight * torch.tensor([1, 0, 1, 0]).repeat(-(-k // 4))[:k]
        else:
            weight = weight * (torch.rand(n, k, generator=generator) < density)
        if coded:
            weight = weight.clamp(max=1 if values == "ternary" else 7)
        packed = family(spec.format.pattern.kind, spec.x).pack(weight, spec.format.pattern, spec.format.values, "")
        edged = Packed(packed.format, 1, tuple(at_the_edge(t) for t in packed.tensors), packed.work, packed.shape, "")
        x = at_the_edge(torch.randint(-8, 9, (m, k), generator=generator).to(dtype))
        bias, y = at_the_edge(torch.ones(n, dtype=dtype)), at_the_edge(torch.empty(m, n, dtype=dtype))
        print(text, n, k, m, flush=True)
        direct.prepared(kernel, edged, x, bias, "", y)()
        expected = reference.linear(x, weight, bias, x_scale=0.0 if spec.x else None)
        same = bool(((y - expected).abs() <= (1e-2 if spec.x else 1e-3)).all()) if coded else torch.equal(y, expected)
        assert same, (text, n, k, m)
print("done")
"""


def test_no_kernel_reads_past_a_buffer(
    can_run: Callable[[KernelSpec], bool], compiled: Callable[[KernelSpec], Kernel], kernel_cache: Path
) -> None:
    texts = []
    for text in SPECS:
        format, loop, isa, *x = text.split()
        values = Format.parse(format).values
        spec = KernelSpec(Format.parse(format), loop, "fp32" if is_coded(values) else values, isa, x="".join(x))
        if can_run(spec):
            texts.append(text)
            compiled(spec)
    if not texts:
        pytest.skip("this machine runs none of the kernels")
    command = [sys.executable, "-c", SCRIPT, str(kernel_cache), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"stopped at {done.stdout.splitlines()[-1:]}: {done.stderr[-500:]}"
    assert done.stdout.endswith("done\n")
