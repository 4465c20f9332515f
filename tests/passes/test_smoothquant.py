"""SmoothQuant and rounded inputs as recipes make them: folds change nothing, planted outliers no longer cost much."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec.errors import BadRecipe
from sparsec.passes.quantize.contract import Grid
from sparsec.passes.quantize.inputs import QuantizesInput, inputs_of, quantized
from sparsec.passes.quantize.smoothquant import SmoothQuant
from sparsec.passes.reparam.equalize import Equalize
from sparsec.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::sparsec.errors.SparsecWarning")
RANDOM = torch.Generator().manual_seed(3)
IDS = torch.randint(0, 256, (4, 48), generator=RANDOM)
DATA = [torch.randint(0, 256, (2, 48), generator=RANDOM) for _ in range(4)]


def planted(factor: float = 60.0) -> nn.Module:
    """A model whose norms have outlier channels, and whose layers take them back: it computes what it did."""
    model = tiny_model("tiny:llama").model.eval()
    model.config.use_cache = False
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[::32] *= factor
                for layer in readers:
                    layer.weight[:, ::32] /= factor
    return model


def divergence(model: nn.Module, expected: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, nats."""
    with torch.no_grad():
        found = model(IDS).logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = planted()(IDS).logits.log_softmax(-1)
    return logits


def compressed(recipe: Any) -> nn.Module:
    model = planted()
    sparsec.sparsify(model, recipe, DATA, progress=False)
    return model


def test_planted_outliers_break_w8a8_and_smoothquant_repairs_it(dense: torch.Tensor) -> None:
    plain = divergence(compressed({"method": "rtn", "activations": "int8"}), dense)
    smooth = divergence(compressed("smoothquant"), dense)
    assert smooth < plain / 5
    static = divergence(compressed({"method": "rtn", "activations": "int8-static"}), dense)
    smooth_static = divergence(compressed({"method": "smoothquant", "activations": "int8-static"}), dense)
    assert plain < static  # one scale for all tokens is coarser than one for each
    assert smooth_static < static / 5


@pytest.mark.parametrize("exact", [False, True])
def test_folding_alone_changes_no_output_beyond_rounding(exact: bool, dense: torch.Tensor) -> None:
    assert SmoothQuant(alpha=0.75, exact=exact).folds == Equalize(0.75, exact, True)
    model = planted()
    before = copy.deepcopy(model.model.layers[0].self_attn.q_proj.weight)
    # rounding to 8 bits moves no weight by more than half a step, so what the fold did shows in the scale of columns
    sparsec.sparsify(model, {"method": "smoothquant", "exact": exact, "activations": "none"}, DATA, progress=False)
    moved = model.model.layers[0].self_attn.q_proj.weight.norm(dim=0) / before.norm(dim=0)
    assert float((moved.max() / moved.min()).detach()) > 4
    fold_only = planted()
    sparsec.sparsify(
        fold_only,
        [{"method": "equalize", "exact": exact, "norms_only": True}, {"method": "magnitude", "sparsity": 0.0}],
        DATA,
        progress=False,
    )
    with torch.no_grad():
        torch.testing.assert_close(fold_only(IDS).logits.log_softmax(-1), dense, rtol=1e-4, atol=1e-4)


def test_the_recipe_rounds_every_layer_and_its_row_says_how() -> None:
    model = tiny_model("tiny:llama").model
    report = sparsec.sparsify(
        model,
        {"method": "rtn", "activations": "int8-static", "overrides": {"*.down_proj": {"activations": "none"}}},
        DATA,
        progress=False,
    )
    for row in report.layers:
        layer = model.get_submodule(row.name)
        assert row.inputs == inputs_of(layer)
        assert isinstance(layer, QuantizesInput) != row.name.endswith("down_proj")
        again = Grid(8).nearest(layer.weight.detach())
        torch.testing.assert_close(again, layer.weight.detach(), rtol=1e-6, atol=1e-6)  # it lies on its grid
    static = next(row for row in report.layers if row.name.endswith("q_proj"))
    assert static.inputs.startswith("int8:")
    assert static.values == "int8, row, x int8 static"
    assert type(report.layers[0]).from_dict(static.to_dict()) == static


def test_the_static_scale_is_the_largest_input_of_the_calibration_over_127() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    x = [torch.randn(12, 16) for _ in range(3)]
    sparsec.sparsify(model, {"method": "rtn", "activations": "int8-static"}, x, progress=False)
    top = torch.cat(x).abs().max() / 127
    assert torch.equal(model[0].x_scale, top)


def test_dynamic_rounding_needs_no_data_and_layers_that_cannot_round_keep_a_note() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 4))
    report = sparsec.sparsify(model, {"method": "rtn", "activations": "int8"}, progress=False)
    x = torch.randn(3, 8)
    first = nn.functional.linear(quantized(x), model[0].weight, model[0].bias)
    assert torch.equal(model(x), nn.functional.linear(first, model[1].weight, model[1].bias))
    assert any("its inputs stay as they are: it is a Own" in note for note in report.layers[1].notes)


def test_a_failure_leaves_a_block_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec import sparsify_run

    model = tiny_model("tiny:llama").model
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails(*_: Any) -> Any:
        raise RuntimeError("no row")

    monkeypatch.setattr(sparsify_run, "row_of", fails)
    with pytest.raises(RuntimeError, match="no row"):
        sparsec.sparsify(model, "smoothquant", DATA, progress=False)
    assert not any(isinstance(module, QuantizesInput) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_killed_run_goes_on_to_the_same_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sparsec import sparsify_run

    recipe = {"method": "smoothquant", "activations": "int8-static"}
    whole = tiny_model("tiny:llama").model
    sparsec.sparsify(whole, recipe, DATA, progress=False)
    calls, real = 0, sparsify_run.row_of

    def stops(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sparsify_run, "row_of", stops)
    with pytest.raises(KeyboardInterrupt):
        sparsec.sparsify(tiny_model("tiny:llama").model, recipe, DATA, progress=False, resume=tmp_path / "run")
    monkeypatch.setattr(sparsify_run, "row_of", real)
    again = tiny_model("tiny:llama").model
    report = sparsec.sparsify(again, recipe, DATA, progress=False, resume=tmp_path / "run")
    assert any("came from the unfinished run" in note for note in report.notes)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_saved_model_rounds_its_inputs_again_when_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("tiny:llama").model
    report = sparsec.sparsify(model, {"method": "smoothquant", "activations": "int8-static"}, DATA, progress=False)
    folder = sparsec.save(model, tmp_path / "out", report)
    loaded = sparsec.load(folder, tiny_model("tiny:llama").model)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(sparsec.errors.SparsecError, match="another kind of model"):
        sparsec.load(folder, other)


def test_wrong_settings_are_refused_before_anything_changes() -> None:
    model = tiny_model("tiny:llama").model
    with pytest.raises(BadRecipe, match="activations"):
        sparsec.sparsify(model, {"method": "rtn", "activations": "int7"}, progress=False)
    with pytest.raises(BadRecipe, match="needs calibration data"):
        sparsec.sparsify(model, {"method": "rtn", "activations": "int8-static"}, progress=False)
    overrides = {"*.q_proj": {"activations": "int8-static"}}
    with pytest.raises(BadRecipe, match="say it for the whole step"):
        sparsec.sparsify(model, {"method": "rtn", "overrides": overrides}, DATA, progress=False)
    with pytest.raises(BadRecipe, match="alpha"):
        sparsec.sparsify(model, {"method": "smoothquant", "alpha": 2}, DATA, progress=False)
    assert not any(isinstance(module, QuantizesInput) for module in model.modules())
