"""Which layers of real models read zeros, and whose results nobody reads: what Dynamo makes of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsec.facts import Site
from sparsec.options import Options
from sparsec.pipeline import sites_of

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
IDS = torch.arange(7)[None]


def sites(model: str, config: str, inputs: dict[str, torch.Tensor] | None = None, **said: Any) -> dict[str, Site]:
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**said)).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        found = sites_of(made, (), inputs or {"input_ids": IDS}, Options())
    assert found
    return {site.fqn: site for site in found}


def told(found: dict[str, Site]) -> tuple[dict[str, str], dict[str, str]]:
    """{layer: origin of the zeros it reads}, {layer: origin of the zeros that spare its result}."""
    gates = {name: site.gate.origin for name, site in found.items() if site.gate}
    return gates, {name: site.needed_fact.origin for name, site in found.items() if site.needed_fact}


def test_opt_reads_zeros_in_fc2() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2}
    found = told(sites("OPTForCausalLM", "OPTConfig", num_hidden_layers=2, max_position_embeddings=64, **sizes))
    assert found == ({f"model.decoder.layers.{i}.fc2": "relu" for i in range(2)}, {})


def test_a_llama_with_relu_reads_zeros_in_down_and_spares_up() -> None:
    found = sites("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=2, hidden_act="relu", **SMALL)
    gates, needed = told(found)
    assert gates == {f"model.layers.{i}.mlp.down_proj": "product with relu(gate_proj)" for i in range(2)}
    assert needed == {f"model.layers.{i}.mlp.up_proj": "relu" for i in range(2)}
    for i in range(2):
        up, down = (found[f"model.layers.{i}.mlp.{name}_proj"] for name in ("up", "down"))
        assert down.gate is not None
        assert up.needed == down.gate.node  # the zeros of one tensor


def test_a_llama_with_silu_has_no_zeros() -> None:
    assert told(sites("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=1, hidden_act="silu", **SMALL)) == ({}, {})


def test_nemotron_squares_its_relu() -> None:
    heads = {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
    gates, needed = told(sites("NemotronForCausalLM", "NemotronConfig", **heads, **SMALL))
    assert (gates, needed) == ({"model.layers.0.mlp.down_proj": "relu^2"}, {})


@pytest.mark.parametrize("kind", ["relu", "gated-relu"])
def test_t5_reads_zeros_in_wo_of_encoder_and_decoder(kind: str) -> None:
    ids = {"input_ids": IDS, "decoder_input_ids": IDS}
    model = "T5ForConditionalGeneration"
    gates, needed = told(sites(model, "T5Config", ids, feed_forward_proj=kind, decoder_start_token_id=0, **T5))
    parts = [f"{part}.DenseReluDense" for part in ("encoder.block.0.layer.1", "decoder.block.0.layer.2")]
    gated = kind == "gated-relu"
    assert gates == {f"{part}.wo": "product with relu(wi_0)" if gated else "relu" for part in parts}
    assert needed == ({f"{part}.wi_1": "relu" for part in parts} if gated else {})


def test_models_with_gelu_have_no_zeros_and_padding_makes_none() -> None:
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    of_images = {"image_size": 32, "patch_size": 16, "num_hidden_layers": 1}
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    assert told(sites("ViTModel", "ViTConfig", pixels, **of_images, **sizes)) == ({}, {})
    padded = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])}
    assert told(sites("BertModel", "BertConfig", padded, num_hidden_layers=1, **SMALL)) == ({}, {})
