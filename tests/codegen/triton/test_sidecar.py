"""Outliers in 16 bits beside a dense quantised weight."""

from __future__ import annotations

import pytest
import torch

from sparsec.codegen import reference
from sparsec.codegen.triton import family
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.launch import run
from sparsec.codegen.triton.samples import sample_weight
from sparsec.codegen.triton.sidecar import pack_with_outliers
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from tests.codegen.triton.checks import allowed


def parts(name: str, n: int, k: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight on the grid of ``name``, and its outliers."""
    torch.manual_seed(n + k)
    at = torch.rand(n, k) < density
    main = sample_weight(Format.parse(name), n, k)
    at[:, ::32] = False  # a group keeps its largest step
    return main.masked_fill(at, 0), torch.where(at, torch.randn(n, k).bfloat16(), 0).bfloat16()


@pytest.mark.parametrize("name", ["dense+int4g128", "dense+int8"])
@pytest.mark.parametrize(("n", "k", "density"), [(7, 300, 0.05), (5, 520, 0.3), (3, 40, 0.0), (9, 128, 1.0)])
def test_the_product_is_that_of_both_parts(name: str, n: int, k: int, density: float) -> None:
    main, outliers = parts(name, n, k, density)
    packed = pack_with_outliers(main, outliers, Format.parse(name), "test")
    chosen = family("dense")
    assert torch.equal(chosen.unpack(packed), main + outliers)
    bias = torch.randn(n).bfloat16()
    for loop, m in (("gemv", 1), ("gemv", 3), ("mma", 5)):
        x = torch.randn(m, k).bfloat16()
        expected = reference.linear(x, main + outliers, bias, "silu").float()
        for config in chosen.configs(packed, loop, m, 90)[:1]:
            y = torch.full((m, n), float("nan"), dtype=x.dtype)
            run(chosen.launches(packed, loop, Call(x, y, bias, "silu"), config))
            assert bool(((y.float() - expected).abs() <= allowed(x, main + outliers, bias)).all())


def test_an_outlier_takes_four_bytes() -> None:
    main, outliers = parts("dense+int4g128", 16, 1024, 0.02)
    packed = pack_with_outliers(main, outliers, Format.parse("dense+int4g128"), "test")
    plain = 16 * (1024 // 2 + 1024 // 128 * 2)
    assert packed.bytes == plain + 4 * int((outliers != 0).sum()) + 4 * 17


def test_a_place_in_both_parts_is_refused() -> None:
    main, outliers = parts("dense+int4g128", 4, 256, 0.0)
    outliers[2, 17] = 3.0
    with pytest.raises(PatternMismatch, match="row 2, column 17"):
        pack_with_outliers(main, outliers, Format.parse("dense+int4g128"), "test")
