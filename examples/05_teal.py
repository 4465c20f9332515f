"""Zero what is small in front of every linear layer: how much, where, and what it costs, token by token.

python examples/05_teal.py [MODEL TEXT]   MODEL: a local Hugging Face folder, TEXT: a file to calibrate and judge on;
                                          a tiny random Llama and random tokens by default
"""

import sys

import torch

import sparsec
from sparsec.models import load_model
from sparsec.passes.gates.layers import gated_tokens, gates_of

names = [word for word in sys.argv[1:] if not word.startswith("--")]
loaded = load_model(names[0] if names else "tiny:llama")
model = loaded.model
if len(names) > 1 and loaded.tokenizer is not None:
    with open(names[1], encoding="utf-8") as file:
        ids = torch.tensor(loaded.tokenizer(file.read(), verbose=False)["input_ids"])
else:
    ids = torch.randint(1, 256, (40 * 64,), generator=torch.Generator().manual_seed(0))
windows = ids[: len(ids) // 64 * 64].view(-1, 1, 64)[:80]
calibration, test = windows[: len(windows) // 2], windows[len(windows) // 2 :]


@torch.no_grad()
def loss() -> float:
    """Nats a token on windows that calibration does not see."""
    found = []
    for window in test:
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]))
    return float(torch.stack(found).mean())


dense = loss()
report = sparsec.sparsify(model, {"method": "teal", "sparsity": 0.5}, list(calibration), progress=False)
print(report)

print(f"\ndense              {dense:.4f} nats a token")
print(f"all tokens gated   {loss():.4f}")
with gated_tokens(model, "last-half"):  # as the paper's own code evaluates: half of each window is a dense context
    print(f"last half gated    {loss():.4f}")

# What was written into the model is plain PyTorch.
name, place, gate = next(gates_of(model))
print(f"\n{name}, {place}: {gate}")
