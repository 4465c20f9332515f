"""Recipes with data on a two-block model: every kind of step, resuming to the same bits, failures that lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sparsec import sparsify
from sparsec.errors import (
    BadRecipe,
    NonFinite,
    OtherRun,
    SparsecWarning,
    UnprunableLayer,
    UnreadableCalibration,
    Unsavable,
)
from sparsec.io import save
from sparsec.passes.masks import METHODS
from sparsec.passes.masks.contract import Statistics
from sparsec.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens.*:sparsec.errors.SparsecWarning")


def llama() -> nn.Module:
    return tiny_model("tiny:llama").model


def tokens(count: int = 4, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (1, length), generator=generator) for _ in range(count)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


RECIPES: dict[str, tuple[object, float]] = {
    "wanda": ({"method": "wanda", "sparsity": 0.5}, 0.5),
    "wanda 2:4": ({"method": "wanda", "pattern": "2:4"}, 0.5),
    "sparsegpt": ({"method": "sparsegpt", "sparsity": 0.6}, 0.6),
    "sparsegpt in order": ({"true_sequential": True, "steps": [{"method": "sparsegpt", "pattern": "4:8"}]}, 0.5),
    "dense statistics": ({"propagate_error": False, "steps": [{"method": "ria", "sparsity": 0.5}]}, 0.5),
    "gradients": ({"method": "gblm", "sparsity": 0.5}, 0.5),
    "owl": ([{"method": "owl", "sparsity": 0.7}, "wanda"], 0.7),
    "owl for N:M": ([{"method": "owl", "flat": 1.0}, {"method": "magnitude", "pattern": "8:16"}], 0.5),
    "besa": ([{"method": "besa", "epochs": 1}, "wanda"], 0.5),
    "repairs": (["magnitude", "reconstruct", "variance"], 0.5),
    "equalize": (["equalize", {"method": "ria", "pattern": "2:4"}], 0.5),
    "outliers": ({"method": "ria", "pattern": "8:16", "outliers": "16:256"}, 0.4375),
    "repairs without data": (["magnitude", "variance"], 0.5),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reaches_its_sparsity_and_runs_again_to_the_same_bits(name: str) -> None:
    recipe, sparsity = RECIPES[name]
    model = llama()
    report = sparsify(model, recipe, tokens(), progress=False)
    assert report.achieved == pytest.approx(sparsity, abs=0.004)
    assert len(report.layers) == 14
    seen = name != "repairs without data"
    assert all((layer.output_error is not None and 0 < layer.output_error < 1) == seen for layer in report.layers)
    again = llama()
    second = sparsify(again, report.recipe.to_dict(), tokens(), progress=False)
    assert same(weights(model), weights(again))
    assert second.recipe.sha == report.recipe.sha
    assert not model.training


def test_each_method_is_best_at_what_it_minimises() -> None:
    def run(recipe: object) -> tuple[float, float]:
        """Mean error of the outputs, mean error of the weights."""
        layers = sparsify(llama(), recipe, tokens(16), progress=False).layers
        return tuple(sum(getattr(x, key) or 0.0 for x in layers) / len(layers) for key in ("output_error", "error"))  # type: ignore[return-value]

    refitted, wanda, sparsegpt = run(["magnitude", "reconstruct"]), run("wanda"), run("sparsegpt")
    magnitude = run("magnitude")
    assert sparsegpt[0] < wanda[0]
    assert sparsegpt[0] < refitted[0]
    assert magnitude[1] < min(wanda[1], sparsegpt[1], refitted[1])


def test_layers_outside_the_blocks_are_pruned_with_the_inputs_they_see() -> None:
    model = llama()
    report = sparsify(model, {"method": "wanda", "ignore": []}, tokens(), progress=False)
    head = next(layer for layer in report.layers if layer.name == "lm_head")
    assert head.achieved == pytest.approx(0.5, abs=0.01)
    assert head.output_error
    assert report.layers[-1] is head


@pytest.mark.parametrize("repair", ["reconstruct", "ebft", "barber"])
def test_layers_outside_the_blocks_are_repaired_too(repair: str) -> None:
    model = llama()
    report = sparsify(model, {"steps": [{"method": "wanda", "targets": ["lm_head"], "ignore": []}, repair]}, tokens(8))
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert report.achieved == pytest.approx(0.5, abs=0.01)


class Experts(nn.Module):
    """Two experts, of which one never gets a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)  # type: ignore[no-any-return]


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_says_so() -> None:
    model = Experts()
    dense = weights(model)
    report = sparsify(model, "wanda", [torch.randn(4, 16)], progress=False)
    unseen = next(layer for layer in report.layers if layer.name == "experts.1")
    assert "no token reached it: pruned by magnitude" in unseen.notes
    kept = model.experts[1].weight != 0
    assert kept.sum(1).tolist() == [8] * 16
    rows = dense["experts.1.weight"].abs()
    assert bool((rows.masked_fill(~kept, 9.0).amin(1) >= rows.masked_fill(kept, 0.0).amax(1)).all())


