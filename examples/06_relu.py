"""A model whose MLPs have a ReLU: zeros of activations are found and skipped, without a recipe and without a loss.

python examples/06_relu.py [MODEL TEXT]   MODEL: a local Hugging Face folder with ReLU in its MLP, TEXT: a file of text;
                                          a random Llama with ReLU and random tokens by default
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsec
from sparsec.meter import meters
from sparsec.models import load_model

names = [word for word in sys.argv[1:] if not word.startswith("--")]
if names:
    loaded = load_model(names[0])
    model = loaded.model
    with open(names[1], encoding="utf-8") as file:
        ids = torch.tensor(loaded.tokenizer(file.read(), verbose=False)["input_ids"])
else:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, hidden_act="relu",
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.randint(0, 256, (2048,))
model.train(False)
windows = list(ids[: len(ids) // 64 * 64].view(-1, 1, 64)[:32])

print(sparsec.calibrate(model, windows))  # how many zeros there are, which the graph cannot know
token = windows[0][:, :1]
fast = torch.compile(model, backend="sparsec")
with torch.no_grad():
    print(sparsec.explain(model, token))
    for window in windows[:4]:
        for i in range(8):  # token by token, as in decoding
            step = window[:, i : i + 1]
            difference = (fast(step).logits - model(step).logits).abs().max()
            assert difference < 1e-2, difference
print("\n".join(map(str, meters())) or "no layer is expected to gain here: larger ones do, or those with more zeros")
