"""A recipe: several patterns in one model, exceptions by name, read from YAML.

python examples/03_recipe.py            (the MiniLM encoder)
python examples/03_recipe.py --small    (a tiny random encoder)
"""

import sys
import tempfile
from pathlib import Path

import sparsec
from sparsec.errors import RecipeError
from sparsec.models import load_model

RECIPE = """\
version: 1
ignore: ["*pooler*"]
steps:
  - method: magnitude
    sparsity: 0.7
    targets: ["*.attention.*"]
  - method: magnitude
    pattern: 2:4                      # keep 2 of 4; stays a text, YAML would make a number of it
    targets: ["*.intermediate.dense"]
  - method: magnitude
    sparsity: 0.8
    targets: ["re:encoder\\\\.layer\\\\.\\\\d+\\\\.output\\\\.dense"]
    overrides:
      "*.layer.0.output.dense": {sparsity: 0.5}
      "*.layer.1.output.dense": skip
"""

model = load_model("tiny:bert" if "--small" in sys.argv else "minilm").model
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    report = sparsec.sparsify(model, path, progress=False)
print(report)

# Mistakes are one sentence, and nothing has been pruned when they are found.
try:
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.5, "targets": ["*.quer"]}, progress=False)
except RecipeError as mistake:
    print(f"\nrefused: {mistake}")
