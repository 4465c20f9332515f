"""Where the steps of a recipe meet: rewrites and gradients, allocators and overrides, a mask and the step after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsec import sparsify, sparsify_run
from sparsec.errors import SparsecWarning
from sparsec.gradients import gradients
from sparsec.passes.masks.block import LayerState
from sparsec.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens.*:sparsec.errors.SparsecWarning")


def llama() -> nn.Module:
    return tiny_model("tiny:llama").model


def tokens(count: int = 4, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (1, length), generator=generator) for _ in range(count)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, LayerState]:
    """Layer -> its state as its mask is chosen."""
    seen: dict[str, LayerState] = {}
    prune = sparsify_run.prune_state

    def spy(job: Any, state: LayerState) -> None:
        seen[state.name] = state
        prune(job, state)

    monkeypatch.setattr(sparsify_run, "prune_state", spy)
    return seen


# ---- gradients


@pytest.mark.parametrize("method", ["gblm", "minillm"])
@pytest.mark.parametrize("rewrite", ["permute", "equalize"])
def test_gradients_move_with_the_channels_of_their_weights(
    rewrite: str, method: str, states: dict[str, LayerState]
) -> None:
    def products() -> dict[str, torch.Tensor]:
        """|w g| of every weight, sorted: neither an order nor a scale changes it."""
        power = {"grad2": 0.5, "spsa": 1.0}
        kind = next(kind for kind in power if kind in states["model.layers.0.mlp.down_proj"].stats)
        found = {name: s.dense.abs() * s.stats[kind].abs().pow(power[kind]) for name, s in states.items()}
        return {name: product.flatten().sort().values for name, product in found.items()}

    masked = {"method": method, "pattern": "2:4"}
    sparsify(llama(), masked, tokens(), progress=False)
    plain, before = products(), {name: state.dense for name, state in states.items()}
    sparsify(llama(), [rewrite, masked], tokens(), progress=False)
    moved = [name for name, state in states.items() if not torch.equal(state.dense, before[name])]
    assert "model.layers.0.mlp.down_proj" in moved
    for name, product in products().items():
        torch.testing.assert_close(product, plain[name], rtol=1e-4, atol=1e-6 * float(plain[name].max()))


def test_an_estimate_of_gradients_follows_the_seed_of_the_recipe() -> None:
    made = []
    for seed in (0, 0, 1):
        model = llama()
        sparsify(model, {"seed": seed, "steps": ["minillm"]}, tokens(2), progress=False)
        made.append(weights(model)["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_gradients_of_a_later_step_are_of_what_the_first_left_and_a_note_says_so(
    states: dict[str, LayerState],
) -> None:
    first = {"method": "magnitude", "targets": ["*.up_proj"]}
    report = sparsify(llama(), [first, {"method": "gblm", "targets": ["*.down_proj"]}], tokens(), progress=False)
    assert any(note.startswith("step 2: its gradients are those of the model") for note in report.notes)
    pruned, name = llama(), "model.layers.0.mlp.down_proj"
    sparsify(pruned, first, progress=False)
    data = [{"input_ids": ids} for ids in tokens()]
    found = gradients(pruned, data, {name: pruned.get_submodule(name)}, ("grad2",))
    assert torch.equal(states[name].stats["grad2"], found[name]["grad2"])


# ---- allocators


class Uneven(nn.Module):
    """``b`` has next to no part in the output: what learns prunes it first."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.a(x) + 1e-4 * self.b(x)
        return y


def uneven(blocks: int) -> nn.Module:
    """``blocks`` of them in a row; for 0 the thing itself, which has no list of blocks."""
    torch.manual_seed(0)
    return nn.Sequential(*(Uneven() for _ in range(blocks))) if blocks else Uneven()


def floats(count: int = 30) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 16, 32, generator=generator) for _ in range(count)]


BESA = {"method": "besa", "per": "layer", "lr": 0.5, "epochs": 4}


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75)])
def test_learned_shares_of_n_of_m_keep_their_mean_and_leave_no_layer_without_weights(
    pattern: str, sparsity: float
) -> None:
    report = sparsify(uneven(2), [BESA, {"method": "wanda", "pattern": pattern}], floats(), progress=False)
    assert report.achieved == sparsity
    assert max(layer.achieved for layer in report.layers) <= 0.75


def test_a_model_without_a_list_of_blocks_is_learned_as_one() -> None:
    report = sparsify(uneven(0), [BESA, "wanda"], floats(), progress=False)
    a, b = (layer.achieved for layer in report.layers)
    assert a < 0.4 < 0.6 < b
    assert report.achieved == pytest.approx(0.5, abs=1e-3)


def test_layers_outside_the_blocks_of_what_learns_are_named() -> None:
    recipe = {"steps": [{"method": "besa"}, {"method": "wanda", "ignore": []}]}
    report = sparsify(llama(), recipe, tokens(), progress=False)
    assert "besa learns inside blocks; lm_head outside of them got 0.5" in report.notes
    assert report.layers[-1].achieved == pytest.approx(0.5, abs=1e-3)


OVERRIDES = {
    "method": "wanda",
    "sparsity": 0.7,
    "overrides": {"model.layers.0.mlp.down_proj": {"pattern": "2:4"}, "*.1.mlp.up_proj": {"sparsity": 0.1}},
}


