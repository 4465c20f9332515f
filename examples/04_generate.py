"""A pruned language model under ``generate``: the same tokens as eager PyTorch, through sparsec.

python examples/04_generate.py [MODEL]      MODEL: a local Hugging Face folder; a tiny random Llama by default
"""

import sys
import time
from typing import Any

import torch

import sparsec
from sparsec.integrations.transformers import compile_
from sparsec.models import load_model

names = [word for word in sys.argv[1:] if not word.startswith("--")]
loaded = load_model(names[0] if names else "tiny:llama")
model: Any = loaded.model
sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8, "ignore": ["lm_head"]}, progress=False)

prompt = loaded.tokenizer("The ferry leaves at", return_tensors="pt") if loaded.tokenizer else loaded.inputs(1, 8)
arguments = {
    "input_ids": prompt["input_ids"],
    "attention_mask": prompt["attention_mask"],
    "max_new_tokens": 8 if "--small" in sys.argv else 32,
    "do_sample": False,
}

with torch.inference_mode():
    eager = model.generate(**arguments)
    compile_(model)  # from here on, calls of the model and generate run through sparsec
    compiled = model.generate(**arguments)  # the first one compiles
    started = time.perf_counter()
    model.generate(**arguments)
    seconds = time.perf_counter() - started

made = compiled.shape[1] - prompt["input_ids"].shape[1]
print(f"{made} tokens in {seconds:.2f} s ({1e3 * seconds / made:.1f} ms a token)")
print("equal to eager" if torch.equal(eager, compiled) else "differs from eager where two tokens are nearly as likely")
print(loaded.tokenizer.decode(compiled[0]) if loaded.tokenizer else compiled[0].tolist())
