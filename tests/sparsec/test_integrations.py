"""Other people's libraries: import-safe without them, and generate() of transformers through the backend."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import sparsec
from sparsec.errors import MissingPackage, OffloadedModel, UnknownOption
from sparsec.integrations.transformers import compile_
from sparsec.models import load_model
from sparsec.records import recording

FILES = [p.stem for p in (Path(sparsec.__file__).parent / "integrations").glob("*.py") if p.stem != "__init__"]
PROMPT = torch.arange(1, 13)[None]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def generate(model: Any, prompt: torch.Tensor = PROMPT, tokens: int = 32) -> torch.Tensor:
    done: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
    )
    return done


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", FILES)
def test_an_integration_imports_without_its_library_and_says_what_to_install(name: str) -> None:
    code = (
        f"import sys; sys.modules['{name}'] = None\n"
        f"import importlib; module = importlib.import_module('sparsec.integrations.{name}')\n"
        "assert 'torch' not in sys.modules\n"
        "try: module.compile_(None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(MissingPackage.__name__), done.stderr
    assert "pip install 'sparsec[hf]'" in done.stdout
    assert done.stdout.count("\n") == 1


def test_generate_gives_eagers_tokens_with_two_graphs_and_no_recompile() -> None:
    model: Any = load_model("tiny:llama@80").model
    expected = generate(model)
    with recording() as records:
        compile_(model, min_speedup=0)
        assert torch.equal(generate(model), expected)
        assert torch.equal(generate(model), expected)
    assert graphs() == 2  # the prompt and a token, so that nothing was compiled after the second token
    assert not counters["graph_break"]
    assert not [record.failure for record in records if record.failure]
    formats = {layer.decision.at(1).format for record in records for layer in record.layers}
    assert formats
    assert "dense" not in formats


def test_with_room_for_what_comes_a_longer_answer_compiles_nothing() -> None:
    model: Any = load_model("tiny:llama@80").model
    expected = generate(model, tokens=64)
    compile_(model, max_cache_len=96, min_speedup=0)
    generate(model, tokens=2)
    assert graphs() == 2
    assert torch.equal(generate(model, tokens=64), expected)
    assert graphs() == 2


def test_calling_it_again_changes_nothing_and_other_options_start_anew() -> None:
    model = load_model("tiny:llama").model
    assert compile_(model) is model
    first = model._compiled_call_impl
    assert compile_(model)._compiled_call_impl is first
    assert compile_(model, tune="off")._compiled_call_impl is not first


def test_a_copy_is_plain_and_uses_its_own_weights() -> None:
    model: Any = compile_(load_model("tiny:llama").model, _backend="eager")
    inputs = load_model("tiny:llama").inputs(1, 4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        assert not torch.equal(model(**inputs).logits, twin(**inputs).logits)
        assert twin(**inputs).logits.abs().max() == 0
    assert compile_(twin)._compiled_call_impl is not None  # the mark that was copied does not count


def test_what_the_user_chose_for_generation_stays() -> None:
    model: Any = load_model("tiny:llama").model
    model.generation_config.cache_implementation = "dynamic"
    compile_(model)
    assert model.generation_config.cache_implementation == "dynamic"
    assert model.generation_config.disable_compile is True


def test_an_encoder_is_compiled_for_its_calls() -> None:
    loaded = load_model("tiny:bert@80")
    inputs = loaded.inputs(2, 8)
    with torch.no_grad():
        expected = loaded.model(**inputs)[0]
        with recording() as records:
            got = compile_(loaded.model, min_speedup=0)(**inputs)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert sum(len(record.layers) for record in records) == 13


def test_a_wrong_option_is_refused_before_anything_is_compiled() -> None:
    model = load_model("tiny:bert").model
    with pytest.raises(UnknownOption, match="did you mean 'tune'"):
        compile_(model, tunee="quick")
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    "hook", [SimpleNamespace(offload=True), SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(offload=True)])]
)
def test_a_model_that_accelerate_offloads_is_refused_by_the_layers_name(hook: SimpleNamespace) -> None:
    model: Any = load_model("tiny:llama").model
    model.model.layers[1].mlp._hf_hook = hook
    with pytest.raises(OffloadedModel, match=r"model\.layers\.1\.mlp is offloaded"):
        compile_(model)
    assert model._compiled_call_impl is None


def test_a_hook_that_offloads_nothing_is_no_obstacle() -> None:
    model: Any = load_model("tiny:llama").model
    model.model._hf_hook = SimpleNamespace(offload=False)
    assert compile_(model)._compiled_call_impl is not None
