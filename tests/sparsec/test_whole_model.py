"""Both engines on a whole model: bench and explain share the code, and the process stays as the user had it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from sparsec import whole_model
from sparsec.bench import BenchRecord
from sparsec.bench_worker import cases_of, time_case
from sparsec.errors import NoCompiler
from sparsec.explain import Explanation, explain, explain_with
from sparsec.models import LoadedModel, load_model
from sparsec.options import Options
from sparsec.runtime.store import STORE

OPTIONS: dict[str, Any] = {"target": "reference", "min_speedup": 0.0}


def pruned(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with nine of ten weights zero."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    for layer in layers:
        layer.weight.detach().mul_(torch.rand(layer.weight.shape) < 0.1)
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def measured(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    return explain(model, *args, options=OPTIONS, measure=True, **kwargs)


def both(model: nn.Module, make: whole_model.Make, **said: Any) -> whole_model.BothTimed:
    return whole_model.time_both(model, make, OPTIONS, **{"rounds": 3, **said})


def benched(loaded: LoadedModel, batch: int, tokens: int) -> list[BenchRecord]:
    job = {"prompts": [tokens], "gens": [], "batches": [batch], "options": OPTIONS, "rounds": 3, "warmup": True}
    said = {"sparsec_version": "", "build_commit": "", "torch_version": "", "cpu_info": "", "isa": "", "zeros": 0.0}
    common = {**said, "model_filename": "", "model_type": "", "model_size": 0, "model_n_params": 0, "dtype": "fp32"}
    (case,) = cases_of(loaded, job)
    return time_case(loaded, case, job, {**common, "n_threads": 1}, lambda what, share: None)


@pytest.mark.parametrize("name", ["tiny:bert@90", "tiny:llama@90"])
def test_bench_and_explain_time_the_same_engines_on_the_same_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(name)
    timed: list[whole_model.BothTimed] = []
    outputs: list[torch.Tensor] = []
    real = whole_model.time_both

    def spy(model: Any, make: whole_model.Make, options: Mapping[str, Any], **said: Any) -> whole_model.BothTimed:
        assert model is loaded.model
        assert options == OPTIONS
        outputs.append(make(model)()[0])
        timed.append(real(model, make, options, **said))
        return timed[-1]

    monkeypatch.setattr(whole_model, "time_both", spy)
    with torch.no_grad():
        dense, sparse = benched(loaded, 2, 8)
        report = explain_with(loaded.model, (), loaded.prompt(2, 8), Options.parse(OPTIONS), measure=True)
    assert [both.base for both in timed] == ["inductor", "inductor"]
    assert torch.equal(*outputs)
    of_bench, of_explain = ([(x.name, x.decision) for r in both.seen for x in r.layers] for both in timed)
    assert of_bench == of_explain
    assert any(decision.ranges[0].format != "dense" for _, decision in of_bench)
    assert (dense.backend, sparse.speedup_low, sparse.speedup_high) == (
        "inductor",
        timed[0].ratio.low,
        timed[0].ratio.high,
    )
    total, ratio = report.to_dict()["total"], timed[1].ratio
    assert total["speedup"] == pytest.approx(ratio.value, rel=1e-3)
    assert (total["low"], total["high"]) == (pytest.approx(ratio.low, rel=1e-3), pytest.approx(ratio.high, rel=1e-3))
    assert (total["base"], total["batch"]) == ("inductor", 2)


def test_without_a_compiler_the_base_is_eager_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise NoCompiler(tried="c++")

    monkeypatch.setattr(whole_model, "find_compiler", none)
    report = measured(pruned(64, 64), torch.randn(2, 64))
    assert report.to_dict()["total"]["base"] == "eager"
    assert "by eager PyTorch" in str(report)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("no room"), "MemoryError: no room"),
        (RuntimeError("first line\nand a page of it"), "RuntimeError: first line"),
    ],
)
def test_a_failure_to_measure_the_whole_is_a_note_and_the_layers_are_there(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(whole_model, "interleave", fail)
    report = measured(pruned(64, 64), torch.randn(2, 64))
    assert report.whole is None
    assert f"the whole model could not be measured: {said}" in report.notes
    assert report.measured() is not None
    assert report.to_dict()["total"] is None
    assert "the whole model could not be measured" in report.to_html()


def test_measuring_leaves_what_the_user_compiled_and_keeps_no_packs() -> None:
    model, x = pruned(64, 96, 64), torch.randn(2, 64)
    graphs: list[int] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(1)
        return gm.forward

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        for _ in range(3):
            assert measured(model, x).whole is not None
        compiled(x)
    assert len(graphs) == 1
    assert not {p._cdata for p in model.parameters()} & STORE._watched


def test_packs_of_a_model_that_runs_by_sparsec_survive_measuring() -> None:
    model, x = pruned(64, 96, 64), torch.randn(2, 64)

    def packs() -> set[int]:
        weights = {p._cdata for p in model.parameters()}
        return {id(pack) for (weight, _), held in STORE._held.items() if weight in weights for pack in held.packs}

    with torch.no_grad():
        torch.compile(model, backend="sparsec", options=OPTIONS)(x)
        before = packs()
        measured(model, x)
    assert len(before) == 2
    assert before <= packs()


def test_running_statistics_of_a_model_in_training_mode_stay_as_they_were() -> None:
    model = nn.Sequential(pruned(64, 64), nn.BatchNorm1d(64), nn.Dropout()).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = measured(model, torch.randn(8, 64))
    assert report.whole is not None
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert any("the outputs of the two engines differ by" in note and "training mode" in note for note in report.notes)


def test_outputs_are_compared_whatever_holds_them() -> None:
    class Wrapped(nn.Module):
        def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
            super().__init__()
            self.inner, self.wrap = pruned(64, 64), wrap

        def forward(self, x: torch.Tensor) -> Any:
            return self.wrap(self.inner(x))

    x = torch.randn(2, 64)
    for wrap in (lambda y: {"none": None, "all": [(1, y)]}, lambda y: None):
        timed = both(Wrapped(wrap), lambda call: lambda: call(x))
        assert timed.difference < 1e-4
        assert not timed.notes


def test_a_model_that_is_compiled_again_and_again_says_that_its_times_hold_compilation() -> None:
    def make(call: Callable[..., Any]) -> Callable[[], Any]:
        rows = itertools.count(2)
        return lambda: call(torch.ones(next(rows), 64))[0]

    timed = both(pruned(64, 64), make, warmup=1)
    assert whole_model.AGAIN in timed.notes


def test_options_are_said_again_as_they_were_parsed() -> None:
    for said in ({}, {"formats": ["nm:2:4", "bitmap"], "tune": "quick"}, {**OPTIONS, "inductor": {"freezing": False}}):
        assert Options.parse(Options.parse(said).to_dict()) == Options.parse(said)
    assert Options.parse({"tune": "off"}).to_dict() == {}
