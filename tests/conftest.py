"""Shared by all tests: goldens by test name, and records of a compilation made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.facts import Candidate, Decision, Range, Site, WeightFact
from sparsec.records import LayerRecord

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew; read the diff after")
    parser.addoption("--every-format", action="store_true", help="compile GPU kernels of every format for every GPU")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``golden(text)`` compares with ``tests/golden/<test name>.txt``. A golden is never a test's only witness."""

    def compare(text: str) -> None:
        name = re.sub(r"[^\w.-]+", "_", request.node.name)
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no {path.name}; run: pytest --update-golden {request.node.nodeid}"
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture
def layer_record() -> Callable[..., LayerRecord]:
    return make_layer_record


def make_layer_record(
    name: str,
    n: int = 384,
    k: int = 384,
    density: float = 0.5,
    format: str = "bitmap+fp32",
    reason: str = "reads 0.56x the bytes",
    pays_to: int | None = None,
    x_shape: tuple[int | str, ...] | None = None,
    fact: dict[str, Any] | None = None,
    **decision: Any,
) -> LayerRecord:
    """A layer as the pipeline would record it; times are a plain function of the shape, so texts are stable.

    ``pays_to``: the sparse format runs up to this M and dense above (None: at any M).
    """
    nnz = round(n * k * density)
    profile = WeightFact(
        key=f"{name}:{n}x{k}:{density}",
        n=n,
        k=k,
        dtype="fp32",
        nnz=nnz,
        row_nnz_min=nnz // n,
        row_nnz_max=-(-nnz // n),
        row_hist=tuple(n if i == min(int(density * 10), 9) else 0 for i in range(10)),
        zero_rows=0,
        zero_cols=0,
        negative_zeros=0,
        nonfinite=0,
        thumbnail=(round(100 * density),) * 256,
    )
    per_weight = 2e-10
    dense = f"{per_weight * n * k:.6g} + {per_weight * n * k / 8:.6g}*M"
    sparse = f"{per_weight * n * k * (density + 0.03):.6g} + {per_weight * n * k * density / 4:.6g}*M"
    candidates = [Candidate("dense", "", 4 * n * k, dense)]
    if density < 1:
        candidates.append(
            Candidate(format if format != "dense" else "bitmap+fp32", "dot", 4 * nnz + n * k // 8, sparse)
        )
    ranges = (Range(1, None, format, "" if format == "dense" else "dot", 0.0, 0.0),)
    if pays_to:
        ranges = (replace(ranges[0], m_hi=pays_to), Range(pays_to + 1, None, "dense", "", 0.0, 0.0))
    shape = x_shape or (1, 16, k)
    site = Site("linear", "linear", "w", "b", shape, n, k, "fp32", name)
    said = {"break_even": 0.62, **decision}
    return LayerRecord(
        name, site, replace(profile, **(fact or {})), Decision(ranges, reason, candidates=tuple(candidates), **said)
    )


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """No graph of another test, the same random numbers, and no gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
