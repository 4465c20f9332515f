"""``sparsify`` on real module trees: what is pruned, what is not and why, and that nothing is ever half done."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsec
from sparsec.errors import BadRecipe, SparsecWarning, UnmatchedTarget, UnprunableLayer
from sparsec.passes.masks import METHODS
from sparsec.passes.masks.contract import Choose, Pruned, Statistics
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import select
from sparsec.recipe_file import parse_yaml
from sparsec.sparsify import Report, fingerprint, methods, prepare, sparsify


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, **changes)).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=96)).eval()


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Sequential(nn.Linear(24, 24), nn.ReLU()), nn.Linear(24, 8))


MAKERS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "stack": stack}
LAYERS = {"llama": 14, "gpt2": 8, "bert": 13, "stack": 3}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def ids(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(8)[None]}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "8:16", "16:2:8", "block:8x4"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_prunable_layer_and_nothing_else_changes(name: str, pattern: str) -> None:
    model = MAKERS[name]()
    before = tensors(model)
    report = sparsify(model, {"method": "magnitude", "pattern": pattern}, progress=False)
    assert len(report.layers) == LAYERS[name]
    assert changed(model, before) == {f"{layer.name}.weight" for layer in report.layers}
    for layer in report.layers:
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        was = before[f"{layer.name}.weight"]
        matrix, old = (weight.t(), was.t()) if layer.kind == "hf_conv1d" else (weight, was)
        keep = select(old.abs(), MaskPattern.parse(pattern), 0.5)
        assert torch.equal(matrix, torch.where(keep, old, 0.0))
        assert layer.shape == tuple(matrix.shape)
        assert layer.achieved == pytest.approx(float((matrix == 0).float().mean()), abs=1e-6)
        assert layer.error == pytest.approx(float((old - matrix).norm() / old.norm()), rel=1e-5)
        assert bool((matrix[~keep].view(torch.int32) == 0).all()), "a pruned entry must be +0.0"
    if name != "stack":
        assert bool(model(**ids(model)).logits.isfinite().all())


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "16:2:8", "block:4x4"])
def test_the_same_recipe_again_changes_nothing(pattern: str, scope: str) -> None:
    model = llama()
    first = sparsify(model, {"method": "magnitude", "pattern": pattern, "scope": scope}, progress=False)
    before = tensors(model)
    sparsify(model, first.recipe, progress=False)
    assert changed(model, before) == set()


def test_the_resolved_recipe_gives_the_same_bits() -> None:
    said = {
        "seed": 5,
        "method": "magnitude",
        "sparsity": 0.6,
        "scope": "global",
        "overrides": {"*.down_proj": {"pattern": "2:4"}, "k_proj": "skip", "v_proj": {"sparsity": 0.2}},
    }
    one, two = llama(), llama()
    report = sparsify(one, said, progress=False)
    again = sparsify(two, parse_yaml(report.recipe.to_yaml()), progress=False)
    assert changed(two, tensors(one)) == set()
    assert again.recipe == report.recipe
    assert again.recipe.sha == report.recipe.sha
    assert report.recipe.steps[0].targets == ("Linear",)
    assert report.recipe.steps[0].ignore == ("lm_head",)
    assert set(report.recipe.made_with) == {"sparsec", "torch"}


def test_an_in_place_write_is_seen_by_the_version() -> None:
    model = stack()
    weight = model[0].weight
    version, place = weight._version, weight.data_ptr()
    sparsify(model, "magnitude", progress=False)
    assert model[0].weight is weight
    assert weight.data_ptr() == place
    assert weight._version > version
    assert weight.requires_grad


def test_under_inference_mode_the_version_still_counts() -> None:
    model = stack()
    version = model[0].weight._version
    with torch.inference_mode():
        sparsify(model, "magnitude", progress=False)
    assert model[0].weight._version > version


def test_weights_made_in_inference_mode_are_pruned() -> None:
    with torch.inference_mode():
        model = stack()
    assert sparsify(model, "magnitude", progress=False).achieved == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = stack().to(dtype)
    report = sparsify(model, {"method": "magnitude", "pattern": "2:4"}, progress=False)
    assert all(p.dtype == dtype for p in model.parameters())
    assert report.achieved == 0.5


def test_negative_zeros_that_go_become_positive() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.0, -2.0, -0.0]]))
    sparsify(model, "magnitude", progress=False)
    assert model.weight.signbit().tolist() == [[False, False, True, False]]


def test_a_model_that_is_one_layer_has_a_report() -> None:
    report = sparsify(nn.Linear(8, 8), "magnitude", progress=False)
    assert report.layers[0].name == ""
    assert "(the model)" in str(report)


def test_a_compiled_module_is_pruned_under_its_own_names() -> None:
    model = stack()
    report = sparsify(torch.compile(model), "magnitude", progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2.0", "3"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight


def test_tied_weights_are_pruned_once() -> None:
    model = Tied()
    version = model.first.weight._version
    report = sparsify(model, "magnitude", progress=False)
    assert [(layer.name, layer.tied) for layer in report.layers] == [("first", ("second",)), ("other", ())]
    assert model.first.weight._version == version + 1
    assert "shares its weight with second; pruned once" in str(report)


@pytest.mark.parametrize("extra", [{"ignore": ["second"]}, {"overrides": {"second": "skip"}}])
def test_a_weight_tied_to_an_ignored_layer_is_left_alone(extra: dict[str, Any]) -> None:
    model = Tied()
    before = tensors(model)
    report = sparsify(model, {"method": "magnitude", **extra}, progress=False)
    assert changed(model, before) == {"other.weight"}
    assert any("first was left out: it shares its weight with second" in note for note in report.notes)


def test_one_module_under_two_names_is_pruned_once() -> None:
    shared = nn.Linear(8, 8)
    report = sparsify(nn.Sequential(shared, nn.ReLU(), shared), "magnitude", progress=False)
    assert [(layer.name, layer.tied) for layer in report.layers] == [("0", ("2",))]


def test_the_output_head_is_left_alone_unless_it_is_named() -> None:
    model = llama()
    before = tensors(model)
    sparsify(model, "magnitude", progress=False)
    assert "lm_head.weight" not in changed(model, before)
    report = sparsify(model, {"method": "magnitude", "targets": ["lm_head"]}, progress=False)
    assert [layer.name for layer in report.layers] == ["lm_head"]
    everything = sparsify(llama(), {"method": "magnitude", "ignore": []}, progress=False)
    assert "lm_head" in {layer.name for layer in everything.layers}
    more = sparsify(llama(), {"method": "magnitude", "ignore": ["q_proj"]}, progress=False)
    assert not {"lm_head", "model.layers.0.self_attn.q_proj"} & {layer.name for layer in more.layers}


def test_an_output_head_by_another_name_is_left_alone_too() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=96))
    head = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    report = sparsify(model, "magnitude", progress=False)
    assert head not in {layer.name for layer in report.layers}
    assert report.recipe.steps[0].ignore in ((head,), ("lm_head",))


def test_a_tied_head_is_not_pruned_even_when_named() -> None:
    model = llama(tie_word_embeddings=True)
    before = tensors(model)
    report = sparsify(model, {"method": "magnitude", "targets": ["Linear", "lm_head"]}, progress=False)
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & changed(model, before)
    note = next(note for note in report.notes if note.startswith("lm_head"))
    assert note == (
        "lm_head was left out: it shares its weight with model.embed_tokens "
        "(it is an embedding, which is looked up, not multiplied)"
    )
    with pytest.raises(BadRecipe, match=r"leaves no layer to prune \(lm_head was left out"):
        sparsify(model, {"method": "magnitude", "targets": ["lm_head"]}, progress=False)


def test_groups_of_a_transposed_layer_run_along_its_in_features() -> None:
    model = gpt2()
    sparsify(model, {"method": "magnitude", "pattern": "2:4"}, progress=False)
    weight = model.get_parameter("transformer.h.0.attn.c_attn.weight")  # [in, out]
    assert bool(((weight.view(8, 4, -1) != 0).sum(1) == 2).all())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.point = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 1, groups=4)
        self.table = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(32, 4)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_a_matrix_and_those_with_groups_are_noted(memory: torch.memory_format) -> None:
    model = Convolutions().to(memory_format=memory)
    report = sparsify(model, {"method": "magnitude", "pattern": "2:4"}, progress=False)
    assert [layer.name for layer in report.layers] == ["stem", "point", "attention.out_proj"]
    assert model.stem.weight.is_contiguous(memory_format=memory)
    assert bool(((model.point.weight.reshape(32, 4, 4) != 0).sum(-1) == 2).all())
    notes = "\n".join(report.notes)
    assert "grouped not pruned: it is a 1x1 convolution in 4 groups" in notes
    assert "attention not pruned: MultiheadAttention holds in_proj_weight [96x32] itself" in notes
    assert "table" not in notes


@pytest.mark.parametrize(
    ("target", "words"),
    [("grouped", "in 4 groups"), ("table", "embedding"), ("attention", "in_proj_weight")],
)
def test_naming_a_layer_that_cannot_be_pruned_is_refused(target: str, words: str) -> None:
    with pytest.raises(UnprunableLayer, match=words):
        sparsify(Convolutions(), {"method": "magnitude", "targets": [target]}, progress=False)


class Views(nn.Module):
    """Its convolution's output is viewed, which only the contiguous format allows."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, **said)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.view(y.shape[0], -1)