class Gated(nn.Module):
    """A stack whose second block only gets zeros in one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2))
        nn.init.constant_(self.layers[1][0].bias, -100.0)  # type: ignore[index, arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("method", ["sparsegpt", "pgb", "proximal"])
def test_a_layer_that_only_saw_zeros_is_pruned_by_magnitude_and_says_so(method: str) -> None:
    model = Gated()
    dense = weights(model)
    recipe = {"method": method, **({"pattern": "2:4"} if method == "proximal" else {})}
    report = sparsify(model, recipe, [torch.randn(64, 16)], progress=False)
    told = {layer.name: "all of its inputs were zero: pruned by magnitude" in layer.notes for layer in report.layers}
    assert told == {"layers.0.0": False, "layers.0.2": False, "layers.1.0": False, "layers.1.2": True}
    new = weights(model)["layers.1.2.weight"]
    kept = new != 0
    assert int(kept.sum()) == 128
    assert torch.equal(new[kept], dense["layers.1.2.weight"][kept])


@pytest.mark.parametrize(
    "steps",
    [["besa", "wanda"], ["wanda", "ebft"], ["gblm"], ["minillm"], ["equalize", "wanda"], ["permute", "magnitude"]],
)
def test_what_inference_mode_does_not_allow_is_refused_before_anything_changes(steps: list[str]) -> None:
    with torch.inference_mode():
        model = llama()
    dense = {name: value.clone() for name, value in weights(model).items()}
    with pytest.raises(UnprunableLayer, match=r"made in inference mode, where [a-z]+ can neither learn nor fold"):
        sparsify(model, steps, tokens(), progress=False)
    assert same(weights(model), dense)
    assert sparsify(model, ["wanda", "variance"], tokens(), progress=False).achieved == 0.5


def test_groups_of_a_block_need_no_data_where_its_steps_need_none() -> None:
    recipe = {"true_sequential": True, "steps": ["magnitude", "variance"]}
    assert sparsify(Gated(), recipe, progress=False).achieved == 0.5


def test_activations_that_are_not_finite_are_refused_and_change_nothing_there() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[2].bias.fill_(0.0)
        model[0].bias.fill_(float("inf"))
    dense = weights(model)
    with pytest.warns(SparsecWarning, match="stopped at 2: 1 of 2"), pytest.raises(NonFinite, match="2"):
        sparsify(model, "wanda", [torch.randn(2, 8) for _ in range(40)], progress=False)
    assert torch.equal(model[2].weight, dense["2.weight"])
    with pytest.raises(UnreadableCalibration, match="NaN or infinite"):
        sparsify(model, "wanda", [torch.full((2, 8), float("nan"))], progress=False)


@dataclass(frozen=True)
class Breaks:
    """Breaks at the first layer of the second block."""

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    scope: ClassVar[str] = "row"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "none"
    cost: ClassVar[str] = "none"
    calls: ClassVar[list[int]] = []
    stop: ClassVar[int] = 10

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        self.calls.append(1)
        if len(self.calls) == self.stop:
            raise MemoryError("no more")
        return weight.abs() * stats["sum_x2"].sqrt()


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setitem(METHODS, "breaks", f"{__name__}:Breaks")

    def at(call: int) -> None:
        Breaks.calls.clear()
        monkeypatch.setattr(Breaks, "stop", call)

    return at


def test_a_failure_inside_a_block_leaves_it_as_it_was_and_names_it(breaks: Callable[[int], None]) -> None:
    breaks(10)
    model = llama()
    dense = weights(model)
    with (
        pytest.warns(SparsecWarning, match=r"stopped at model\.layers\.1: 7 of 14 layers are pruned"),
        pytest.raises(MemoryError),
    ):
        sparsify(model, "breaks", tokens(), progress=False)
    now = weights(model)
    changed = {name for name in dense if not torch.equal(dense[name], now[name])}
    assert len(changed) == 7
    assert all(name.startswith("model.layers.0.") for name in changed)


def test_a_run_that_broke_goes_on_where_it_was_to_the_same_bits(breaks: Callable[[int], None], tmp_path: Path) -> None:
    breaks(99)
    whole = llama()
    report = sparsify(whole, "breaks", tokens(), progress=False)
    breaks(10)
    with pytest.warns(SparsecWarning), pytest.raises(MemoryError):
        sparsify(llama(), "breaks", tokens(), progress=False, resume=tmp_path)
    with pytest.raises(OtherRun, match="recipe"):
        sparsify(llama(), {"method": "breaks", "sparsity": 0.6}, tokens(), progress=False, resume=tmp_path)
    with pytest.raises(OtherRun, match="data"):
        sparsify(llama(), "breaks", tokens(3), progress=False, resume=tmp_path)
    breaks(99)
    model = llama()
    resumed = sparsify(model, "breaks", tokens(), progress=False, resume=tmp_path)
    assert len(Breaks.calls) == 7  # the second block only
    assert same(weights(model), weights(whole))
    assert [r.to_dict() for r in resumed.layers] == [r.to_dict() for r in report.layers]


def test_a_killed_command_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and reads " * 400)
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        import torch
        from sparsec import sparsify
        from sparsec.journal import Journal
        from sparsec.tiny import tiny_model
        out, kill = sys.argv[1], sys.argv[2] == "kill"
        saved = Journal.save
        def save(self, *args):
            saved(self, *args)
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
        Journal.save = save
        data = [torch.arange(i, i + 24)[None] for i in range(4)]
        model = tiny_model("tiny:llama").model
        sparsify(model, "sparsegpt", data, progress=False, resume=out + ".journal")
        torch.save(model.state_dict(), out)
        """)
    )

    def run(out: str, how: str) -> int:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(tmp_path / out), how], env=environment, timeout=300
        ).returncode

    assert run("killed.pt", "kill") == -signal.SIGKILL
    assert not (tmp_path / "killed.pt").exists()
    assert run("killed.pt", "go on") == 0
    assert run("whole.pt", "go on") == 0
    killed, whole = (torch.load(tmp_path / name) for name in ("killed.pt", "whole.pt"))
    assert same(killed, whole)


