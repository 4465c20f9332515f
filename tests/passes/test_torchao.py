"""Weights that torchao has quantised. Skipped where torchao is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

torchao = pytest.importorskip("torchao.quantization")
FORCED: dict[str, Any] = {"min_speedup": 0, "formats": ["bitmap"]}


pytestmark = pytest.mark.usefixtures("fresh_graphs")


def made(config: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    for layer in (model[0], model[2]):
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.8)
    torchao.quantize_(model, config)
    return model


def test_int8_weights_are_packed_from_their_codes_and_give_the_same() -> None:
    from sparsec import records

    model, x = made(torchao.Int8WeightOnlyConfig()), torch.randn(5, 64)
    expected = model(x)
    with records.recording() as seen:
        found = torch.compile(model, backend="sparsec", options=FORCED)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    layers = [layer for record in seen for layer in record.layers]
    assert len(layers) == 2
    assert all(layer.site.w and layer.decision.ours for layer in layers)
    assert not [record.failure for record in seen if record.failure]


def test_a_new_scale_is_noticed() -> None:
    model, x = made(torchao.Int8WeightOnlyConfig()), torch.randn(5, 64)
    run = torch.compile(model, backend="sparsec", options=FORCED)
    run(x)
    model[0].weight.scale.mul_(3)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_dynamic_inputs_of_torchao_stay_with_it_and_say_why() -> None:
    from sparsec import records

    model, x = made(torchao.Int8DynamicActivationInt8WeightConfig()), torch.randn(5, 64)
    with records.recording() as seen:
        found = torch.compile(model, backend="sparsec", options=FORCED)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-3)
    assert all("127.5" in d.reason for record in seen for d in record.declined)
    assert sum(len(record.declined) for record in seen) == 2
