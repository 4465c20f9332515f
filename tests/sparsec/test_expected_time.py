"""Seconds of imagined weights: the plan's own, on the target whose costs are fixed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsec import sparsify
from sparsec.expected_time import seconds_of
from sparsec.options import Policy
from sparsec.passes.decide import decide
from sparsec.passes.profile.weights import profile
from sparsec.targets import reference, resolve


def test_times_are_those_of_the_decision_and_never_rise_with_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {"wide": torch.ones(1024, 512), "small": torch.ones(16, 16)}
    seconds = seconds_of(layers, "reference")
    for name in layers:
        times = [seconds(name, i / 50) for i in range(50)]
        assert times == sorted(times, reverse=True)
    assert seconds("small", 0.9) == seconds("small", 0.0)  # a call costs more than sparsity saves
    assert seconds("wide", 0.9) < 0.5 * seconds("wide", 0.0)
    weight = torch.randn(1024, 512, generator=generator)
    weight.view(-1)[torch.randperm(weight.numel(), generator=generator)[: int(0.8 * weight.numel())]] = 0
    decision = decide(profile(weight), "fp32", resolve("reference"), reference.rates(1), Policy())
    ran = decision.at(1)
    assert ran.format != "dense"
    assert seconds("wide", 0.8) == pytest.approx(ran.ours_s, rel=0.02)


def test_a_share_of_whole_percents_is_taken_at_its_own_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.expected_time._decided", lambda n, k, dtype, percent, known, rows: -float(percent))
    seconds = seconds_of({"x": torch.ones(64, 64)}, "reference")
    assert [seconds("x", percent / 100) for percent in range(100)] == [-(percent // 2 * 2) for percent in range(100)]


def test_more_rows_take_longer_and_an_unknown_dtype_gains_nothing() -> None:
    layers = {"x": torch.ones(256, 256), "half": torch.ones(256, 256, dtype=torch.float16)}
    assert seconds_of(layers, "reference", rows=64)("x", 0.0) > seconds_of(layers, "reference")("x", 0.0)
    assert seconds_of(layers, "reference")("half", 0.9) == seconds_of(layers, "reference")("half", 0.0)


def test_the_time_allocator_leaves_layers_dense_that_gain_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 16))
    data = [torch.randn(64, 512) for _ in range(70)]
    recipe = [{"method": "time", "target": "reference", "sparsity": 0.7}, {"method": "wanda", "ignore": []}]
    report = sparsify(model, recipe, data, progress=False)
    achieved = {layer.name: layer.achieved for layer in report.layers}
    assert achieved["4"] == 0.0  # 16x16: no kernel is faster than dense
    assert achieved["0"] >= 0.69
