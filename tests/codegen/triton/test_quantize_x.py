"""Rows of x as e4m3 with a scale each, in Triton's interpreter against plain torch."""

from __future__ import annotations

import pytest
import torch

from sparsec.codegen.triton.quantize import ALIGNED, TINY, by_torch, quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [1, 37, 128, 5000])
def test_rows_become_codes_and_scales(k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    x = (torch.randn(9, k + 3) * 10.0 ** torch.arange(-4, 5)[:, None]).to(dtype)[:, :k]  # rows further apart than k
    x[3] = 0
    launch, codes, scale = quantized(x)
    launch.run()
    expected, scales = by_torch(x)
    assert torch.equal(scale, scales)
    assert codes.shape[1] % ALIGNED == 0
    assert torch.equal(codes.float()[:, :k], expected.float())
    assert bool((codes.float()[:, k:] == 0).all())
    assert float(scale[3]) == TINY
    back = codes.float()[:, :k] * scale[:, None]
    least = scale[:, None] * 2.0**-10  # half a step of the smallest codes
    assert bool(((back - x.float()).abs() <= (x.float().abs() * 2.0**-4).clamp(min=least)).all())


def test_every_code_comes_back_and_halves_go_to_even() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.cat([codes[~codes.isnan()], torch.tensor([448.0])])[None]
    launch, found, scale = quantized(values)
    launch.run()
    assert float(scale) == 1
    assert torch.equal(found.float()[:, : values.shape[1]], values)
    ties = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 15.5]])
    launch, found, _ = quantized(ties)
    launch.run()
    assert found.float()[0, :7].tolist() == [448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8, 16.0]
