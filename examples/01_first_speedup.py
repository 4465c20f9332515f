"""Prune a model, compile it, and see how much faster it runs than under Inductor.

python examples/01_first_speedup.py            (about a minute)
python examples/01_first_speedup.py --small    (seconds; too small to gain)
"""

import sys

import torch
from torch import nn

import sparsec
from sparsec.timing import interleave, speedup

width, inner = (128, 256) if "--small" in sys.argv else (4096, 11008)
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)) for _ in range(2))
).to(torch.bfloat16)
x = torch.randn(1, width, dtype=torch.bfloat16)

print(sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8}))

dense = torch.compile(model)
sparse = torch.compile(model, backend="sparsec")
with torch.inference_mode():
    difference = (sparse(x) - dense(x)).abs().max() / dense(x).abs().max()
    times = interleave({"inductor": lambda: dense(x), "sparsec": lambda: sparse(x)}, rounds=30, budget_s=30)

ratio = speedup(times["inductor"], times["sparsec"])
print(f"\nlargest difference to Inductor: {float(difference):.1e} (bf16 rounds at 4e-3)")
for name, samples in times.items():
    print(f"{name:9s} {1e3 * samples.median:7.3f} ms")
print(f"speedup   {ratio.value:7.2f}x   95 % interval {ratio.low:.2f} - {ratio.high:.2f}")
