"""Block by block over real architectures: nothing changes by looking, and each block gets what it would have got."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparsec import spill
from sparsec.blockwise import Walk, WholeRun, collect, find_blocks, first_tensor
from sparsec.errors import BadRecipe, SpillFailed
from sparsec.passes.masks.evaluating import evaluating
from sparsec.spill import Spilled

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def gemma() -> nn.Module:
    """Every second layer sees a window only: the blocks are called with different masks."""
    config = transformers.Gemma2Config(
        **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=4, max_position_embeddings=64
    )
    return transformers.Gemma2ForCausalLM(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=3))  # type: ignore[no-any-return]


def opt() -> nn.Module:
    config = transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
    return transformers.OPTForCausalLM(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=48))  # type: ignore[no-any-return]


MODELS = {
    "llama": (llama, "model.layers"),
    "gemma": (gemma, "model.layers"),
    "gpt2": (gpt2, "transformer.h"),
    "opt": (opt, "model.decoder.layers"),
    "bert": (bert, "encoder.layer"),
}


def made(name: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    generator = torch.Generator().manual_seed(1)
    return model, [{"input_ids": torch.randint(0, 64, (1, 12), generator=generator)} for _ in range(3)]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and "head" not in name}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_and_give_what_the_model_gives(name: str) -> None:
    model, data = made(name)
    found = find_blocks(model, list(layers_of(model)))
    assert [n for n, _ in found.blocks] == [f"{MODELS[name][1]}.{i}" for i in range(3)]
    seen: list[torch.Tensor] = []
    handle = found.blocks[-1][1].register_forward_hook(lambda _, __, output: seen.append(first_tensor(output)))
    with evaluating(model), torch.no_grad():
        for sample in data:
            model(**sample)
        handle.remove()
        walk = Walk(model, found, data)
        outputs = [list(run.outputs()) for run in walk]
    assert not walk.notes
    for ours, theirs in zip(outputs[-1], seen, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_read_the_same_input_form_a_group_in_the_order_of_the_run(name: str) -> None:
    model, data = made(name)
    walk = Walk(model, find_blocks(model, list(layers_of(model))), data)
    run = next(iter(walk))
    inside = {n: m for n, m in layers_of(model).items() if n.startswith(f"{run.name}.")}
    groups = [[n.rpartition(".")[2] for n in group] for group in run.groups(inside)]
    if name == "llama":
        assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    else:
        assert groups == [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]


def test_statistics_of_a_block_are_those_of_the_whole_model() -> None:
    model, data = made("llama")
    modules = layers_of(model)

    def forward() -> None:
        for sample in data:
            model(**sample)

    whole = collect(modules, ("sum_x2", "tokens"), forward)
    with evaluating(model):
        for run in Walk(model, find_blocks(model, list(modules)), data):
            inside = {n: m for n, m in modules.items() if n.startswith(f"{run.name}.")}
            for name, stats in run.collect(inside, ("sum_x2", "tokens")).items():
                assert torch.equal(stats["sum_x2"], whole[name]["sum_x2"])
                assert int(stats["tokens"]) == 36


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_padding_has_no_part_in_the_statistics(name: str) -> None:
    model, (first, second, _) = made(name)
    short = {"input_ids": second["input_ids"][:, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    padded = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]]),
        "attention_mask": torch.tensor([[1] * 12, [1] * 5 + [0] * 7]),
    }
    names = list(layers_of(model))
    found: list[dict[str, torch.Tensor]] = []
    with evaluating(model):
        for data in ([first, short], [padded]):
            for run in Walk(model, find_blocks(model, names), data):
                mine = {n: m for n, m in layers_of(model).items() if n.startswith(f"{run.name}.")}
                found += run.collect(mine, ("tokens", "sum_x2", "sample")).values()
    apart, together = found[: len(found) // 2], found[len(found) // 2 :]
    for a, b in zip(apart, together, strict=True):
        assert int(b["tokens"]) == len(b["sample"]) == 17
        torch.testing.assert_close(a["sum_x2"], b["sum_x2"])


def test_padding_has_no_part_in_the_statistics_of_a_model_without_blocks() -> None:
    model, (first, _, _) = made("llama")
    data = [{**first, "attention_mask": torch.tensor([[1] * 3 + [0] * 9])}]
    run = WholeRun(model, data, 1 << 20, 0)
    assert {int(stats["tokens"]) for stats in run.collect(layers_of(model), ("tokens",)).values()} == {3}


@pytest.mark.parametrize("propagate", [True, False])
def test_a_changed_block_reaches_the_next_only_where_errors_propagate(propagate: bool) -> None:
    model, data = made("llama")
    walk = iter(Walk(model, find_blocks(model, list(layers_of(model))), data, propagate_error=propagate))
    first = next(walk)
    dense = list(first.outputs())
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.zero_()  # type: ignore[operator, union-attr]
    changed = list(first.outputs())
    entered = [batch.hidden for batch in next(walk).batches()]
    expected = changed if propagate else dense
    assert all(torch.equal(a, b) for a, b in zip(entered, expected, strict=True))
    assert not torch.equal(dense[0], changed[0])


class Residual(nn.Module):
    """Its blocks do not follow each other: something happens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_blocks_that_do_not_follow_each_other_are_not_run_alone() -> None:
    model = Residual()
    names = [f"layers.{i}" for i in range(3)]
    walk = Walk(model, find_blocks(model, names), [{"x": torch.randn(4, 8)}])
    assert list(walk) == []
    assert "do not simply follow" in walk.notes[0]


