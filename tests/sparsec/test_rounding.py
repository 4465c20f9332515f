"""Which layers round their inputs outlives every way to save a model, and nothing is forgotten without a word."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import sparsec
from sparsec.errors import BadModelFile, SparsecWarning
from sparsec.passes.quantize.inputs import inputs_of, set_inputs
from sparsec.rounding import forgotten, noted, rounded_inputs, said_in

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
SAID = {UP: "int8", DOWN: "int8:0.0625"}
IDS = torch.arange(7)[None]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96)).eval()


def rounding_llama(activations: str = "int8") -> Any:
    """Rounded by a recipe, as users do it."""
    model = llama()
    data = [torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))]
    recipe = {"method": "rtn", "bits": 8, "activations": activations, "targets": ["re:.*mlp.*"]}
    sparsec.sparsify(model, recipe, data if activations == "int8-static" else None, progress=False)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
        return found


@pytest.mark.parametrize("activations", ["int8", "int8-static"])
def test_what_transformers_saved_and_loaded_rounds_again_after_restore(activations: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = rounding_llama(activations)
    said = rounded_inputs(model)
    assert len(said) == 6
    model.save_pretrained(tmp_path)  # not by sparsec
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logits(plain), logits(model))
    assert sorted(forgotten(plain)) == sorted(said)
    assert sparsec.restore(plain) is plain
    assert rounded_inputs(plain) == said
    assert not forgotten(plain)
    assert torch.equal(logits(plain), logits(model))


def test_explain_and_compile_say_what_from_pretrained_forgot(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from sparsec.integrations.transformers import compile_

    rounding_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"target": "reference"}
    with torch.no_grad():
        report = str(sparsec.explain(model, IDS, options=options))
    assert "Call sparsec.restore(model)" in report.replace("\n", " ")
    with pytest.warns(SparsecWarning, match=r"and 5 more round their inputs to int8.*Call sparsec.restore\(model\)"):
        compile_(model, target="reference")
    sparsec.restore(model)
    with torch.no_grad():
        assert "restore" not in str(sparsec.explain(model, IDS, options=options))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        compile_(model, target="reference", min_speedup=2)


def test_commands_load_a_folder_as_it_was_saved(tmp_path: Path) -> None:
    from sparsec.models import load_model

    model = rounding_llama()
    model.save_pretrained(tmp_path / "theirs")
    sparsec.save(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert rounded_inputs(load_model(str(tmp_path / folder)).model) == rounded_inputs(model)


def test_a_folder_from_before_configs_said_it_is_read_by_its_facts(tmp_path: Path) -> None:
    from sparsec.models import load_model

    model = llama()
    recipe = {"method": "rtn", "activations": "int8", "targets": ["re:.*mlp.*"]}
    report = sparsec.sparsify(model, recipe, progress=False)
    folder = sparsec.save(model, tmp_path / "out", report)
    config = json.loads((folder / "config.json").read_text())
    del config["sparsec"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder)).model
    assert rounded_inputs(loaded) == rounded_inputs(model)
    assert noted(loaded) == rounded_inputs(model)


def test_the_config_follows_the_layers(tmp_path: Path) -> None:
    model = rounding_llama()
    assert noted(model) == rounded_inputs(model)
    model.config.sparsec["other"] = 1
    for module in model.modules():
        if inputs_of(module):
            set_inputs(module, "")
    folder = sparsec.save(model, tmp_path / "plain")
    assert json.loads((folder / "config.json").read_text())["sparsec"] == {"other": 1}
    del model.config.sparsec["other"]
    assert "sparsec" not in json.loads((sparsec.save(model, tmp_path / "again") / "config.json").read_text())


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_any_module_is_saved_with_its_rounding_and_loaded_into_a_plain_one(name: str, tmp_path: Path) -> None:
    def stack() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)).eval()

    model, other = stack(), stack()
    set_inputs(model[0], "int8")
    set_inputs(model[2], "int8:0.25")
    set_inputs(other[3], "int8")  # of which the file says nothing
    path = sparsec.save(model, tmp_path / name)
    assert said_in(path) == {"0": "int8", "2": "int8:0.25"}
    sparsec.load(path, other)
    set_inputs(other[3], "")
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    plain = sparsec.save(stack(), tmp_path / f"plain-{name}")
    with safe_open(plain if plain.is_file() else plain / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_base_model_finds_its_layers_under_its_own_names(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = rounding_llama()
    model.save_pretrained(tmp_path)
    base = sparsec.restore(AutoModel.from_pretrained(tmp_path))
    assert set(rounded_inputs(base)) == {name.removeprefix("model.") for name in rounded_inputs(model)}


def test_a_layer_that_cannot_round_is_named_and_nothing_changes() -> None:
    model = llama()
    for name, why in (("model.layers.7.up", "the model has no such layer"), ("lm_head.x", "no such"), (UP, "Bilinear")):
        model.config.sparsec = {"inputs": {DOWN: "int8", name: "int8"}}
        if why == "Bilinear":
            model.model.layers[0].mlp.up_proj = nn.Bilinear(2, 2, 2)
        with pytest.raises(BadModelFile, match=why):
            sparsec.restore(model)
        assert not rounded_inputs(model)


def test_other_models_have_nothing_to_restore() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert sparsec.restore(model) is model
    assert not rounded_inputs(model)
    strange = llama()
    for value in ("words", {"inputs": 3}, {}):
        strange.config.sparsec = value
        assert noted(strange) == {}
        assert sparsec.restore(strange) is strange


def test_a_packed_model_keeps_its_rounding_through_the_config(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = llama()
    with torch.no_grad():
        for name, word in SAID.items():
            layer = model.get_submodule(name)
            layer.weight.masked_fill_(torch.rand(layer.weight.shape) < 0.8, 0)
            set_inputs(layer, word)
    expected = logits(model)
    assert len(sparsec.pack_(model, "reference", options={"min_speedup": 0}).packed) == 2
    folder = sparsec.save(model, tmp_path / "packed")
    assert torch.allclose(logits(model), expected, atol=1e-4)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    assert forgotten(fresh) == (UP, DOWN)
    sparsec.load(folder, fresh)
    assert not forgotten(fresh)
    assert torch.allclose(logits(fresh), expected, atol=1e-4)
    assert rounded_inputs(sparsec.unpack_(fresh)) == SAID
