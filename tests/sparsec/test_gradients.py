"""Gradients of a dense model: those of autograd, taken without leaving a trace; and their forward-only estimate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsec.errors import NoLoss, NonFinite
from sparsec.gradients import gradients
from sparsec.tiny import tiny_model

ALL = ("grad2", "grad_abs", "spsa")
VOCAB, WIDTH = 12, 6
Data = list[dict[str, Any]]


class Small(nn.Module):
    """One linear layer between an embedding and logits; ``unused`` is an expert that no token reaches."""

    def __init__(self, shift: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, VOCAB)
        self.unused = nn.Linear(WIDTH, 3)
        self.dropout = nn.Dropout(0.5)
        self.shift, self.gain = shift, gain
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"logits": self.up(self.dropout(self.embed(input_ids))) * self.gain + self.shift}


def ids(rows: int, tokens: int, vocabulary: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or hasattr(m, "nf")}
    return {name: module for name, module in found.items() if name != "lm_head"}


def by_autograd(model: nn.Module, batches: list[torch.Tensor], modules: dict[str, nn.Module]) -> dict[str, Any]:
    """The model's own loss and ``backward``, one row after the other, on a copy."""
    twin = copy.deepcopy(model).requires_grad_(True)
    found: dict[str, Any] = {name: {"grad2": 0.0, "grad_abs": 0.0, "sum": 0.0} for name in modules}
    for row in torch.cat(batches):
        twin.zero_grad()
        twin(input_ids=row[None], labels=row[None]).loss.backward()
        for name, module in modules.items():
            grad: Any = twin.get_parameter(f"{name}.weight").grad
            grad = grad.t() if hasattr(module, "nf") else grad
            found[name]["grad2"] += grad.double().square()
            found[name]["grad_abs"] += grad.double().abs()
            found[name]["sum"] += grad.double()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_models_own_loss_row_by_row(name: str) -> None:
    model = tiny_model(f"tiny:{name}").model
    batches = [ids(2, 9, 256), ids(1, 9, 256, seed=1)]
    modules = linears(model)
    found = gradients(model, [{"input_ids": batch} for batch in batches], modules, ("grad2", "grad_abs"))
    expected = by_autograd(model, batches, modules)
    assert list(found) == list(modules)
    for layer, kinds in found.items():
        module: Any = modules[layer]
        n, k = (module.nf, module.nx) if hasattr(module, "nf") else (module.out_features, module.in_features)
        for kind, value in kinds.items():
            assert value.shape == (n, k)
            assert value.dtype == torch.float32
            assert value.is_contiguous()
            torch.testing.assert_close(value.double(), expected[layer][kind], rtol=1e-3, atol=1e-9)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def true_gradient(model: Small, batch: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(model).eval()
    for row in batch:
        loss: Any = F.cross_entropy(twin(row[None])["logits"][0, :-1], row[1:])
        loss.backward()
    assert twin.up.weight.grad is not None
    return twin.up.weight.grad


def test_the_forward_only_estimate_correlates_with_the_gradient_of_one_linear() -> None:
    model, batch = Small(), ids(4, 16)
    truth = true_gradient(model, batch)
    few, many = (
        correlation(gradients(model, [{"input_ids": batch}], {"up": model.up}, ["spsa"], probes=p)["up"]["spsa"], truth)
        for p in (8, 256)
    )
    assert few > 0.3
    assert many > 0.9


def test_the_forward_only_estimate_has_the_size_of_the_gradient() -> None:
    model, batch = Small(), ids(2, 16)
    truth = true_gradient(model, batch)
    found = gradients(model, [{"input_ids": batch}], {"up": model.up}, ["spsa"], probes=2000)["up"]["spsa"]
    slope = float((found * truth).sum() / truth.square().sum())
    assert slope == pytest.approx(1.0, abs=0.1)


def test_the_same_seed_gives_the_same_estimate_and_another_one_another() -> None:
    model, data = Small(), [{"input_ids": ids(2, 8)}]
    runs = [gradients(model, data, {"up": model.up}, ["spsa"], seed=seed)["up"]["spsa"] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_an_estimate_runs_two_forwards_a_probe_and_a_gradient_one() -> None:
    model, data = Small(), [{"input_ids": ids(3, 8)}]
    gradients(model, data, {"up": model.up}, ["spsa"], probes=5)
    assert model.calls == 3 * 5 * 2
    gradients(model, data, {"up": model.up}, ["grad2", "grad_abs"])
    assert model.calls == 3 * 5 * 2 + 3


def snapshot(model: nn.Module) -> list[Any]:
    return [
        *((p.requires_grad, p.grad is None, id(p)) for p in model.parameters()),
        *(m.training for m in model.modules()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_afterwards_what_it_was(dtype: torch.dtype) -> None:
    model = Small().to(dtype).train()
    model.dropout.eval()
    model.embed.weight.requires_grad_(False)
    model.up.weight.grad = torch.full_like(model.up.weight, 7.0)
    grad, before = model.up.weight.grad, copy.deepcopy(model.state_dict())
    marks = snapshot(model)
    gradients(model, [{"input_ids": ids(2, 8)}], {"up": model.up}, ALL)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.up.weight.grad is grad
    assert bool((grad == 7.0).all())
    assert snapshot(model) == marks


class Failing(Small):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if self.calls == 3:
            raise RuntimeError("out of luck")
        return super().forward(input_ids, attention_mask)


def test_a_failure_in_the_middle_leaves_the_weights_as_they_were() -> None:
    model = Failing().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of luck"):
        gradients(model, [{"input_ids": ids(2, 8)}], {"up": model.up}, ["spsa"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_does_not_matter(around: Callable[[], Any]) -> None:
    model, data = Small(), [{"input_ids": ids(2, 8)}]
    plain = gradients(model, data, {"up": model.up}, ALL)
    with around():
        inside = gradients(model, data, {"up": model.up}, ALL)
    assert all(torch.equal(plain["up"][kind], inside["up"][kind]) for kind in ALL)
    assert not any(value.is_inference() or value.requires_grad for value in inside["up"].values())


def test_a_layer_that_took_no_part_has_no_gradient() -> None:
    model, data = Small(), [{"input_ids": ids(2, 8)}]
    found = gradients(model, data, {"up": model.up, "unused": model.unused}, ("grad2", "grad_abs"))
    assert bool(found["up"]["grad2"].any())
    assert not found["unused"]["grad2"].any()
    alone = gradients(model, data, {"unused": model.unused}, ("grad2",))
    assert not alone["unused"]["grad2"].any()


def test_a_weight_of_zeros_is_not_moved() -> None:
    model = Small()
    nn.init.zeros_(model.up.weight)
    found = gradients(model, [{"input_ids": ids(2, 8)}], {"up": model.up}, ALL)["up"]
    assert bool(found["grad2"].any())
    assert not found["spsa"].any()


def test_tied_layers_share_what_their_weight_has() -> None:
    model, data = Small(), [{"input_ids": ids(2, 8)}]
    model.unused = model.up
    found = gradients(model, data, {"up": model.up, "unused": model.unused}, ALL)
    assert all(torch.equal(found["up"][kind], found["unused"][kind]) for kind in ALL)


def test_padding_has_no_part_in_the_loss() -> None:
    model = Small()
    short = ids(1, 8)
    padded = {"input_ids": F.pad(short, (0, 5)), "attention_mask": F.pad(torch.ones_like(short), (0, 5))}
    found = [gradients(model, [d], {"up": model.up}, ["grad2"])["up"]["grad2"] for d in ({"input_ids": short}, padded)]
    torch.testing.assert_close(found[0], found[1])
    nothing = {"input_ids": short, "attention_mask": torch.zeros_like(short)}
    assert not gradients(model, [nothing], {"up": model.up}, ["grad2"])["up"]["grad2"].any()


def test_small_float16_gradients_do_not_vanish() -> None:
    single = Small(gain=2.0**-13)
    half = copy.deepcopy(single).half()
    wanted, found = (
        gradients(model, [{"input_ids": ids(2, 32)}], {"up": model.up}, ["grad_abs"])["up"]["grad_abs"]
        for model in (single, half)
    )
    assert float((wanted - found).norm() / wanted.norm()) < 0.01


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(pixel_values)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def test_labels_in_the_data_give_the_models_own_loss() -> None:
    torch.manual_seed(0)
    model, x, labels = Classifier(), torch.randn(5, WIDTH), torch.tensor([0, 1, 2, 0, 1])
    found = gradients(model, [{"pixel_values": x, "labels": labels}], {"head": model.head}, ["grad2"])["head"]["grad2"]
    error = model(x)["logits"].softmax(-1) - F.one_hot(labels, 3)  # of a softmax's cross entropy
    torch.testing.assert_close(found, torch.einsum("tn,tk->nk", error.square(), x.square()).detach())


@pytest.mark.parametrize(
    ("build", "data", "why"),
    [
        (Classifier, {"pixel_values": torch.ones(2, WIDTH)}, "the data has no input_ids"),
        (lambda: tiny_model("tiny:bert").model, {"input_ids": ids(1, 8)}, "BertModel is no causal language model"),
        (lambda: Small().embed, {"input": ids(1, 8)}, "the data has no input_ids"),
        (Small, {"input_ids": ids(1, 1)}, "a sample of one token has no next one"),
        (Classifier, {"pixel_values": torch.ones(2, WIDTH), "labels": None}, "the data has no input_ids"),
    ],
)
def test_a_model_without_a_loss_names_methods_that_need_none(
    build: Callable[[], nn.Module], data: dict[str, Any], why: str
) -> None:
    model = build()
    modules = linears(model) or {"embed": model}
    with pytest.raises(NoLoss, match=why) as raised:
        gradients(model, [data], modules, ["grad2"])
    offered = str(raised.value).partition("without gradients: ")[2]
    assert "wanda" in offered
    assert "magnitude" in offered
    assert "gblm" not in offered
    assert "minillm" not in offered


class Headless(Small):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return super().forward(input_ids)["logits"]


def test_outputs_that_are_not_called_logits_are_not_taken_for_them() -> None:
    model = Headless()
    with pytest.raises(NoLoss, match="no logits for each token"):
        gradients(model, [{"input_ids": ids(1, 8)}], {"up": model.up}, ["spsa"])


class Rooted(Small):
    """sqrt(0): a finite loss whose gradient is not."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        out = super().forward(input_ids)["logits"]
        return {"logits": (out * 0.0).sqrt() + out}


def test_a_loss_or_gradient_that_is_not_finite_is_refused() -> None:
    data = [{"input_ids": ids(2, 8)}]
    broken = Small(shift=math.nan)
    for kind in ALL:
        with pytest.raises(NonFinite, match="the loss of the model became NaN or infinite in sample 1 of 2"):
            gradients(broken, data, {"up": broken.up}, [kind])
    rooted = Rooted()
    nn.init.constant_(rooted.embed.weight, 1.0)
    nn.init.constant_(rooted.up.weight, 1.0)
    with pytest.raises(NonFinite, match="the gradient of 'up' became NaN"):
        gradients(rooted, data, {"up": rooted.up}, ["grad2"])


def test_progress_is_told_and_unknown_kinds_are_refused() -> None:
    model, told = Small(), []
    data = [{"input_ids": ids(2, 8)}, {"input_ids": ids(1, 4)}]
    gradients(model, data, {"up": model.up}, ["grad2"], tick=lambda done, total, what: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="grad3"):
        gradients(model, data, {"up": model.up}, ["grad3"])
