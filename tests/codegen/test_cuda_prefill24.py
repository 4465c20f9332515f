"""2:4 prefill kernels as CUDA C++: their packs, their tiling run on a CPU, and their machine code for GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsec.codegen import reference
from sparsec.codegen.cuda import nvrtc, prefill24
from sparsec.codegen.cuda.prefill24 import Shape, pack, shapes, unpack
from sparsec.errors import KernelCompileFailed, NoNvrtc, PatternMismatch
from tests.codegen.cuda_emulation import product, weight24

SHAPES = [
    Shape("mma", "bf16", "", 128, 3),
    Shape("mma", "bf16", "silu", 32, 4),
    Shape("mma", "fp16", "relu", 64, 3, (4, 1)),
    Shape("wgmma", "bf16", "gelu", 64, 4),
    Shape("wgmma", "fp16", "gelu_tanh", 128, 3, ahead=1),
    Shape("wgmma", "bf16", "", 192, 3, ahead=2),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
@pytest.mark.parametrize(
    ("shape", "late", "backward"),
    [(s, late, way) for s in SHAPES for late in range(4 if s.kind == "wgmma" else 2) for way in (0, 1)],
    ids=lambda of: of.name if isinstance(of, Shape) else str(of),
)
def test_tiles_pipelines_and_edges_are_right(shape: Shape, late: int, backward: int) -> None:
    dtype = torch.bfloat16 if shape.dtype == "bf16" else torch.float16
    sizes = [(37, 128, 1000), (1, 8, 8), (70, 130, 75), (200, 256, 328)]
    for m, n, k in sizes if late == backward == 0 else sizes[:1]:
        torch.manual_seed(m)
        x = torch.randn(m, k + 8, dtype=dtype)[:, :k]  # rows of 16 bytes where k is a multiple of 8
        weight = weight24(n, k, dtype, m)
        bias = torch.randn(n, dtype=dtype) if m != 70 else None
        y = product(shape, x, weight, bias, late, backward, -(-n // 8) * 8 + 8 * (m % 2))
        expected = reference.linear(x, weight, bias, shape.act).float()
        scale = x.float().abs() @ weight.float().abs().T + (0 if bias is None else bias.float().abs())
        off = (y.float() - expected).abs() - (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11) * scale.clamp(min=1e-2)
        assert bool((off <= 0).all()), (m, n, k, float(off.max()))


def numpy_weight(kind: str, values: np.ndarray, words: np.ndarray, n: int, k: int) -> np.ndarray:
    """A pack read as the hardware reads it, one value after the other: PTX ISA, fragments of sparse mma and wgmma."""
    out = np.zeros((-(-n // 128) * 128, -(-k // 128) * 128), np.float32)
    raw, codes = values.reshape(-1), words.reshape(-1)
    tiles, wide = len(out) // 16, len(out) // 64
    for row in range(n):
        for kept in range(-(-k // 4) * 2):  # two of each four columns
            step, inside = kept // 32, kept % 32
            product, place = inside // 16, inside % 16
            g, high, t = row % 8, row % 16 // 8, place % 8 // 2
            if kind == "mma":
                lane, register = 4 * g + t, place // 8 * 2 + high
                at = (((step * tiles + row // 16) * 2 + product) * 32 + lane) * 8 + register * 2 + place % 2
                word = (step * tiles + row // 16) * 32 + 4 * g + 2 * product + place // 8
            else:
                byte = (kept % 64 * 2) ^ ((row % 8) << 4)
                at = ((kept // 64 * wide + row // 64) * 64 + row % 64) * 64 + byte // 2
                word = ((kept // 64 * wide + row // 64) * 2 + kept % 64 // 32) * 128 + row % 64 // 16 * 32
                word += 4 * g + 2 * product + place // 8
            half = int(codes[word]) >> (16 * high) & 0xFFFF
            column = kept // 2 * 4 + (half >> (place % 8 // 2 * 4 + place % 2 * 2) & 3)
            if raw[at]:
                out[row, column] = raw[at]
    return out[:n, :k]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_packs_hold_the_weight_where_the_hardware_looks(kind: str, dtype: torch.dtype) -> None:
    for n, k in [(1, 4), (70, 300), (130, 66)]:
        weight = weight24(n, k, dtype, n)
        packed = pack(weight, kind)
        assert torch.equal(unpack(packed, kind), weight)
        values, words = packed.tensors
        read = numpy_weight(kind, values.float().numpy(), words.numpy(), n, k)
        assert np.array_equal(read, weight.float().numpy())


@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_weights_without_rows_or_columns_are_packed(kind: str) -> None:
    for shape in [(0, 8), (3, 0)]:
        weight = torch.zeros(shape, dtype=torch.bfloat16)
        assert torch.equal(unpack(pack(weight, kind), kind), weight)


@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_packs_take_nine_bits_a_weight(kind: str) -> None:
    assert pack(weight24(256, 1024, torch.bfloat16), kind).bytes * 8 == 9 * 256 * 1024


def test_negative_zeros_nan_and_infinities_are_packed() -> None:
    weight = torch.zeros(2, 8, dtype=torch.bfloat16)
    weight[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), -0.0])
    back = unpack(pack(weight, "mma"), "mma")
    assert torch.equal(back.nan_to_num(1, 2), weight.nan_to_num(1, 2))


def test_what_is_not_2_of_4_or_not_16_bits_is_refused() -> None:
    weight = torch.zeros(4, 16, dtype=torch.bfloat16)
    weight[2, 9:12] = 1
    with pytest.raises(PatternMismatch, match="row 2 keeps more than two of columns 8 to 11"):
        pack(weight, "mma")
    with pytest.raises(PatternMismatch, match="float32"):
        pack(torch.zeros(4, 16), "mma")


@pytest.fixture(scope="module")
def compiler() -> None:
    try:
        nvrtc.library()
    except NoNvrtc as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def listing() -> Callable[[bytes], str]:
    pytest.importorskip("triton", reason="the disassembler comes with triton")
    from sparsec.codegen.triton import sass

    return sass.listing


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_uses_sparse_tensor_cores_and_spills_nothing(
    capability: int, dtype: str, listing: Callable[[bytes], str]
) -> None:
    for shape in shapes(dtype, "gelu", 1 << 20, capability):
        if (capability == 90 and shape.kind == "mma") or (dtype == "fp16" and shape.block_m != 128):
            continue  # sm_80 has shown the one, bf16 the other
        code = listing(prefill24.cubin(shape, capability))
        assert ("HGMMA.SP" if shape.kind == "wgmma" else "HMMA.SP.16832") in code, shape.name
        assert "STACK:0" in code, shape.name
        assert "LOCAL:0" in code, shape.name
        assert "LDL" not in code, shape.name
        assert code.count("WARPGROUP.ARRIVE") == (shape.kind == "wgmma"), (
            f"products of {shape.name} wait for each other"
        )
        assert "LDGSTS.E.BYPASS.128" in code, shape.name


@pytest.mark.usefixtures("compiler")
def test_a_text_that_does_not_compile_says_where() -> None:
    with pytest.raises(KernelCompileFailed, match=r"broken.cu\(2\): error"):
        nvrtc.compile("\nint f( {", "sm_80", "broken")


def test_a_missing_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc.library.cache_clear()
    monkeypatch.setattr(nvrtc, "candidates", lambda: iter([Path("nowhere/libnvrtc.so")]))
    with pytest.raises(NoNvrtc, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.library()
    nvrtc.library.cache_clear()


def test_few_rows_of_x_take_small_tiles_and_shared_memory_fits() -> None:
    assert shapes("bf16", "", 20, 80)[0].block_m == 32
    assert shapes("bf16", "", 4096, 90)[0].kind == "wgmma"
    assert max(shape.shared for shape in shapes("bf16", "", 64, 90)) <= 227 * 1024
    assert max(shape.shared for shape in shapes("bf16", "", 64, 89)) <= 99 * 1024
