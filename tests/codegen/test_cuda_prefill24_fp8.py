"""2:4 prefill in e4m3: its packs against NumPy, its tiling run on a CPU, its machine code, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sparsec.codegen import reference
from sparsec.codegen.cuda import families, nvrtc, prefill24
from sparsec.codegen.cuda.prefill24 import Shape, pack_fp8, shapes, unpack
from sparsec.codegen.triton.quantize import by_torch
from sparsec.errors import NoNvrtc, PatternMismatch
from sparsec.formats import Format
from tests.codegen.cuda_emulation import product, weight24
from tests.codegen.triton.fragment_model import mma_sp_e4m3

FORMAT = Format.parse("nm:2:4+fp8")


def on_grid24(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random 2:4 as a quantiser leaves it: e4m3 values times an fp32 scale a row, rounded to ``dtype``."""
    weight = weight24(n, k, torch.float32, seed)
    scale = (weight.abs().amax(1, keepdim=True) / 448).clamp(min=1e-6)
    return ((weight / scale).to(torch.float8_e4m3fn).float() * scale).to(dtype)


SHAPES = [
    Shape("mma", "bf16", "", 128, 3, values="fp8"),
    Shape("mma", "fp16", "relu", 64, 3, (4, 1), values="fp8"),
    Shape("wgmma", "bf16", "gelu", 64, 4, values="fp8"),
    Shape("wgmma", "fp16", "", 128, 3, ahead=1, values="fp8"),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
@pytest.mark.parametrize(
    ("shape", "late", "backward"),
    [(s, late, way) for s in SHAPES for late in ((0, 3) if s.kind == "wgmma" else (0, 1)) for way in (0, 1)],
    ids=lambda of: of.name if isinstance(of, Shape) else str(of),
)
def test_tiles_scales_and_edges_are_right(shape: Shape, late: int, backward: int) -> None:
    dtype = torch.bfloat16 if shape.dtype == "bf16" else torch.float16
    sizes = [(37, 40, 1000), (1, 8, 8), (70, 130, 75)]
    for m, n, k in sizes if late == backward == 0 else sizes[:1]:
        torch.manual_seed(m)
        x = torch.randn(m, k, dtype=dtype) * torch.rand(m, 1, dtype=dtype)
        weight = on_grid24(n, k, dtype, m)
        bias = torch.randn(n, dtype=dtype) if m != 70 else None
        y = product(shape, x, weight, bias, late, backward, -(-n // 8) * 8 + 8 * (m % 2))
        codes, scale = by_torch(x)
        exact = codes.double() * scale.double()[:, None]
        found = prefill24.fp8_of(weight, FORMAT)
        real = found.q.double() * found.scale.double()[:, None]
        added = 0 if bias is None else bias.double()
        expected = reference.ACT[shape.act](exact @ real.T + added)
        size = exact.abs() @ real.abs().T + (0 if bias is None else bias.double().abs())
        allowed = (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11) * expected.abs() + 1e-6 * size + 1e-6
        assert bool(((y.double() - expected).abs() <= allowed).all()), (m, n, k)


def numpy_weight(kind: str, codes: np.ndarray, words: np.ndarray, n: int, k: int) -> np.ndarray:
    """Bytes of a pack put where the hardware takes them for, one after the other; uint8 [N, K].

    The tables of the PTX ISA, "Matrix fragments for sparse mma.m16n8k64 with .u8 / .s8 / .e4m3 / .e5m2 type", and of
    "wgmma.mma_async.sp", once more in its terms: a register has four kept bytes of eight columns, and a lane's word of
    metadata the eight groups of four of its row and half.
    """
    out = np.zeros((n, k), np.uint8)
    raw, meta = codes.reshape(-1).view(np.uint8), words.reshape(-1).view(np.uint32)
    tiles, wide = -(-n // 128) * 8, -(-n // 128) * 2
    for row in range(n):
        for kept in range(-(-k // 4) * 2):
            product, place = kept // 32, kept % 32  # a product has 64 columns
            g, high = row % 8, row % 16 // 8
            lane_of_word = 4 * g + 2 * (place // 16) + high
            if kind == "mma":
                lane, register = 4 * g + place % 16 // 4, place // 16 * 2 + high
                tile = (product // 2 * tiles + row // 16) * 2 + product % 2
                at, word = tile * 512 + lane * 16 + register * 4 + place % 4, tile * 32 + lane_of_word
            else:
                step, inside = kept // 128, kept % 128
                at = ((step * wide + row // 64) * 64 + row % 64) * 128 + (inside ^ (row % 8) << 4)
                word = ((step * wide + row // 64) * 4 + inside // 32) * 128 + row % 64 // 16 * 32 + lane_of_word
            column = kept // 2 * 4 + (int(meta[word]) >> (place // 2 % 8 * 4 + place % 2 * 2) & 3)
            if raw[at]:
                out[row, column] = raw[at]
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_packs_hold_the_weight_where_the_hardware_looks(kind: str, dtype: torch.dtype) -> None:
    for n, k in [(1, 4), (70, 300), (130, 66)]:
        weight = on_grid24(n, k, dtype, n)
        packed = pack_fp8(weight, kind)
        assert torch.equal(unpack(packed, kind), weight)
        codes, words, scale, _ = packed.tensors
        read = torch.from_numpy(numpy_weight(kind, codes.numpy(), words.numpy(), n, k)).view(torch.float8_e4m3fn)
        assert torch.equal((read.float() * scale[:, None]).to(dtype), weight)


def test_registers_of_a_pack_times_x_by_the_isa_are_the_product() -> None:
    """One product of 64 columns: registers as the pack has them, run by the model of the instruction."""
    weight = on_grid24(16, 128, torch.float32, 3)
    codes, words, scale, _ = pack_fp8(weight, "mma").tensors
    x = torch.randn(8, 128).to(torch.float8_e4m3fn)
    sums = [np.zeros((1, 32), np.float32).view(np.uint32)] * 4
    lane = np.arange(32)
    for half in range(2):
        registers = codes[0, 0, half].contiguous().numpy().view(np.uint32).reshape(32, 4)
        rows = x.view(torch.uint8).numpy()[lane // 4, half * 64 : half * 64 + 64].copy().view(np.uint32)
        b = [rows[lane, 4 * r + lane % 4][None] for r in range(4)]  # bytes 16 r + 4 t .. of column g
        a, e = [registers[:, r][None] for r in range(4)], words[0, 0].numpy().view(np.uint32)[None, half * 32 :][:, :32]
        sums = mma_sp_e4m3(a, b, sums, e)
    found = np.zeros((16, 8), np.float32)
    for i in range(4):
        found[lane // 4 + 8 * (i >= 2), lane % 4 * 2 + i % 2] = sums[i].view(np.float32)[0]
    expected = (weight.double() / scale.double()[:16, None]).round(decimals=9) @ x.double().T
    assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_packs_take_five_bits_a_weight(kind: str) -> None:
    packed = pack_fp8(on_grid24(256, 1024, torch.bfloat16), kind)
    assert (packed.bytes - packed.tensors[2].numel() * 4) * 8 == 5 * 256 * 1024


@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_weights_without_rows_or_columns_are_packed(kind: str) -> None:
    for shape in [(0, 8), (3, 0), (3, 8)]:
        weight = torch.zeros(shape, dtype=torch.bfloat16)
        assert torch.equal(unpack(pack_fp8(weight, kind), kind), weight)


def test_scales_that_are_given_are_used_and_have_to_give_the_weight_back() -> None:
    weight = on_grid24(6, 16, torch.bfloat16)
    scale = prefill24.fp8_of(weight, FORMAT).scale
    halved = pack_fp8(weight, "mma", scale=scale * 2)  # every value becomes half as large, and has room for that
    assert torch.equal(halved.tensors[2], scale * 2)
    assert torch.equal(unpack(halved, "mma"), weight)
    scale[4] *= 1.1
    with pytest.raises(PatternMismatch, match=r"nm:2:4\+fp8: row 4 is not e4m3 values times its scale"):
        pack_fp8(weight, "mma", scale=scale)
    with pytest.raises(PatternMismatch, match=r"6 rows have scales of shape \(3,\)"):
        pack_fp8(weight, "mma", scale=scale[:3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_no_finite_positive_numbers_are_refused(bad: float) -> None:
    scale = torch.ones(6)
    scale[2] = bad
    with pytest.raises(PatternMismatch, match=r"the scale of row 2 is .*finite and positive"):
        pack_fp8(torch.zeros(6, 16, dtype=torch.bfloat16), "mma", scale=scale)


def test_bf16_weights_that_are_not_e4m3_are_never_rounded() -> None:
    weight = on_grid24(40, 64, torch.bfloat16)
    weight[33] = weight24(1, 64, torch.bfloat16, 5)
    with pytest.raises(PatternMismatch, match=r"row 33 is not e4m3 values times a scale, exactly\. It stays dense"):
        pack_fp8(weight, "wgmma")
    for value in (float("nan"), float("inf")):
        weight = on_grid24(4, 8, torch.bfloat16)
        weight[1, 0] = value
        with pytest.raises(PatternMismatch, match="row 1"):
            pack_fp8(weight, "mma")
    weight = torch.zeros(4, 16, dtype=torch.bfloat16)
    weight[2, 9:12] = 1
    with pytest.raises(PatternMismatch, match="row 2 keeps more than two of columns 8 to 11"):
        pack_fp8(weight, "mma")


def test_x_and_its_scales_come_together() -> None:
    packed, shape = pack_fp8(on_grid24(8, 16, torch.bfloat16), "mma"), SHAPES[0]
    x, y = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16 without scales for prefill24_mma_fp8"):
        prefill24.arguments(packed, shape, x, y, None)
    sixteen = prefill24.pack(weight24(8, 16, torch.bfloat16), "mma")
    with pytest.raises(ValueError, match="with scales"):
        prefill24.arguments(sixteen, Shape("mma", "bf16"), x, y, None, torch.ones(2))


def test_only_gpus_with_such_products_have_kernels_and_their_memory_fits() -> None:
    assert shapes("bf16", "", 64, 80, "fp8") == shapes("bf16", "", 64, 100, "fp8") == []
    assert {s.kind for s in shapes("bf16", "", 64, 90, "fp8")} == {"wgmma"}
    assert {s.kind for s in shapes("bf16", "", 64, 89, "fp8")} == {"mma"}
    assert max(s.shared for s in shapes("bf16", "", 64, 90, "fp8")) <= 227 * 1024
    assert max(s.shared for s in shapes("bf16", "", 64, 120, "fp8")) <= 99 * 1024


def test_the_family_rounds_x_and_then_multiplies() -> None:
    from sparsec.codegen.triton.contract import Call

    packed = families.PREFILL.pack(on_grid24(8, 16, torch.float16), FORMAT, "key")
    x, y = torch.zeros(3, 16, dtype=torch.float16), torch.zeros(3, 8, dtype=torch.float16)
    (config,) = families.PREFILL.configs(packed, "prefill", 3, 89)[:1]
    launches = families.PREFILL.launches(packed, "prefill", Call(x, y, capability=89), config)
    assert [launch.name for launch in launches] == ["quantize", "prefill24_mma_fp8_fp16_plain_m32_s3"]


@pytest.fixture(scope="module")
def listing() -> Callable[[bytes], str]:
    try:
        nvrtc.library()
    except NoNvrtc as error:
        pytest.skip(str(error))
    pytest.importorskip("triton", reason="the disassembler comes with triton")
    from sparsec.codegen.triton import sass

    return sass.listing


@pytest.mark.parametrize("capability", [89, 90, 120])
def test_machine_code_has_sparse_products_of_e4m3_and_spills_nothing(
    capability: int, listing: Callable[[bytes], str]
) -> None:
    for shape in shapes("bf16", "gelu", 1 << 20, capability, "fp8"):
        code = listing(prefill24.cubin(shape, capability))
        steps = 4 if shape.kind == "wgmma" else 2 * (8 // shape.warps[0]) * (shape.block_m // 8 // shape.warps[1])
        name = (
            f"QGMMA.SP.64x{shape.block_m}x64.F32.E4M3.E4M3" if shape.kind == "wgmma" else "QMMA.SP.16864.F32.E4M3.E4M3"
        )
        assert code.count(name) == steps, shape.name
        assert "HMMA" not in code, shape.name  # products put together from those of fp16
        assert "STACK:0" in code, shape.name
        assert "LOCAL:0" in code, shape.name
        assert "LDL" not in code, shape.name
        assert code.count("WARPGROUP.ARRIVE") == (shape.kind == "wgmma"), shape.name
        assert "LDGSTS.E.BYPASS.128" in code, shape.name


@pytest.mark.parametrize("capability", [89, 90, 120])
def test_rounding_x_compiles_to_conversions_of_the_hardware(capability: int) -> None:
    pytest.importorskip("triton")
    from sparsec.codegen.triton import quantize
    from sparsec.codegen.triton.compile import compile_launch
    from sparsec.codegen.triton.sass import disassembled

    if not quantize.NATIVE:
        pytest.skip("compiles kernels, and this process interprets them")
    launch, _, _ = quantize.quantized(torch.zeros(4, 4096, dtype=torch.bfloat16))
    made = compile_launch(launch, capability)
    assert "cvt.rn.satfinite.e4m3x2.f32" in made.ptx
    read = disassembled(made.cubin)
    assert read.local == 0
    assert "LDG.E.128" in str(read.loop)