CONVOLUTIONS: list[dict[str, Any]] = [
    {}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": 1, "padding_mode": "reflect"},
]  # fmt: skip


@pytest.mark.parametrize("said", CONVOLUTIONS)
def test_wanda_scores_a_convolution_by_the_pixels_its_weights_meet(said: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, images = Views(**said), [torch.randn(2, 8, 9, 7), torch.randn(1, 8, 6, 6)]
    weight = model.conv.weight.detach().clone()
    sums = torch.zeros_like(weight[0])
    for image in images:  # the pixels that each weight of a filter meets, by the gradient of a sum of squares
        ones = torch.zeros(1, 8, 3, 3, requires_grad=True)
        with torch.enable_grad():
            walk = nn.Conv2d(8, 1, 3, bias=False, **said)
            walk.weight = nn.Parameter(ones)
            squares = torch.func.functional_call(walk, {"weight": ones}, (image.square(),))
        (met,) = torch.autograd.grad(squares.sum(), ones)
        sums += met[0]
    report = sparsify(model, {"method": "wanda", "sparsity": 0.5}, [{"x": i} for i in images], progress=False)
    score = (weight.abs() * sums.sqrt()).permute(0, 2, 3, 1).flatten(1)
    least = score.topk(36, dim=1, largest=False).indices
    zero = (model.conv.weight.detach() == 0).permute(0, 2, 3, 1).flatten(1)
    assert bool(zero.gather(1, least).all())
    assert int(zero.sum()) == 16 * 36
    assert report.layers[0].shape == (16, 72)
    assert model.conv.weight.is_contiguous()


def test_groups_of_a_convolution_run_along_its_channels() -> None:
    model = Views()
    sparsify(model, {"method": "magnitude", "pattern": "2:4"}, progress=False)
    assert bool(((model.conv.weight.view(16, 2, 4, 3, 3) != 0).sum(2) == 2).all())


def test_steps_that_do_more_than_choose_leave_larger_convolutions_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    steps = [{"method": "magnitude", "sparsity": 0.5}, {"method": "variance"}]
    report = sparsify(model, {"steps": steps}, [torch.randn(1, 3, 8, 8)], progress=False)
    assert [layer.name for layer in report.layers] == ["1"]
    assert "0 not pruned: variance takes no convolutions larger than 1x1" in report.notes
    with pytest.raises(BadRecipe, match="leaves no layer"):
        sparsify(nn.Sequential(nn.Conv2d(3, 8, 3)), {"steps": steps}, [torch.randn(1, 3, 8, 8)], progress=False)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd, self.good = nn.Linear(8, 8), nn.Linear(8, 8)


def _meta(model: Plain) -> None:
    model.odd.to("meta")


def _integer(model: Plain) -> None:
    model.odd.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)


