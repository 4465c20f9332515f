"""Explanations of real (small) models, through capture, profile and decision, and the command line on top.

The reference target's rates are fixed, so decisions are the same on every machine.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec.cli import run
from sparsec.errors import BadOptionValue, UnknownOption
from sparsec.explain import Explanation, explain
from sparsec.models import load_model
from sparsec.report_data import Measured

REFERENCE = {"target": "reference"}


def prune(model: nn.Module, share: float, keep: str = "") -> nn.Module:
    """Zero the smallest weights of every linear, but for layers whose name holds ``keep``."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (keep and keep in name):
            w = module.weight.detach()
            w[w.abs() <= w.abs().flatten().kthvalue(int(share * w.numel())).values] = 0
    return model


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])


@torch.no_grad()
def of(model: nn.Module, x: torch.Tensor, **said: Any) -> Explanation:
    return explain(model, x, options=REFERENCE, **said)


@pytest.mark.parametrize(("name", "layers"), [("llama", 15), ("gpt2", 9), ("bert", 13)])
def test_every_linear_layer_of_a_transformer_is_in_the_table_with_a_reason(name: str, layers: int) -> None:
    loaded = load_model(f"tiny:{name}@80")
    with torch.no_grad():
        report = explain(loaded.model, options=REFERENCE, batch=[1, 8], **loaded.inputs(1, 16))
    assert not report.failures
    assert len(report.layers) == layers
    modules = dict(loaded.model.named_modules())
    for layer in report.layers:
        weight = modules[layer.name].weight.detach()
        assert layer.reason
        assert weight.numel() == layer.shape[0] * layer.shape[1]
        assert layer.density == pytest.approx(float((weight != 0).float().mean()))
        assert layer.measured is None
        assert layer.expected is not None
        assert layer.expected.speedup >= 1.0
        assert layer.rows in (1, 16)
    assert any(layer.decision != "dense" for layer in report.layers)
    assert max(map(len, str(report).splitlines())) <= 120


def test_the_model_is_left_as_it_was() -> None:
    model = prune(mlp(64, 128, 64), 0.8)
    before = copy.deepcopy(model.state_dict())
    of(model, torch.randn(4, 64))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert type(model.forward).__name__ == "method"


