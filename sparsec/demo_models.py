"""What the demo runs: a text encoder with real sentences, and a wide LLM-shaped stack with random weights.

In: the name of a model, or widths. Out: modules in eval mode, and ``Case`` records with inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsec.errors import BadModelFile

if TYPE_CHECKING:
    from sparsec.models import LoadedModel

SENTENCES = """\
The ferry to the islands leaves at seven in the morning and takes about two hours in calm weather.
A small bakery on the corner sells bread with walnuts and dried figs on Saturdays.
The committee postponed the vote because three members could not reach the city in time.
Sparse matrices store only the entries that are not zero, together with their positions.
She repaired the old bicycle with parts that her neighbour had kept in a wooden box.
Interest rates were left unchanged for the fourth month in a row, the central bank said.
The patient was advised to walk for half an hour each day and to drink more water.
Our flight was delayed by fog, so we spent the night on a bench beside the gate.
Magnets made from rare earths keep their strength at temperatures found in most motors.
The library closes early in August, but books can be returned through the door at any hour.
A good compiler removes work that does not change the answer.
He planted tomatoes between rows of basil, and the insects stayed away all summer.
The court found that the contract had been signed under pressure and was not valid.
Glaciers in the northern valleys lost a tenth of their ice during the last two decades.
Please send the invoice to the address below before the end of the month.
The goalkeeper saved two penalties, yet the team lost the final by a single goal.
Memory bandwidth, not arithmetic, limits the speed of a language model that serves one user.
The recipe asks for four eggs, a cup of sugar and the peel of one lemon.
They measured the depth of the lake with a rope, a stone and a great deal of patience.
A new tram line will connect the university with the harbour by the end of next year.
The museum bought a painting that had been hidden behind a wall for sixty years.
Bats find their way in the dark by listening to the echo of their own voices.
The update fixes a fault that drained the battery when the phone was left in a car.
Workers at the plant agreed to a four day week after a year of negotiations.
The violinist broke a string in the second movement and finished on three.
Cold water from the deep ocean rises along the coast and feeds large schools of fish.
The price of coffee rose sharply after frost damaged the harvest in the south.
Children learn the rules of a language long before they can explain them.
A crack in the bridge was found during a routine inspection on Tuesday evening.
The telescope will look at the light of galaxies that formed shortly after the beginning.
Turn left after the post office and follow the river until you see a red gate.
The results could be repeated in two other laboratories with the same method.
""".splitlines()


@dataclass(frozen=True)
class Case:
    """One way to call a model. ``rows`` is M of its linear layers: batch times tokens."""

    name: str
    inputs: Mapping[str, Any]
    rows: int


@dataclass(frozen=True)
class Encoder:
    """A text model without its head, in eval mode, in the dtype of its checkpoint."""

    name: str
    model: nn.Module
    loaded: LoadedModel

    def tokenized(self, texts: list[str], tokens: int) -> dict[str, Any]:
        """Arguments of forward with ids [len(texts), tokens], padded and cut; random ids without a tokenizer."""
        inputs = self.loaded.inputs(len(texts), tokens)
        tokenizer = self.loaded.tokenizer
        if tokenizer is None:
            return inputs
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
        return {**inputs, **{name: made[name] for name in ("input_ids", "attention_mask")}}

    def cases(self) -> list[Case]:
        """Batch 1 with 16 and with 128 tokens, and batch 32 with 16 tokens, all of real text."""
        return [
            Case("1 x 16 tokens", self.tokenized(SENTENCES[:1], 16), 16),
            Case("1 x 128 tokens", self.tokenized([" ".join(SENTENCES)], 128), 128),
            Case("32 x 16 tokens", self.tokenized(SENTENCES, 16), 512),
        ]


def load_encoder(model: str) -> Encoder:
    """``minilm``, a local checkpoint, or what else ``sparsec.models`` loads; a model with a head loses the head.

    Raises InputError: no such model, or one that does not take text.
    """
    from sparsec.models import load_model

    loaded = load_model(model)
    if loaded.kind not in ("encoder", "causal"):
        raise BadModelFile(path=model, why=f"the demo feeds text, and this is a {loaded.kind} model; try sparsec bench")
    body: nn.Module = loaded.model.base_model  # type: ignore[assignment]  # transformers' name for "without the head"
    return Encoder(loaded.name, body.requires_grad_(False), loaded)


def mean_pooled(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """Sentence embeddings [batch, width] in fp32: the mean over real tokens, one sentence a call."""
    pooled = []
    for i in range(len(inputs["input_ids"])):
        one = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        hidden = run(**one).last_hidden_state.float()
        mask = one["attention_mask"].unsqueeze(-1)
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled)


def cosine(a: Tensor, b: Tensor) -> dict[str, float]:
    """Mean and smallest cosine similarity of the rows of two [n, width] tensors."""
    similarity = F.cosine_similarity(a.double(), b.double())
    return {"mean": float(similarity.mean()), "min": float(similarity.min())}


class Block(nn.Module):
    """Attention and gated MLP of a Llama-like model for one new token, with ``past`` cached positions.

    x: [batch, 1, hidden]. Rotary positions are left out: they do no linear algebra.
    """

    past_k: Tensor
    past_v: Tensor
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, hidden: int, inner: int, heads: int, past: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False, dtype=dtype))
        self.gate_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=False, dtype=dtype)
        self.norm1 = nn.RMSNorm(hidden, dtype=dtype)
        self.norm2 = nn.RMSNorm(hidden, dtype=dtype)
        for name in ("past_k", "past_v"):
            self.register_buffer(name, torch.randn(1, heads, past, hidden // heads, dtype=dtype))

    def split(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] to [batch, heads, tokens, hidden / heads]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        k = torch.cat([self.past_k.expand(x.shape[0], -1, -1, -1), self.split(self.k_proj(h))], 2)
        v = torch.cat([self.past_v.expand(x.shape[0], -1, -1, -1), self.split(self.v_proj(h))], 2)
        seen = F.scaled_dot_product_attention(self.split(self.q_proj(h)), k, v)
        x = x + self.o_proj(seen.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        down: Tensor = self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + down


def wide_stack(
    blocks: int, hidden: int = 4096, inner: int = 11008, dtype: torch.dtype = torch.bfloat16, past: int = 128
) -> nn.Sequential:
    """``blocks`` blocks in eval mode, weights normal with variance 1/fan-in, so that activations keep their size."""
    torch.manual_seed(0)
    with torch.device("meta"):
        heads = max(1, hidden // 128)
        stack = nn.Sequential(*(Block(hidden, inner, heads, past, dtype) for _ in range(blocks)))
    stack = stack.to_empty(device="cpu").eval().requires_grad_(False)
    for name, tensor in [*stack.named_buffers(), *stack[0].named_parameters()]:
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 1.0 if "past" in name else tensor.shape[-1] ** -0.5)
    repeat_first_block(stack)
    return stack


def repeat_first_block(stack: nn.Module) -> None:
    """Make the other blocks rotations of the first: other memory, same statistics, and only one block to prune."""
    first, *others = stack.children()
    for i, block in enumerate(others, 1):
        for source, target in zip(first.parameters(), block.parameters(), strict=True):
            target.copy_(source.roll(i, 0))


def wide_case(hidden: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Case:
    """One token of one user."""
    x = torch.randn(1, 1, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Case("1 token", {"input": x}, 1)