def _subclass(model: Plain) -> None:
    class Quantized(torch.Tensor):
        pass

    model.odd.weight = nn.Parameter(torch.ones(8, 8).as_subclass(Quantized))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: parametrizations.orthogonal(m.odd), "computed, not a parameter; call remove_parametrizations"),
        (lambda m: prune.l1_unstructured(m.odd, "weight", 0.5), "call torch.nn.utils.prune.remove"),
        (_meta, "meta device"),
        (_integer, "torch.uint8"),
        (_subclass, "not a plain tensor"),
        (lambda m: setattr(m.odd, "weight", nn.Parameter(torch.empty(0, 8))), "empty"),
    ],
)
def test_weights_that_are_no_plain_floats_are_left_with_a_reason(spoil: Callable[[Plain], Any], words: str) -> None:
    model = Plain()
    spoil(model)
    report = sparsify(model, "magnitude", progress=False)
    assert [layer.name for layer in report.layers] == ["good"]
    assert any(note.startswith("odd not pruned") and words in note for note in report.notes)
    with pytest.raises(UnprunableLayer):
        sparsify(model, {"method": "magnitude", "targets": ["odd"]}, progress=False)


def test_experts_in_one_tensor_are_noted_not_forgotten() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=96, num_local_experts=2)
    report = sparsify(MixtralForCausalLM(config), "magnitude", progress=False)
    assert any("experts and 1 more not pruned" in note for note in report.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_before_anything_changes(value: float) -> None:
    model = stack()
    with torch.no_grad():
        model[3].weight[2, 1] = value
    before = tensors(model)
    with pytest.raises(UnprunableLayer, match="'3' cannot be pruned: its weight holds NaN or infinite values"):
        sparsify(model, "magnitude", progress=False)
    assert all(model.state_dict()[n].equal(t) for n, t in before.items() if n != "3.weight")
    sparsify(model, {"method": "magnitude", "ignore": ["3"]}, progress=False)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"targets": ["*.q_prj"]}, UnmatchedTarget, r"'\*\.q_prj' matches no layer.*self_attn\.q_proj"),
        ({"targets": ["Liner"]}, UnmatchedTarget, "nearest layers are: Linear"),
        ({"targets": ["model.layers.0"]}, UnmatchedTarget, r"model\.layers\.0\.mlp"),
        ({"overrides": {"layers.0.self_attn.q_proj": "skip"}}, UnmatchedTarget, "overrides entry"),
        ({"targets": ["re:("]}, BadRecipe, "regular expression"),
        ({"ignore": ["Linear"]}, BadRecipe, "leaves no layer to prune"),
        ({"overrides": {"Linear": "skip"}}, BadRecipe, "leaves no layer to prune"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_changes_nothing(
    said: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = llama()
    before = tensors(model)
    with pytest.raises(error, match=words):
        sparsify(model, {"steps": [{"method": "magnitude"}, {"method": "magnitude", **said}]}, progress=False)
    assert changed(model, before) == set()


def test_a_model_without_linear_layers_is_one_sentence() -> None:
    with pytest.raises(BadRecipe, match="no layer that can be pruned"):
        sparsify(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()), "magnitude", progress=False)


def test_ignore_entries_that_say_nothing_here_are_notes() -> None:
    report = sparsify(llama(), {"method": "magnitude", "ignore": ["visual", "LlamaMLP"]}, progress=False)
    assert "ignore entry 'visual' matches nothing in this model" in report.notes
    assert any(note.startswith("ignore entry 'LlamaMLP' names no layer but what holds layers") for note in report.notes)
    assert not [note for note in sparsify(stack(), "magnitude", progress=False).notes if "ignore" in note]


def test_global_scope_is_one_threshold_for_the_layers_that_share_settings() -> None:
    model = stack()
    with torch.no_grad():
        model[0].weight.mul_(4)
    dense = tensors(model)
    said = {"method": "magnitude", "sparsity": 0.6, "scope": "global", "overrides": {"3": {"sparsity": 0.25}}}
    report = sparsify(model, said, progress=False)
    pool = torch.cat([dense[n].abs().flatten() for n in ("0.weight", "2.0.weight")])
    gone = torch.cat([(model.get_parameter(n) == 0).flatten() for n in ("0.weight", "2.0.weight")])
    assert int(gone.sum()) == round(0.6 * pool.numel())
    assert float(pool[gone].max()) <= float(pool[~gone].min())
    by_name = {layer.name: layer.achieved for layer in report.layers}
    assert by_name["0"] < 0.5 < by_name["2.0"]
    assert by_name["3"] == 0.25


def test_a_layer_that_a_common_threshold_empties_is_noted() -> None:
    model = stack()
    with torch.no_grad():
        model[3].weight.mul_(1e-3)
    report = sparsify(model, {"method": "magnitude", "scope": "global"}, progress=False)
    assert [layer.name for layer in report.layers if layer.notes == ("every weight of it is zero now",)] == ["3"]


def test_overrides_take_the_most_specific_entry() -> None:
    said = {
        "method": "magnitude",
        "overrides": {
            "model.layers.0.self_attn.q_proj": {"sparsity": 0.1},
            "q_proj": {"sparsity": 0.2},
            "*.layers.1.*": {"sparsity": 0.3},
            "Linear": {"sparsity": 0.4},
        },
    }
    report = sparsify(llama(), said, progress=False)
    asked = {layer.name.removeprefix("model.layers."): layer.asked for layer in report.layers}
    assert asked["0.self_attn.q_proj"] == 0.1
    assert asked["1.self_attn.q_proj"] == 0.2
    assert asked["1.self_attn.k_proj"] == 0.3
    assert asked["0.self_attn.k_proj"] == 0.4


def test_steps_run_in_order_each_on_what_the_last_left() -> None:
    model = stack()
    report = sparsify(model, [{"method": "magnitude", "pattern": "2:4"}, {"method": "magnitude", "sparsity": 0.75}])
    assert [layer.step for layer in report.layers] == [1, 1, 1, 2, 2, 2]
    assert report.achieved == 0.75
    groups = model[0].weight.view(24, 4, 4) != 0
    assert int(groups.sum(-1).max()) <= 2


def test_what_divides_badly_is_noted() -> None:
    model = nn.Sequential(nn.Linear(10, 6))
    notes = str(sparsify(model, {"method": "magnitude", "pattern": "2:8", "scope": "row"}, progress=False))
    assert "10 in-features are not a multiple of 8: the last 2 keep at most 2" in notes
    assert "scope row changes nothing for 2:8" in notes
    notes = str(sparsify(model, {"method": "magnitude", "pattern": "block:4x4"}, progress=False))
    assert "6x10 is not a multiple of block:4x4: the blocks at the edge are smaller" in notes


def test_the_report_is_json_and_a_table_that_folds_twins() -> None:
    report = sparsify(llama(), {"method": "magnitude", "sparsity": 0.7}, data=[torch.zeros(1)], progress=False)
    said = json.loads(json.dumps(report.to_dict()))
    assert said["achieved"] == pytest.approx(0.7, abs=1e-3)
    assert len(said["layers"]) == 14
    assert {"name", "shape", "pattern", "asked", "achieved", "error", "notes"} <= set(said["layers"][0])
    assert said["recipe"]["steps"][0]["sparsity"] == 0.7
    text = str(report)
    assert text.startswith("sparsify magnitude: 14 layers, 18.4 k weights, 70.0% zero")
    assert "model.layers.0,1.mlp.up_proj" in text
    assert "note: data was not read: no step of this recipe needs calibration" in text
    assert max(map(len, text.splitlines())) <= 120


@dataclass(frozen=True)
class Fails:
    """Scores the first layers and then breaks, as a full memory would."""

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "none"
    cost: ClassVar[str] = "none"
    at: int = 8  # rows of the layer that breaks

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        if weight.shape[0] == self.at:
            raise MemoryError("no more")
        return weight.abs()


@dataclass(frozen=True)
class Needy(Fails):
    """Wants data."""

    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)


