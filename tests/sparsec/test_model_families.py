"""Real architectures from small configs, pruned, compiled with every site checked against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sparsec.integrations.transformers import compile_
from sparsec.records import CompileRecord, recording
from sparsec.runtime.store import STORE

transformers = pytest.importorskip("transformers")

CHECKED: dict[str, Any] = {"verify": True, "min_speedup": 0}
HIDDEN = 256
SIZES = {
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "initializer_range": 0.1,
    "max_position_embeddings": 128,
}
IDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def config(name: str, drop: tuple[str, ...] = (), **more: Any) -> Any:
    return getattr(transformers, name)(**{k: v for k, v in {**SIZES, **more}.items() if k not in drop})


def build(name: str) -> nn.Module:
    """A seeded random model, two thirds of every linear weight pruned in varying amounts."""
    torch.manual_seed(0)
    models = {
        "llama": lambda: transformers.LlamaForCausalLM(config("LlamaConfig", num_key_value_heads=2, **IDS)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(config("GPT2Config", ("intermediate_size",), **IDS)),
        "opt": lambda: transformers.OPTForCausalLM(
            config("OPTConfig", ("intermediate_size",), ffn_dim=512, word_embed_proj_dim=HIDDEN, **IDS)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            config("MixtralConfig", num_key_value_heads=2, num_local_experts=4, **IDS)
        ),
        "bert": lambda: transformers.BertModel(config("BertConfig")),
        "vit": lambda: transformers.ViTModel(
            config("ViTConfig", ("vocab_size", "max_position_embeddings"), image_size=32, patch_size=8)
        ),
    }
    model: nn.Module = models[name]().eval()
    with torch.no_grad():
        for i, module in enumerate(model.modules()):
            if type(module).__name__ in ("Linear", "Conv1D"):
                module.weight.mul_(torch.rand_like(module.weight) > (0.5, 0.7, 0.9)[i % 3])
    return model


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kinds(records: list[CompileRecord]) -> set[str]:
    return {layer.site.kind for record in records for layer in record.layers}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_generate_gives_eagers_tokens_with_every_site_verified(name: str) -> None:
    model = build(name)
    prompt = torch.randint(0, 512, (1, 6))
    want = model.generate(
        prompt, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    before = STORE.verified
    with recording() as records:
        compile_(model, **CHECKED)
        got = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want)
    assert STORE.verified - before >= 8 * 8, "sites ran, and each was compared"
    assert not any(record.failure for record in records)
    assert ("hf_conv1d" if name == "gpt2" else "linear") in kinds(records)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders_agree_with_every_site_verified(name: str) -> None:
    model = build(name)
    inputs = (
        {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else {"input_ids": torch.randint(0, 512, (2, 9))}
    )
    before = STORE.verified
    with torch.no_grad(), recording() as records:
        want = model(**inputs).last_hidden_state
        got = torch.compile(model, backend="sparsec", options=CHECKED)(**inputs).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert STORE.verified - before >= 12
    assert not any(record.failure for record in records)


def test_every_linear_of_a_llama_is_a_site_or_has_a_reason() -> None:
    model = build("llama")
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), recording() as records:
        torch.compile(model, backend="sparsec", options=CHECKED)(torch.randint(0, 512, (1, 6)))
    named = {layer.name for r in records for layer in r.layers} | {d.fqn for r in records for d in r.declined}
    assert linears <= named
    assert all(layer.decision.reason for r in records for layer in r.layers)
    assert all(d.reason for r in records for d in r.declined)