@pytest.mark.parametrize("allocator", ["uniform", "besa", "owl"])
def test_what_overrides_says_of_a_layer_stands_and_has_no_part_in_the_mean(allocator: str) -> None:
    options: dict[str, Any] = {"owl": {"flat": 1}}.get(allocator, {})
    report = sparsify(llama(), [{"method": allocator, **options}, OVERRIDES], tokens(), progress=False)
    found = {layer.name: layer for layer in report.layers}
    own = [found.pop("model.layers.0.mlp.down_proj"), found.pop("model.layers.1.mlp.up_proj")]
    assert [(layer.pattern, layer.asked) for layer in own] == [("2:4", 0.5), ("unstructured", 0.1)]
    assert [layer.achieved for layer in own] == pytest.approx([0.5, 0.1], abs=0.01)
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in found.items()}
    mean = sum(layer.achieved * sizes[name] for name, layer in found.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.7, abs=0.004)
    said = f"{allocator}: overrides decides for model.layers.0.mlp.down_proj and 1 more, with no part in its mean"
    assert said in report.notes


# ---- masks


def test_outliers_come_on_top_of_a_quota_that_all_layers_share() -> None:
    plain, aside = llama(), llama()
    sparsify(plain, {"method": "magnitude", "scope": "global"}, progress=False)
    recipe = {"method": "magnitude", "scope": "global", "outliers": "0.05"}
    report = sparsify(aside, recipe, progress=False)
    assert report.achieved == pytest.approx(0.45, abs=1e-3)
    assert len({round(layer.achieved, 2) for layer in report.layers}) > 1
    kept = weights(aside)
    assert all(bool(kept[name][weight != 0].all()) for name, weight in weights(plain).items())


@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_kept_weights_of_a_float64_model_are_the_same_bits(method: str) -> None:
    model = uneven(2).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 / 3)  # what fp32 cannot hold
    before = weights(model)
    sparsify(model, method, [x.double() for x in floats(4)], progress=False)
    for name, after in weights(model).items():
        assert torch.equal(after, torch.where(after != 0, before[name], 0.0))


@pytest.mark.parametrize("pattern", ["16:2:8", "block:16x1", "2:4"])
def test_a_later_order_of_channels_keeps_masks_of_earlier_steps_whole(pattern: str) -> None:
    early = {"method": "wanda", "pattern": pattern, "targets": ["*.up_proj", "*.gate_proj"]}
    late = {"method": "wanda", "pattern": "2:4", "targets": ["*.down_proj"]}
    alone, model = llama(), llama()
    sparsify(alone, early, tokens(), progress=False)
    report = sparsify(model, [early, "permute", late], tokens(), progress=False)
    name = "model.layers.0.mlp.up_proj.weight"
    found, mask = weights(model)[name], weights(alone)[name] != 0
    notes = [note for layer in report.layers for note in layer.notes if "mask that its order would break" in note]
    if pattern == "2:4":  # its groups do not care which row is which
        assert not notes
        assert not torch.equal(found != 0, mask)
        assert int((found.view(-1, 4) != 0).sum(1).max()) == 2
    else:
        assert notes[0].startswith("model.layers.0.mlp.down_proj: an earlier step gave mlp.gate_proj, mlp.up_proj a")
        assert torch.equal(found != 0, mask)


@pytest.mark.parametrize("stop", ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"])
def test_steps_that_meet_are_resumed_to_the_same_bits(
    stop: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = [
        {"method": "wanda", "pattern": "16:2:8", "targets": ["*.up_proj"]},
        "permute",
        BESA | {"epochs": 1},
        {"method": "gblm", "pattern": "2:4", "targets": ["*.down_proj", "*.o_proj"]},
    ]
    whole, broken = llama(), llama()
    report = sparsify(whole, recipe, tokens(), progress=False)
    prune = sparsify_run.prune_state

    def breaks(job: Any, state: LayerState) -> None:
        if state.name == stop:
            raise KeyboardInterrupt
        prune(job, state)

    with monkeypatch.context() as patch:
        patch.setattr(sparsify_run, "prune_state", breaks)
        with pytest.raises(KeyboardInterrupt), pytest.warns(SparsecWarning, match="stopped"):
            sparsify(broken, recipe, tokens(), progress=False, resume=tmp_path)
    again = llama()
    resumed = sparsify(again, recipe, tokens(), progress=False, resume=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert [layer.to_dict() for layer in resumed.layers] == [layer.to_dict() for layer in report.layers]


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(input=x)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_layer_that_is_called_by_keyword_is_calibrated_as_any_other(true_sequential: bool) -> None:
    torch.manual_seed(0)
    data = [torch.randn(300, 32)]
    alone, inside = nn.Linear(32, 32), nn.Sequential(_Named(), _Named())
    inside[0].fc.load_state_dict(alone.state_dict())
    for model in (alone, inside):
        recipe = {"true_sequential": true_sequential, "steps": [{"method": "sparsegpt"}]}
        sparsify(model, recipe, data, progress=False)
    assert torch.equal(inside[0].fc.weight, alone.weight)