@dataclass(frozen=True)
class Doubles(Fails):
    """Updates: keeps what magnitude keeps, twice as large, and leaves rubbish where the mask prunes."""

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        return Pruned(choose(weight.abs()), weight.double() * 2)


@dataclass(frozen=True)
class NotANumber(Fails):
    """Gives NaN scores, as calibration data with NaN would."""

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        return weight * float("nan")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Fails, Needy, Doubles, NotANumber):
        monkeypatch.setitem(METHODS, cls.__name__.lower(), f"{__name__}:{cls.__name__}")


def test_a_failure_in_the_middle_leaves_every_layer_whole_and_says_where() -> None:
    model, done = stack(), stack()
    sparsify(done, "magnitude", progress=False)
    dense = tensors(model)
    with (
        pytest.warns(SparsecWarning, match="stopped at 3: 2 of 3 layers are pruned, the others are as they were"),
        pytest.raises(MemoryError),
    ):
        sparsify(model, "fails", progress=False)
    assert changed(model, dense) == {"0.weight", "2.0.weight"}
    assert changed(model, tensors(done)) == {"3.weight"}


def test_a_failure_at_the_first_layer_changes_nothing_and_warns_of_nothing() -> None:
    model = stack()
    dense = tensors(model)
    for said in ({"method": "fails", "at": 24}, {"method": "fails", "scope": "global"}):
        with warnings.catch_warnings(record=True) as caught, pytest.raises(MemoryError):
            sparsify(model, said, progress=False)
        assert not [w for w in caught if issubclass(w.category, SparsecWarning)]
    assert changed(model, dense) == set()


