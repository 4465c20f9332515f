"""Saved models are ordinary checkpoints, whole or not there at all; loading is strict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparsec import io
from sparsec.errors import BadModelFile, ModelNotFound, OutputExists, WriteFailed
from sparsec.io import load, save
from sparsec.sparsify import sparsify

STRANGER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsec":
            raise ImportError("sparsec is not here")

sys.meta_path.insert(0, Refuse())
sys.modules.pop("sparsec", None)
try:
    import sparsec
except ImportError:
    pass
else:
    raise SystemExit("sparsec could be imported")
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
logits = model(input_ids=torch.arange(8)[None]).logits
zeros = (model.model.layers[0].mlp.up_proj.weight == 0).float().mean().item()
print(repr((zeros, logits.sum().item())))
"""


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, **changes)).eval()


def stack(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_loads_where_sparsec_cannot_be_imported(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    report = sparsify(model, {"method": "magnitude", "pattern": "2:4"}, progress=False)
    out = save(model, tmp_path / "out", report)
    done = subprocess.run([sys.executable, "-c", STRANGER, str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    zeros, logits = eval(done.stdout)
    assert zeros == 0.5
    assert logits == pytest.approx(model(input_ids=torch.arange(8)[None]).logits.sum().item(), rel=1e-4)


def test_a_saved_folder_is_plain_and_says_how_it_was_made(tmp_path: Path) -> None:
    model = llama()
    report = sparsify(model, {"method": "magnitude", "sparsity": 0.7}, progress=False)
    out = save(model, tmp_path / "out", report)
    assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {0o644}
    config = json.loads((out / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config"} & set(config)
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == report.recipe.to_dict()
    facts = json.loads((out / "sparsec.json").read_text())
    assert facts["recipe_sha"] == report.recipe.sha
    assert facts["layers"][0]["achieved"] == pytest.approx(0.7, abs=1e-2)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    again = llama()
    sparsify(again, out / "recipe.yaml", progress=False)
    assert same(again, model)


def test_the_tokenizer_is_saved_beside_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    save(llama(), tmp_path / "out", tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == [1]


@pytest.mark.parametrize("name", ["out", "out/model.safetensors"])
def test_any_module_is_saved_and_loaded_with_its_buffers(tmp_path: Path, name: str) -> None:
    model, other = stack(), stack(1)
    model(torch.randn(4, 16))  # moves the running statistics of the norm
    report = sparsify(model, "magnitude", progress=False)
    save(model, tmp_path / name, report)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    versions = [p._version for p in other.parameters()]
    assert load(tmp_path / name, other) is other
    assert same(other, model)
    assert all(p._version > v for p, v in zip(other.parameters(), versions, strict=True))


class Shared(nn.Module):
    """Two layers of one weight, a view of it as a buffer, and a transposed parameter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.register_buffer("part", self.a.weight.detach()[:2])
        self.turned = nn.Parameter(torch.randn(4, 6).t())


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    model, other = Shared(0), Shared(1)
    save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a.bias", "a.weight", "b.bias", "part", "turned"]
    load(tmp_path / "out", other)
    assert same(other, model)
    assert other.b.weight is other.a.weight


def test_a_compiled_module_is_saved_and_loaded_under_its_own_names(tmp_path: Path) -> None:
    model, other = stack(), stack(1)
    save(torch.compile(model), tmp_path / "out")
    load(tmp_path / "out", torch.compile(other))
    assert same(other, model)


def test_a_transformers_checkpoint_in_shards_is_loaded(tmp_path: Path) -> None:
    model, other = llama(), llama()
    sparsify(model, "magnitude", progress=False)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    load(tmp_path / "out", other)
    assert same(other, model)


def test_a_tied_head_is_found_under_its_other_name(tmp_path: Path) -> None:
    model, other = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    sparsify(model, "magnitude", progress=False)
    load(save(model, tmp_path / "out"), other)
    assert same(other, model)


def _drop(state: dict[str, torch.Tensor]) -> None:
    del state["2.bias"]


def _add(state: dict[str, torch.Tensor]) -> None:
    state["head.weight"] = torch.zeros(1)


def _reshape(state: dict[str, torch.Tensor]) -> None:
    state["0.weight"] = torch.zeros(8, 15)


def _widen(state: dict[str, torch.Tensor]) -> None:
    state["0.weight"] = state["0.weight"].double()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_drop, r"misses 2\.bias"),
        (_add, r"has unexpected head\.weight"),
        (_reshape, r"0\.weight is \(8, 15\) there and \(8, 16\) in the model"),
        (_widen, r"0\.weight is torch\.float64 there; call model\.to"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_copied(
    tmp_path: Path, spoil: Any, words: str
) -> None:
    state = {k: v.clone() for k, v in stack().state_dict().items()}
    spoil(state)
    save_file(state, tmp_path / "m.safetensors")
    other = stack(1)
    with pytest.raises(BadModelFile, match=words):
        load(tmp_path / "m.safetensors", other)
    assert same(other, stack(1))


def test_values_widen_without_a_word(tmp_path: Path) -> None:
    model, other = stack().to(torch.bfloat16), stack(1)
    save(model, tmp_path / "out")
    load(tmp_path / "out", other)
    assert other[0].weight.dtype == torch.float32
    assert torch.equal(other[0].weight, model[0].weight.float())


def test_files_that_are_no_checkpoint_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        load(tmp_path / "nope", stack())
    with pytest.raises(BadModelFile, match=r"holds no model\.safetensors"):
        load(tmp_path, stack())
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(BadModelFile, match=r"model\.safetensors"):
        load(tmp_path, stack())
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadModelFile, match="damaged"):
        load(tmp_path, stack())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(BadModelFile, match="gone"):
        load(tmp_path, stack())


def test_a_model_without_weights_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_and_recipe_is_replaced_and_anything_else_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = stack()
    report = sparsify(model, "magnitude", progress=False)
    save(model, out, report)
    first = (out / "model.safetensors").read_bytes()
    same_again = stack()
    save(same_again, out, sparsify(same_again, "magnitude", progress=False))
    assert (out / "model.safetensors").read_bytes() == first
    other = stack(7)
    for model, said, words in (
        (stack(), {"method": "magnitude", "sparsity": 0.6}, "a model pruned with another recipe"),
        (other, "magnitude", "another model pruned with this recipe"),
    ):
        report = sparsify(model, said, progress=False)
        with pytest.raises(OutputExists, match=words):
            save(model, out, report)
        assert (out / "model.safetensors").read_bytes() == first
    save(other, out, report, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_checkpoints_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save(stack(), out)  # an empty folder is fine
    (out / "runs").mkdir()
    (out / "runs" / "log.txt").write_text("precious")
    with pytest.raises(OutputExists, match="files that sparsec did not write"):
        save(stack(), out)
    with pytest.raises(OutputExists, match="more than a checkpoint"):
        save(stack(), out, overwrite=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("precious")
    with pytest.raises(OutputExists, match="more than a checkpoint"):
        save(stack(), notes, overwrite=True)
    with pytest.raises(OutputExists, match="a file"):
        save(stack(), notes / "a.txt", overwrite=True)
    assert (notes / "a.txt").read_text() == (out / "runs" / "log.txt").read_text() == "precious"


FULL_DISK = """
import resource, signal, sys
import torch
from sparsec.errors import WriteFailed
from sparsec.io import save
model = torch.nn.Linear(512, 512)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    save(model, sys.argv[1] + sys.argv[2])
except WriteFailed as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["/out", "/out.safetensors"])
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "could not be written" in done.stdout, done.stderr
    assert "\n" not in done.stdout.strip()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    save(stack(), out)
    first = (out / "model.safetensors").read_bytes()
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(io.os, "replace", replace)
    with pytest.raises(WriteFailed, match="No space left on device"):
        save(stack(1), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
import torch
from sparsec import io
io._take_place = lambda folder, target: os.kill(os.getpid(), signal.SIGKILL)
io.save(torch.nn.Linear(8, 8), sys.argv[1])
"""


def test_a_killed_save_leaves_no_model_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    with io._new_folder(tmp_path / "out") as busy:  # another process, still writing
        save(nn.Linear(8, 8), out)
        assert busy.is_dir()
        (busy / "late").touch()
        (out / "model.safetensors").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteFailed, match="could not be written"):
        save(stack(), tmp_path / "file" / "out")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(stack(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
