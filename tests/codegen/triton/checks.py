"""What every family is held to, in the interpreter: the product of every loop and configuration is the reference's."""

from __future__ import annotations

import torch

from sparsec.codegen import reference
from sparsec.codegen.triton import family_of, pack_verified
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.launch import run
from sparsec.codegen.triton.samples import sample_weight, x_dtype
from sparsec.formats import Format


def allowed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Per output: rounding of y twice over (the interpreter cuts bf16 off, it does not round), and of fp32 sums."""
    scale = x.float().abs() @ weight.float().abs().T + (0 if bias is None else bias.float().abs())
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-6}[x.dtype]
    return 2 * step * scale.clamp(min=1e-3)


def check(
    name: str, loop: str, m: int, n: int, k: int, *, density: float = 0.3, act: str = "", bias: bool = True,
    seed: int = 0, configs: int = 3,
) -> None:  # fmt: skip
    """Pack a random weight of format ``name`` and compare up to ``configs`` configurations with the reference."""
    format = Format.parse(name)
    chosen = family_of(format, loop)
    weight = sample_weight(format, n, k, density, seed)
    packed = pack_verified(weight, format, "test", loop)
    torch.manual_seed(seed)
    x = torch.randn(m, k).to(x_dtype(format))
    b = torch.randn(n).to(x.dtype) if bias else None
    expected = reference.linear(x, weight, b, act).float()
    for config in list(chosen.configs(packed, loop, m, 90))[:configs]:
        y = torch.full((m, n), float("nan"), dtype=x.dtype)
        run(chosen.launches(packed, loop, Call(x, y, b, act), config))
        off = (y.float() - expected).abs() - allowed(x, weight, b)
        assert bool((off <= 0).all()), (name, loop, dict(config), float(off.max()))