def test_a_method_that_updates_writes_values_and_exact_zeros() -> None:
    model = stack()
    dense = tensors(model)
    report = sparsify(model, {"method": "doubles", "pattern": "2:4"}, progress=False)
    keep = select(dense["0.weight"].abs(), MaskPattern.parse("2:4"), 0.5)
    assert torch.equal(model[0].weight, torch.where(keep, 2 * dense["0.weight"], 0.0))
    assert report.achieved == 0.5
    with pytest.raises(BadRecipe, match="scope global has no meaning"):
        sparsify(model, {"method": "doubles", "scope": "global"}, progress=False)


def test_scores_that_are_not_numbers_are_one_sentence() -> None:
    model = stack()
    dense = tensors(model)
    with pytest.raises(UnprunableLayer, match="its scores are not numbers"):
        sparsify(model, "notanumber", progress=False)
    assert changed(model, dense) == set()


def test_a_method_that_needs_data_is_refused_without_any() -> None:
    with pytest.raises(BadRecipe, match=r"needy needs calibration data; pass data=\.\.\."):
        sparsify(stack(), "needy", progress=False)


def test_preparing_writes_nothing_and_forecasts() -> None:
    model = llama()
    before = tensors(model)
    versions = [p._version for p in model.parameters()]
    said = json.loads(json.dumps(prepare(model, {"method": "magnitude", "scope": "global"}).to_dict()))
    assert changed(model, before) == set()
    assert [p._version for p in model.parameters()] == versions
    assert len(said["layers"]) == 14
    assert said["weights"] == sum(x["shape"][0] * x["shape"][1] for x in said["layers"])
    assert said["seconds"] > 0
    assert said["scratch_bytes"] > 0


def test_the_fingerprint_tells_models_apart_and_knows_a_copy() -> None:
    model = stack()
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))
    sparsify(model, "magnitude", progress=False)
    assert fingerprint(model) != fingerprint(stack())
    assert fingerprint(stack().half()) != fingerprint(stack())


def test_methods_have_a_line_each() -> None:
    assert list(sparsec.methods()) == list(METHODS)
    assert methods()["magnitude"] == "Keep the largest weights: score |W|"


def test_importing_a_module_does_not_replace_the_function_of_its_name() -> None:
    import sparsec.sparsify as found

    assert sparsec.sparsify is sparsify
    assert found is sparsify
    assert sparsec.Report is Report
