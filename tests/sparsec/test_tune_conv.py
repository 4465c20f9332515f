"""Convolutions are tuned as what they are: on their own images, against PyTorch's convolution."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec.tune_cpu as cpu
from sparsec import targets
from sparsec.codegen.spec import Packed
from sparsec.facts import Conv
from sparsec.options import Policy
from sparsec.passes.decide.conv import CONV_MARGIN, conv_rates
from sparsec.passes.profile.weights import profile
from sparsec.runtime.direct import convolve
from sparsec.targets import reference
from sparsec.targets.base import DenseRate
from sparsec.tune import measured_for
from sparsec.tune_db import Database

PORTABLE = targets.resolve("cpu:portable")
WALK = Conv((3, 3), padding=(1, 1, 1, 1), image=(1, 14, 14))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(walk, shape of x) of every call; kernels are PyTorch's convolution, and rates are written down."""
    calls: list[tuple[Any, ...]] = []

    class Direct:
        def __init__(self, weight: torch.Tensor, spec: Any, target: Any, cache: Path, packed: Any, conv: Conv) -> None:
            self.weight, self.conv = weight, conv
            self.packed = packed or Packed(None, 1, (weight,), torch.empty(0), tuple(weight.shape), "")  # type: ignore[arg-type]

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            calls.append((self.conv, tuple(x.shape)))
            return convolve(x, self.weight, self.conv)

    def direct(weight: Any, spec: Any, target: Any, cache: Any, packed: Any = None, conv: Any = None) -> Direct:
        return Direct(weight, spec, target, cache, packed, conv)

    monkeypatch.setattr(cpu, "direct", direct)
    monkeypatch.setattr(cpu, "wait_for_cores", lambda threads: True)
    monkeypatch.setattr(cpu, "others_s", lambda: 0.0)
    monkeypatch.setattr(cpu, "rates_for", lambda *_: dataclasses.replace(reference.rates(1), overhead=0.0))
    monkeypatch.setattr(sys.modules["sparsec.tune"], "_process", {})
    return calls


def measured(cache: Path, walk: Conv, ms: tuple[int, ...]) -> dict[Any, Any]:
    weight = torch.randn(32, 9 * 16, generator=torch.Generator().manual_seed(0))
    weight = weight * (weight.abs() > 1.2)
    policy = Policy(tune="quick", cache_dir=str(cache), min_speedup=0.0)
    return measured_for(weight, profile(weight), "fp32", PORTABLE, policy, ms, "", walk)


def test_a_convolution_is_timed_on_its_own_images(tmp_path: Path, seen: list[tuple[Any, ...]]) -> None:
    found = measured(tmp_path, WALK, (196,))
    assert found
    assert {m for _, _, m in found} == {256}
    assert set(seen) == {(WALK, (1, 16, 14, 14))}
    records = Database(tmp_path).all()
    assert all(record.key.loop.endswith(f"@{WALK}") for record in records)


def test_another_walk_is_measured_for_itself_and_the_same_one_is_not(
    tmp_path: Path, seen: list[tuple[Any, ...]]
) -> None:
    measured(tmp_path, WALK, (196,))
    count = len(Database(tmp_path).all())
    measured(tmp_path, WALK, (196,))
    assert len(Database(tmp_path).all()) == count
    measured(tmp_path, dataclasses.replace(WALK, stride=(2, 2)), (49,))
    assert len(Database(tmp_path).all()) == 2 * count


def test_images_of_any_size_are_made_up_for_each_number_of_rows(tmp_path: Path, seen: list[tuple[Any, ...]]) -> None:
    found = measured(tmp_path, dataclasses.replace(WALK, image=()), (64, 256))
    assert {m for _, _, m in found} == {64, 256}
    assert {shape for _, shape in seen} == {(1, 16, 8, 8), (1, 16, 16, 16)}


def test_dense_convolutions_cost_what_was_measured_and_ours_gather_too() -> None:
    base = reference.rates(1)
    linear = {rate.dtype: rate for rate in base.dense}
    slow = DenseRate("fp32", tuple((m, 0.5 * dict(linear["fp32"].points)[m]) for m in (64, 256)))
    rates = dataclasses.replace(base, conv=(slow,), gather=1e-9)
    found = conv_rates(rates, WALK)
    points = dict(found.dense[0].points)
    assert points[64] == slow.points[0][1] / CONV_MARGIN
    assert points[256] == slow.points[1][1] / CONV_MARGIN
    assert 512 not in points
    assert points[1] == min(dict(linear["fp32"].points)[1], slow.points[0][1]) / CONV_MARGIN
    assert dict(found.dense[1].points)[256] == dict(linear["bf16"].points)[256] / CONV_MARGIN
    for old, new in zip(rates.kernels, found.kernels, strict=True):
        for (m, column, *rest), (n, other, *more) in zip(old.points, new.points, strict=False):
            assert (m, rest) == (n, more)
            assert other == pytest.approx(column + 1e-9 * m)
        (m, *last), (far, *proportional) = new.points[-2:]
        assert [far / m * value for value in last] == pytest.approx(proportional)
    assert conv_rates(rates, None) is rates
    assert conv_rates(rates, Conv((1, 1))) is rates
    assert conv_rates(rates, Conv((1, 1), stride=(2, 2))) is not rates
