"""Where the steps of a recipe meet: rewrites and gradients, allocators and overrides, a mask and the step after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsec import sparsify, sparsify_run
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
