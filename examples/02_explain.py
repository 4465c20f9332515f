"""Why is my pruned model not faster? One reason a layer, as text, as a dict, and as one HTML page.

python examples/02_explain.py            (the MiniLM encoder)
python examples/02_explain.py --small    (a tiny random encoder)
"""

import sys

import torch

import sparsec
from sparsec.models import load_model

loaded = load_model("tiny:bert" if "--small" in sys.argv else "minilm")
model, inputs = loaded.model, loaded.inputs(batch=1, tokens=16)

# Prune what is large; leave the attention of the first layer dense, to see its reason.
sparsec.sparsify(
    model,
    {"method": "magnitude", "sparsity": 0.8, "ignore": ["*.layer.0.attention.*"]},
    progress=False,
)

with torch.inference_mode():
    explanation = sparsec.explain(model, **inputs)
print(explanation)

# The same facts for programs: every layer has a decision and a reason.
for layer in explanation.layers:
    if layer.decision == "dense" and layer.density > 0.9:
        print(f"dense, as it should be: {layer.name}: {layer.reason}")
        break

if "--html" in sys.argv:
    with open("explain.html", "w", encoding="utf-8") as page:
        page.write(explanation.to_html())
    print("wrote explain.html")
