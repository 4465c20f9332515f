"""What a walk holds: one whole forward where that is enough, one reduction an input, and nothing afterwards."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from sparsec import blockwise, sparsify
from sparsec.blockwise import Walk, collect, find_blocks
from sparsec.errors import NonFinite, SparsecWarning
from sparsec.passes.masks.block import LayerState
from sparsec.passes.masks.statistics import Collector
from sparsec.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens.*:sparsec.errors.SparsecWarning")


class Pair(nn.Module):
    """Two layers; ``same`` says on which call they read one tensor."""

    def __init__(self, same: list[Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.same, self.count = same, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same = self.same[self.count % len(self.same)]
        self.count += 1
        y: torch.Tensor = self.a(x)
        if same is None:
            return y
        return y + self.b(x if same else 2 * x)  # type: ignore[no-any-return]


def made_of(model: Pair, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    rows: list[int] = []
    add = Collector.add

    def counted(self: Collector, x: torch.Tensor) -> None:
        rows.append(len(x))
        add(self, x)

    monkeypatch.setattr(Collector, "add", counted)

    def forward() -> None:
        for batch in batches:
            model(batch)

    found = collect({"a": model.a, "b": model.b}, ("sum_x2", "tokens"), forward)
    return found, len(rows)


@pytest.mark.parametrize(
    ("same", "adds"),
    [
        ([True, True, True], 3),  # shared
        ([False, False, False], 6),  # each its own
        ([True, True, False], 3 + 6),  # they part: once more, apart
        ([True, None, True], 3 + 5),  # b is left out once
        ([None, True, True], 3 + 2),  # b comes later: never together
    ],
)
def test_statistics_are_shared_only_by_layers_that_always_read_one_tensor(
    same: list[Any], adds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 6, generator=generator) for _ in range(3)]
    found, count = made_of(Pair(same), batches, monkeypatch)
    scale = {True: 1.0, False: 2.0, None: 0.0}
    for name, factors in (("a", [1.0] * 3), ("b", [scale[s] for s in same])):
        expected = sum((f * x).double().square().sum(0) for f, x in zip(factors, batches, strict=True))
        torch.testing.assert_close(found[name]["sum_x2"].double(), expected, rtol=1e-6, atol=0)
        assert int(found[name]["tokens"]) == 5 * sum(f > 0 for f in factors)
    assert count == adds
    assert found["a"] is not found["b"]


def test_an_input_changed_in_place_between_two_layers_is_not_the_same_input() -> None:
    class Doubles(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(x)
            return y + self.b(x.mul_(2))  # type: ignore[no-any-return]

    model, x = Doubles([True]), torch.ones(5, 6)
    found = collect({"a": model.a, "b": model.b}, ("sum_x2",), lambda: model(x.clone()))
    assert found["a"]["sum_x2"].tolist() == [5.0] * 6
    assert found["b"]["sum_x2"].tolist() == [20.0] * 6


class Counted(nn.Module):
    """A block that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) + bias  # type: ignore[no-any-return]


class Chain(nn.Module):
    def __init__(self, depends: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.depends, self.ends = nn.ModuleList(Counted() for _ in range(3)), depends, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = x.mean(0)
        for layer in self.layers:
            x = layer(x, bias=bias)
            if self.depends:
                bias = x.mean(0)
        self.ends += 1
        return x


@pytest.mark.parametrize("depends", [False, True])
def test_other_batches_skip_the_blocks_only_where_their_arguments_do_not_depend_on_them(depends: bool) -> None:
    model = Chain(depends)
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(6, 4, generator=generator)} for _ in range(5)]
    with torch.no_grad():
        expected = [model(**sample) for sample in data]
    found = find_blocks(model, [f"layers.{i}.linear" for i in range(3)])
    for layer in model.layers:
        layer.count = 0  # type: ignore[assignment]
    model.ends = 0
    walk = Walk(model, found, data)
    computed = [layer.count for layer in model.layers]
    assert computed == ([5, 5, 5] if depends else [1, 1, 1])
    assert model.ends == (5 if depends else 1)
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    outputs = [list(run.outputs()) for run in walk]
    assert all(torch.equal(a, b) for a, b in zip(outputs[-1], expected, strict=True))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_nothing_of_a_block_is_held_after_the_walk(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By reference counts alone: a cycle would keep a block's copies until the collector happens to run."""
    alive = _watched(monkeypatch)
    model = tiny_model("tiny:llama").model
    gc.disable()
    try:
        sparsify(model, method, [torch.arange(i, i + 24)[None] for i in range(4)], progress=False)
        assert len(alive) > 20
        assert not [what for what in alive if what() is not None]
    finally:
        gc.enable()


def test_nothing_of_a_block_is_held_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = _watched(monkeypatch)
    model = tiny_model("tiny:llama").model
    with torch.no_grad():
        model.get_submodule("model.layers.1.input_layernorm").weight.fill_(float("inf"))  # type: ignore[operator, union-attr]
    gc.disable()
    try:
        with pytest.warns(SparsecWarning, match="stopped at"):
            _refused(model)
        assert len(alive) > 10
        assert not [what for what in alive if what() is not None]
    finally:
        gc.enable()


def _refused(model: nn.Module) -> None:
    try:
        sparsify(model, "sparsegpt", [torch.arange(i, i + 24)[None] for i in range(4)], progress=False)
    except NonFinite:  # and its traceback is gone with this frame
        return
    raise AssertionError("it was not refused")


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Weak references to every block run, every fp32 copy of a weight and every collector that a run makes."""
    alive: list[weakref.ref[Any]] = []
    for cls in (blockwise.BlockRun, LayerState, Collector):

        def init(self: Any, *args: Any, own: Any = cls.__init__, **kwargs: Any) -> None:
            own(self, *args, **kwargs)
            alive.append(weakref.ref(self))
            if isinstance(self, LayerState):
                alive.append(weakref.ref(self.dense))

        monkeypatch.setattr(cls, "__init__", init)
    return alive
