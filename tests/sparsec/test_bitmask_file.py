"""Weights stored by bits, as compressed-tensors wrote them, load into plain models; damaged ones are refused."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import sparsec
from sparsec.errors import BadModelFile, SparsecError
from sparsec.models import load_model

# Written by compressed-tensors 0.9.4: BitmaskCompressor(BitmaskConfig()).compress, safetensors, zlib, base 85.
BITMASK = (
    "c-qTgVgQ3`rTF;V)RM%M#FE7LcqOZ9rL_E_+{6+kE2V-GrCJ@OM7^T?^7#C;wBpo~Vvu}FNo7GQP}<YXL`g@fI3p3ni#CqcQ39I*R~c=fV`LHwHUX*#"
    "mtG@Gy+$TFCI%qQNyJ%?X@ZG?j)?`t1OnC@V$p1&V`>I*ds1d1ioI^eM)<vLYNlgm0nwYBpIcCrT3no(g4+Z`156{#EOZPFppM6GhLfA28U7Fi8lYon"
    "Xaw^_Np50sHnIt!7RcVv!DfP?5zqvvGYFYrh)qAp1(vb3wF(Lf3{b#|Ml(Zc9tKpv3THLg0|^Hpa)7WKfb;<%7I0)>FaY8UK>PxTe*iIu6HwfV!J)xH"
    "6KFsX7Z(6*?#w~"
)
TWO_FOUR = (
    "c-nix00GrX@$tE-C5b7CC5iFzN><fMY57IDi6u%_N(CiKwK__Pdc_%u1*ssJl#)siL&?+3L`g>pDjaR3V;HNW1lFIQmR6ivQVbL{&@nWN1?x`E&n+lQ"
    "EiO(?K{mq4&Cm?R3^PnK49#>*3?POiWtQY77H1=y5Nd&<-w0E`iGhxZNo;Mc0thfc{mTQT8|)bz9yl;K3OFh_7C1IIb~sLO+~Ih@@i4Ou4*;)<Qhx"
)

_TMP = [HealthCheck.function_scoped_fixture]


class Model(nn.Module):
    """A linear layer [N, K] and, for the first file, a vector that is stored by bits too."""

    def __init__(self, n: int, k: int, bias: bool, dtype: torch.dtype, b: int = 0) -> None:
        super().__init__()
        self.a = nn.Linear(k, n, bias=bias, dtype=dtype)
        if b:
            self.b = nn.LayerNorm(b, bias=False, dtype=torch.bfloat16)


def written(text: str, file: Path) -> Path:
    file.write_bytes(zlib.decompress(base64.b85decode(text)))
    return file


def test_a_sparse_bitmask_file_of_compressed_tensors_gives_the_dense_weights(tmp_path: Path) -> None:
    model = Model(3, 12, True, torch.float32, b=5)
    sparsec.load(written(BITMASK, tmp_path / "model.safetensors"), model)
    expected = torch.zeros(3, 12)
    expected[0, [0, 3, 5, 8, 10]] = torch.tensor([1.0, 4, 6, 9, 11])
    expected[2, [1, 4, 6, 9, 11]] = torch.tensor([26.0, 29, 31, 34, 36])
    assert torch.equal(model.a.weight, expected)
    assert model.a.bias.tolist() == [1, 2, 3]
    assert model.b.weight.tolist() == [0, 2, 0, 4, 0]


def test_a_sparse_24_bitmask_file_of_compressed_tensors_gives_the_dense_weights(tmp_path: Path) -> None:
    model = Model(2, 12, False, torch.bfloat16)
    sparsec.load(written(TWO_FOUR, tmp_path / "model.safetensors"), model)
    rows = [[1, 2, 0, 0, 0, 0, 7, 8, 9, 10, 0, 0], [0, 0, 15, 16, 17, 18, 0, 0, 0, 0, 23, 24]]
    assert model.a.weight.tolist() == rows


def by_bits(name: str, weight: torch.Tensor, offsets: bool) -> dict[str, torch.Tensor]:
    """The parts of a weight as the layout is documented, written a second way: with loops."""
    rows, columns = weight.shape
    masks = np.zeros((rows, -(-columns // 8)), dtype=np.uint8)
    values, starts = [], []
    for r in range(rows):
        starts.append(len(values))
        for c in range(columns):
            if weight[r, c] != 0:
                masks[r, c // 8] |= 1 << (c % 8)
                values.append(weight[r, c])
    kept = torch.stack(values) if values else weight.new_zeros(0)
    parts = {"compressed": kept, "bitmask": torch.from_numpy(masks), "shape": torch.tensor([rows, columns])}
    if offsets:
        parts["row_offsets"] = torch.tensor(starts)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_TMP)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 40),
    zeros=st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    old_name=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_weight_comes_back_bit_for_bit(
    tmp_path: Path, n: int, k: int, zeros: float, dtype: torch.dtype, old_name: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g).to(dtype)
    weight[torch.rand(n, k, generator=g) < zeros] = 0
    weight[0, 0] = float("nan")
    file = tmp_path / "model.safetensors"
    save_file(by_bits("a.weight" if old_name else "a", weight, seed % 2 == 0), file)
    model = Model(n, k, False, dtype)
    sparsec.load(file, model)
    assert torch.equal(model.a.weight.view(torch.uint8), weight.view(torch.uint8))


def test_parts_may_lie_in_different_shards_and_values_widen(tmp_path: Path) -> None:
    weight = torch.randn(6, 20).bfloat16() * (torch.rand(6, 20) < 0.5)
    parts = by_bits("a", weight, True)
    names = sorted(parts)
    for i, name in enumerate(names):
        save_file({name: parts[name]}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = Model(6, 20, False, torch.float32)
    sparsec.load(tmp_path, model)
    assert torch.equal(model.a.weight, weight.float())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a.compressed": torch.zeros(3)}, r"a.bitmask keeps \d+ values and a.compressed has 3"),
        ({"a.bitmask": torch.zeros(4, 2, dtype=torch.uint8)}, r"a.bitmask is \(4, 2\) for a weight of \(4, 30\)"),
        ({"a.shape": torch.tensor([4, -1])}, r"a.shape says \(4, -1\)"),
        ({"a.shape": torch.tensor([4, 29])}, r"a.bitmask keeps|is \(4, 29\) there and \(4, 30\) in the model"),
        ({"a.row_offsets": torch.zeros(4, dtype=torch.int64)}, "a.row_offsets are not where the rows"),
        ({"a.compressed": None}, "it has a.bitmask and no a.compressed"),
        ({"b.weight": torch.zeros(2)}, "has unexpected b.weight"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_the_model_stays(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    parts: dict[str, Any] = by_bits("a", torch.eye(4, 30) + torch.eye(4, 30).flip(1), True) | change
    save_file({name: t for name, t in parts.items() if t is not None}, tmp_path / "model.safetensors")
    model = Model(4, 30, False, torch.float32)
    before = model.a.weight.detach().clone()
    with pytest.raises(BadModelFile, match=says):
        sparsec.load(tmp_path, model)
    assert torch.equal(model.a.weight, before)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(zlib.decompress(base64.b85decode(BITMASK)))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path / "model.safetensors"
    file.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    try:
        sparsec.load(file, Model(3, 12, True, torch.float32, b=5))
    except SparsecError:
        return


def llama_folder(folder: Path, **config: Any) -> tuple[Path, Any]:
    """A folder as llm-compressor saved it, and the dense model that it holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96)).eval()
    sparsec.sparsify(model, {"method": "magnitude", "pattern": "2:4"}, progress=False)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        by = name.endswith("proj.weight")
        state |= by_bits(name.removesuffix(".weight"), tensor, False) if by else {name: tensor.clone()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "global_sparsity": 0.5},
        **config,
    }
    (folder / "config.json").write_text(json.dumps(said))
    return folder, model


@torch.no_grad()
def test_a_whole_checkpoint_is_a_model_for_every_command(tmp_path: Path) -> None:
    folder, model = llama_folder(tmp_path)
    loaded = load_model(str(folder))
    ids = torch.arange(7)[None]
    assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.kind == "causal"
    assert load_model(str(folder), "bf16").dtype == "bf16"


def test_a_checkpoint_that_is_quantised_too_is_refused(tmp_path: Path) -> None:
    folder, _ = llama_folder(tmp_path, config_groups={"group_0": {"weights": {"num_bits": 8}}})
    with pytest.raises(BadModelFile, match=r"stored by bits .* and quantised too"):
        load_model(str(folder))