def test_data_is_asked_for_before_anything_changes() -> None:
    model = llama()
    dense = weights(model)
    with pytest.raises(BadRecipe, match="wanda needs calibration data"):
        sparsify(model, "wanda", progress=False)
    assert same(weights(model), dense)


def test_a_model_in_bf16_keeps_its_dtype_and_its_statistics_are_fp32() -> None:
    model: Any = llama().to(torch.bfloat16)
    report = sparsify(model, "sparsegpt", tokens(), progress=False)
    assert report.achieved == pytest.approx(0.5, abs=0.004)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_structured_step_leaves_a_smaller_model_that_runs_and_is_told() -> None:
    model = llama()
    before = sum(p.numel() for p in model.parameters())
    report = sparsify(
        model, {"method": "bonsai", "sparsity": 0.25, "rounds": 1, "samples": 8}, tokens(), progress=False
    )
    after = sum(p.numel() for p in model.parameters())
    assert report.structured is not None
    assert (report.structured.parameters_before, report.structured.parameters_after) == (before, after)
    assert after < before
    assert report.achieved == pytest.approx(0.25, abs=0.05)
    text = str(report)
    assert "neurons left" in text
    assert f"{before} before, {after} after" in text
    assert report.to_dict()["structured"]["parameters_after"] == after
    with torch.no_grad():
        assert model(tokens()[0]).logits.isfinite().all()
    with pytest.raises(BadRecipe, match="stands alone"):
        sparsify(llama(), ["bonsai", "wanda"], tokens(), progress=False)
    with pytest.raises(BadRecipe, match="finds no heads or neurons"):
        sparsify(nn.Sequential(nn.Linear(8, 8)), "bonsai", [torch.randn(64, 8)], progress=False)


def test_a_result_that_no_checkpoint_can_hold_is_not_written(tmp_path: Path) -> None:
    model = llama()
    recipe = {"method": "slicegpt", "sparsity": 0.25, "rotation": "block", "allow_growth": True}
    report = sparsify(model, recipe, tokens(64), progress=False)
    assert report.structured is not None
    assert report.structured.unsaved
    with pytest.raises(Unsavable, match="no checkpoint was written"):
        save(model, tmp_path / "out", report)
    assert not (tmp_path / "out").exists()
    two = sparsify(llama(), ["owl", "wanda", {"method": "magnitude", "sparsity": 0.6}], tokens(), progress=False)
    assert {layer.step for layer in two.layers} == {2, 3}  # numbers of the recipe's steps