def test_a_sequential_is_a_list_of_blocks_and_a_single_layer_is_none() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert [n for n, _ in find_blocks(model, ["0", "2"]).blocks] == ["0", "1", "2"]
    alone = find_blocks(nn.Linear(4, 4), [""])
    assert alone.blocks == ()
    assert "as one" in alone.note


def test_a_list_of_blocks_can_be_named_and_a_wrong_name_is_told() -> None:
    model, _ = made("llama")
    assert len(find_blocks(model, ["lm_head"], "model.layers").blocks) == 3
    with pytest.raises(BadRecipe, match=r"'model\.layer', but that is no list of modules.*model\.layers"):
        find_blocks(model, ["lm_head"], "model.layer")


def test_hidden_states_given_by_keyword_are_found() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(input=x)
            return x

    data = [{"x": torch.randn(4, 8)}]
    model = Keyword()
    walk = Walk(model, find_blocks(model, ["layers.0", "layers.1"]), data)
    assert torch.equal(next(iter(next(iter(walk)).batches())).hidden, data[0]["x"])


def test_activations_over_the_budget_go_to_disk_and_come_back_the_same() -> None:
    model, data = made("llama")
    found = find_blocks(model, list(layers_of(model)))
    in_memory = [list(run.outputs()) for run in Walk(model, found, data)]
    on_disk = [list(run.outputs()) for run in Walk(model, found, data, memory=0)]
    for a, b in zip(in_memory, on_disk, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_spilled_files_are_gone_with_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path))
    held = Spilled(100, [torch.ones(10), torch.arange(100), torch.ones(20)])
    assert [len(t) for t in (held[0], held[1], held[2])] == [10, 100, 20]
    assert torch.equal(held[1], torch.arange(100))
    assert len(list(tmp_path.rglob("*.pt"))) == 2
    del held
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill.torch, "save", full)
    with pytest.raises(SpillFailed, match="the disk is full"):
        Spilled(0, [torch.ones(4)])


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_what_torch_says_of_a_write_that_ended_early_is_not_shown(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(spill.torch, "save", ended)
    monkeypatch.setattr(spill.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(SpillFailed, match="the disk may be full" if free else "the disk is full"):
        Spilled(0, [torch.ones(4)])


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_list_that_goes_away_warns_of_nothing() -> None:
    held = Spilled(0, [torch.ones(4)])
    del held
    gc.collect()


@pytest.fixture
def training() -> nn.Module:
    return made("llama")[0].train()


def test_a_model_in_training_is_put_back_as_it_was(training: nn.Module) -> None:
    training.get_submodule("model.layers.0").eval()
    modes = {name: m.training for name, m in training.named_modules()}
    config: Any = training.config
    with evaluating(training):
        assert not any(m.training for m in training.modules())
        assert not config.use_cache
    assert {name: m.training for name, m in training.named_modules()} == modes
    assert config.use_cache


@pytest.fixture
def llava() -> nn.Module:
    """Only the config of its text model says use_cache."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    return transformers.LlavaForConditionalGeneration(config).eval()  # type: ignore[no-any-return]


def test_no_block_of_a_model_of_images_and_text_is_given_a_cache(llava: nn.Module) -> None:
    config: Any = llava.config
    layers = [name for name in layers_of(llava) if "language_model" in name]
    data = [{"input_ids": torch.arange(12).view(1, 12)} for _ in range(2)]
    with evaluating(llava):
        runs = list(Walk(llava, find_blocks(llava, layers), data, keep_dense=True))
        given = [value for run in runs for _, kwargs in run.calls for value in kwargs.values()]
        assert not any(isinstance(value, transformers.Cache) for value in given)
    assert config.text_config.use_cache
