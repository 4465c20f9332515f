"""Small random models of well-known shapes, for examples, tests and a first look without a download.

In: ``tiny:llama``, or ``tiny:llama@80`` with 80 % of each linear weight set to zero. Out: a seeded ``LoadedModel``;
the vocabulary is 256 bytes, so any text can be evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsec.errors import BadOptionValue, ModelNotFound, did_you_mean, listed
from sparsec.models import LoadedModel, kind_of, need_transformers

if TYPE_CHECKING:
    import torch

_HIDDEN = 64
_COMMON = {
    "vocab_size": 256,
    "hidden_size": _HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "initializer_range": 0.1,  # wide enough that the logits of a random model differ clearly
    "max_position_embeddings": 512,
}
_IDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
# name -> config class, model class, what differs from _COMMON
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2, **_IDS}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_inner": 160, **_IDS}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 160, "word_embed_proj_dim": _HIDDEN, **_IDS}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, **_IDS},
    ),
    "bert": ("BertConfig", "BertModel", {}),
    "vit": ("ViTConfig", "ViTModel", {"image_size": 32, "patch_size": 8}),
}
_NOT_TAKEN = {
    "vit": ("vocab_size", "max_position_embeddings"),
    "opt": ("intermediate_size",),
    "gpt2": ("intermediate_size",),
}


def tiny_model(spec: str, seed: int = 0) -> LoadedModel:
    """Build ``tiny:NAME`` or ``tiny:NAME@PERCENT``. Raises ModelNotFound, BadOptionValue, MissingPackage."""
    import torch

    name, _, percent = spec.removeprefix("tiny:").partition("@")
    if name not in TINY:
        raise ModelNotFound(path=spec, why=f"the tiny models are {listed(TINY)}{did_you_mean(name, TINY)}")
    if percent and not (percent.isdigit() and int(percent) <= 100):
        raise BadOptionValue(key="model", value=spec, expected="zeros are given in percent, as in tiny:llama@80")
    transformers = need_transformers(f"the model {spec!r}")
    config_class, model_class, own = TINY[name]
    common = {k: v for k, v in _COMMON.items() if k not in _NOT_TAKEN.get(name, ())}
    config = getattr(transformers, config_class)(**{**common, **own}, architectures=[model_class])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config).eval()
        if percent:
            _zero(model, int(percent) / 100)
    return LoadedModel(model, None, kind_of(config), "", spec)


def _zero(model: torch.nn.Module, share: float) -> None:
    """Set the smallest ``share`` of each linear weight to zero; embeddings, and what is tied to them, stay."""
    import torch

    with torch.no_grad():
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        for module in model.modules():
            if not type(module).__name__.endswith(("Linear", "Conv1D", "Conv2d", "Experts")):
                continue
            for weight in module.parameters(recurse=False):
                rank = int(share * weight.numel())
                if weight.dim() >= 2 and rank and id(weight) not in embeddings:
                    threshold = weight.abs().flatten().kthvalue(rank).values
                    weight.mul_(weight.abs() > threshold)