class Breaks(nn.Module):
    """A forward that Dynamo compiles in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


def test_looking_often_neither_runs_dry_nor_uses_up_the_compilations_of_the_user() -> None:
    torch._dynamo.reset()
    for model in (mlp(64, 64), Breaks()):
        seen = [len(of(model, torch.randn(1, 64)).layers) for _ in range(10)]
        assert seen == [len(list(model.parameters())) // 2] * 10
        compiled: list[int] = []

        def backend(gm: torch.fx.GraphModule, _: Any, compiled: list[int] = compiled) -> Callable[..., Any]:
            compiled.append(1)
            return gm.forward

        with torch.no_grad():
            torch.compile(model, backend=backend)(torch.randn(1, 64))
        assert compiled


def test_other_sizes_than_last_time_are_still_numbers() -> None:
    model = mlp(64, 64)
    assert [of(model, torch.randn(1, rows, 64)).layers[0].rows for rows in (4, 8, 16)] == [4, 8, 16]


def test_both_sides_of_a_graph_break_are_in_one_report() -> None:
    report = of(prune(Breaks(), 0.9), torch.randn(1, 64))
    assert [layer.name for layer in report.layers] == ["a", "b"]


def test_sparse_layers_run_sparse_and_dense_ones_are_told_what_pruning_them_brings() -> None:
    model = prune(mlp(512, 1024, 512), 0.9, keep="2")
    report = of(model, torch.randn(1, 512))
    decisions = {layer.name: layer.decision for layer in report.layers}
    assert decisions["0"] != "dense"
    assert decisions["2"] == "dense"
    assert any(" on 2 (now 0 % zero): " in text for text in report.helps)
    total = report.expected()
    assert total is not None
    assert total.speedup > 1.2


def test_break_even_is_where_the_decision_flips() -> None:
    from sparsec.report_help import break_even_at, decider, pruned

    report = of(mlp(512, 512), torch.randn(32, 512))
    layer, decide = report.layers[0], decider(report)
    assert decide is not None
    share = break_even_at(layer.record.fact, layer.record.site, 32, decide)
    assert share == layer.at[0].break_even
    assert share is not None
    assert decide(pruned(layer.record.fact, share), layer.record.site).at(32).format != "dense"
    assert decide(pruned(layer.record.fact, share - 0.01), layer.record.site).at(32).format == "dense"
    assert f"break-even is {100 * share:.0f} % zero at 32 rows" in layer.reason


def test_gradients_on_are_named_first_and_the_report_shows_the_case_without() -> None:
    model = prune(mlp(64, 64), 0.9)
    report = explain(model, torch.randn(2, 64), options=REFERENCE)
    assert len(report.layers) == 1
    assert "torch.no_grad()" in report.notes[0]
    assert str(report).splitlines()[4].startswith("  ! gradients are on here")


def test_a_model_without_a_linear_layer_gives_a_report_that_says_so() -> None:
    report = of(nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), torch.randn(2, 8))
    assert not report.layers
    assert "no linear layer was found" in str(report)


def test_operations_that_are_not_taken_are_listed_with_their_reason() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.w * 2) @ x.transpose(0, 1)

    report = of(Gate(), torch.randn(8, 8))
    reasons = [refusal.reason for refusal in report.not_taken]
    assert any("computed in the graph" in reason for reason in reasons)
    assert sum(refusal.count for refusal in report.not_taken) == 2
    assert all(refusal.reason in str(report) for refusal in report.not_taken if len(refusal.reason) < 60)


def test_a_model_that_raises_gives_a_report_with_its_own_error() -> None:
    report = of(mlp(8, 8), torch.randn(2, 9))
    assert "the model itself raises RuntimeError on these inputs: mat1 and mat2 shapes" in report.failures[0]
    assert "next: give inputs that the model takes" in str(report)


def test_a_failure_of_a_stage_is_named_and_leads_to_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.runtime.store import Store

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(Store, "profiled", broken)
    report = of(mlp(8, 8), torch.randn(2, 8))
    assert report.failures == ("profile: ZeroDivisionError: no rows",)
    assert "next: sparsec doctor" in str(report)


def test_a_weight_with_nan_stays_dense_and_has_no_break_even() -> None:
    model = prune(mlp(64, 64), 0.9)
    model[0].weight.detach()[0, 0] = float("nan")  # type: ignore[index]
    layer = of(model, torch.randn(4, 64)).layers[0]
    assert layer.decision == "dense"
    assert "NaN" in layer.reason
    assert "no break-even while they are there" in layer.reason


def test_autocast_is_named_as_the_reason() -> None:
    with torch.autocast("cpu"):
        text = str(of(mlp(8, 8), torch.randn(2, 8)))
    assert "autocast is on" in text
    assert "no linear layer can be taken; the reasons are below" in text


def test_wrong_options_raise_and_name_the_nearest() -> None:
    with pytest.raises(UnknownOption, match="formats"):
        explain(mlp(8, 8), torch.randn(1, 8), options={"format": "nm"})


def test_a_model_that_is_compiled_already_is_looked_at_as_it_was() -> None:
    model = prune(mlp(64, 64), 0.9)
    assert [layer.name for layer in of(torch.compile(model), torch.randn(1, 64)).layers] == ["0"]


def test_measuring_fills_measured_times_and_leaves_expected_ones() -> None:
    model = prune(mlp(256, 256, 256, 64), 0.9, keep="2")
    x = torch.randn(1, 256)
    expected = of(model, x)
    report = of(model, x, measure=True)
    assert all(layer.measured is not None for layer in report.layers)
    assert [layer.expected for layer in report.layers] == [layer.expected for layer in expected.layers]
    dense = next(layer for layer in report.layers if layer.name == "2")
    assert dense.measured is not None
    assert dense.measured.speedup == 1.0
    assert report.whole is not None
    assert report.whole.base == "inductor"
    assert "were timed here" in str(report)
    assert report.to_dict()["layers"][0]["measured"]["low"] <= report.to_dict()["layers"][0]["measured"]["high"]


def test_times_of_a_busy_machine_are_called_that() -> None:
    from sparsec.report_measure import busy

    report = of(prune(mlp(64, 64), 0.9), torch.randn(1, 64))
    cost = report.expected()
    assert cost is not None

    def timed(dense: float, ours: float) -> bool:
        at = report.layers[0].at[0]
        measured = Measured(dense * cost.dense_s, ours * cost.ours_s)
        return busy(cost, [replace(report.layers[0], at=(replace(at, measured=measured),))])

    assert [timed(1, 1), timed(2, 5), timed(4, 1), timed(1, 20)] == [False, False, True, True]


def test_the_weight_that_is_timed_is_the_weight_of_the_layer() -> None:
    from sparsec.report_measure import find

    loaded = load_model("tiny:gpt2@80")
    with torch.no_grad():
        report = explain(loaded.model, options=REFERENCE, **loaded.inputs(1, 4))
    modules = dict(loaded.model.named_modules())
    for layer in report.layers:
        found = find(loaded.model, layer)
        assert found is not None
        stored = modules[layer.name].weight.detach()
        assert torch.equal(found.weight, stored.t() if layer.record.site.transposed else stored)
        assert (found.bias is None) == (layer.record.site.bias is None)
    assert any(layer.record.site.transposed for layer in report.layers)


def test_the_text_is_beside_inductors_files_when_torch_traces() -> None:
    payloads: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            artifact = getattr(record, "metadata", {}).get("artifact", {})
            if artifact:
                payloads[artifact["name"]] = record.payload  # type: ignore[attr-defined]

    trace, handler = logging.getLogger("torch.__trace"), Collect()
    level = trace.level
    trace.addHandler(handler)
    trace.setLevel(logging.DEBUG)
    try:
        report = of(mlp(64, 64), torch.randn(1, 64))
    finally:
        trace.removeHandler(handler)
        trace.setLevel(level)
    assert payloads["sparsec_explain"] == str(report)


def test_the_public_name_is_this_function() -> None:
    assert sparsec.explain is explain


# ------------------------------------------------------------------------------------------------- the command

COMMAND = ["explain", "tiny:llama@80", "--tokens", "8", "--options", '{"target": "reference", "min_speedup": 0}']


def test_json_alone_is_on_stdout_and_equals_the_block_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    assert run([*COMMAND, "--batch", "1,4", "--json", "--html", str(page)]) == 0
    body = json.loads(capsys.readouterr().out)
    block = page.read_text().partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(block) == body
    assert body["batch"] == [1, 4]
    assert [layer["name"] for layer in body["layers"] if not layer["reason"]] == []
    assert [at["rows"] for at in body["layers"][0]["batches"]] == [8, 32]
    assert [at["rows"] for at in body["layers"][-1]["batches"]] == [1, 4]  # the head, of the last token alone


def test_the_table_goes_to_stdout_without_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(COMMAND) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "model.layers.0,1.mlp.down_proj" in out
    assert "next: sparsec explain tiny:llama@80 --batch 1 --tokens 8 --measure" in out


def test_two_models_are_compared_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--compare", "tiny:llama"]) == 0
    out = capsys.readouterr().out
    assert "compared with" in out
    assert "zero 0 % -> 80 %" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny:llama", "--batch", "0"], "batch"),
        (["tiny:llama", "--batch", "a"], "1,16,512"),
        (["tiny:llama", "--tokens", "0"], "tokens"),
        (["tiny:llama", "--options", "{"], "not JSON"),
        (["tiny:llama", "--options", '{"format": "nm"}'], "did you mean 'formats'"),
        (["no/such/folder/here"], "no model at"),
        (["tiny:llama", "--html", "/no/such/folder/r.html"], "folder"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_the_log_of_a_compilation_is_the_table(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEC_LOG", "explain")
    torch._dynamo.reset()
    model = prune(mlp(64, 64), 0.9)
    with torch.no_grad():
        torch.compile(model, backend="sparsec", options=REFERENCE)(torch.randn(1, 64))
    assert "one compiled graph" in capfd.readouterr().err


def test_batches_of_the_call_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadOptionValue, match="batch"):
        of(mlp(8, 8), torch.randn(1, 8), batch=[1, True])
