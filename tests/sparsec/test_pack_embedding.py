"""Embeddings in packs: rows decoded as they are asked for, tied to a head or not, in memory and in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.errors import BadOptionValue, BadPackedFile, PackedLayer
from sparsec.pack import pack_, packed_layers, unpack_
from sparsec.packed import PackedEmbedding, PackedLinear
from sparsec.packed_file import report_of

FORCED = {"min_speedup": 0}


class Language(nn.Module):
    """A table, a layer, a head that may share the table."""

    def __init__(self, rows: int = 100, width: int = 64, tied: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(rows, width, padding_idx=3)
        self.up = nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for weight in {id(w): w for w in (self.embed.weight, self.up.weight, self.head.weight)}.values():
                weight.masked_fill_(torch.rand(weight.shape) < 0.8, 0)
        self.to(dtype).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.embed(ids)))


def grid_(weight: torch.Tensor, bits: int) -> None:
    """Put a weight on a grid of integers times one scale a row."""
    with torch.no_grad():
        top = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / top
        weight.copy_((weight / scale).round().clamp(-top, top) * scale)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70), width=st.integers(1, 150), zeros=st.sampled_from([0.6, 0.9, 1.0]),
    shape=st.lists(st.integers(0, 9), max_size=3), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    int32=st.booleans(),
)  # fmt: skip
def test_rows_of_a_packed_embedding_are_those_of_the_table(
    rows: int, width: int, zeros: float, shape: list[int], dtype: torch.dtype, int32: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(rows, width)).to(dtype)
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(rows, width) < zeros, 0)
    ids = torch.randint(rows, shape, dtype=torch.int32 if int32 else torch.int64)
    want = model(ids)
    before = model[0].weight
    report = pack_(model, "reference", options=FORCED)
    if report.packed:
        assert isinstance(model[0], PackedEmbedding)
        assert report.bytes < report.dense_bytes
    else:
        assert model[0].weight is before
        assert report.rows[0].reason
    assert torch.equal(model(ids), want)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_table_on_a_grid_is_packed_as_its_integers(bits: int) -> None:
    model = nn.Sequential(nn.Embedding(256, 128))
    grid_(model[0].weight, bits)
    ids = torch.tensor([[0, 255, 17], [17, 3, 100]])
    want = model(ids)
    report = pack_(model, "reference")
    assert report.rows[0].format.endswith(f"int{bits}"), report.rows[0]
    assert report.bytes < 1.2 * report.dense_bytes * bits / 32
    assert torch.equal(model(ids), want)
    assert "decoded" in str(report)


def test_a_table_without_zeros_or_a_grid_stays_dense_with_a_reason() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Embedding(64, 32, max_norm=1.0))
    report = pack_(model, "reference")
    assert [row.name for row in report.rows] == ["0"]  # one that rescales its rows is no table
    assert "smaller" in report.rows[0].reason
    assert type(model[0]) is nn.Embedding


def test_a_convolution_stays_dense_with_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    report = pack_(model, "reference", options=FORCED)
    assert report.rows[0].shape == (8, 36)
    assert "convolutions are not packed in place" in report.rows[0].reason


def test_wrong_row_numbers_are_an_error_as_before() -> None:
    model = Language()
    pack_(model, "reference", options=FORCED)
    for wrong in (100, -1):
        with pytest.raises(IndexError, match="out of range"):
            model.embed(torch.tensor([0, wrong]))


def test_an_embedding_alone_cannot_replace_itself() -> None:
    with pytest.raises(BadOptionValue, match="cannot replace itself"):
        pack_(nn.Embedding(4, 4), "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_language_model_is_packed_saved_loaded_compiled_and_unpacked(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    dense = Language(tied=tied, dtype=dtype)
    model, ids = copy.deepcopy(dense), torch.tensor([[1, 99, 3], [3, 0, 17]])
    want, loose = dense(ids), 1e-4 if dtype == torch.float32 else 5e-2
    report = pack_(model, "reference", options=FORCED)
    assert len(report.packed) == (2 if tied else 3)
    assert (model.embed._pack[1] is model.head._pack[1]) == tied
    assert torch.equal(model.embed(ids), dense.embed(ids))
    torch.testing.assert_close(model(ids), want, rtol=loose, atol=loose)
    file = sparsec.save(model, tmp_path / "model.safetensors")
    loaded = sparsec.load(file, Language(tied=tied, dtype=dtype))
    assert (loaded.embed._pack[1] is loaded.head._pack[1]) == tied
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=0)
    assert loaded.embed.padding_idx == 3
    assert {row.name: row.tied for row in report_of(file).rows} == {row.name: row.tied for row in report.packed}
    assert report_of(file).bytes == sum(row.packed_bytes for row in report.packed)
    torch._dynamo.reset()
    fast = torch.compile(loaded, backend="sparsec", fullgraph=True, options={"target": "reference"})
    torch.testing.assert_close(fast(ids), want, rtol=loose, atol=loose)
    torch.testing.assert_close(fast(ids[:1, :2]), want[:1, :2], rtol=loose, atol=loose)
    unpack_(loaded)
    assert type(loaded.embed) is nn.Embedding
    assert (loaded.embed.weight is loaded.head.weight) == tied
    assert loaded.embed.padding_idx == 3
    assert torch.equal(loaded.embed.weight, dense.embed.weight)


@torch.no_grad()
def test_a_tied_head_is_a_site_under_torch_compile_and_its_table_is_named() -> None:
    model, ids = Language(), torch.tensor([[1, 99, 3]])
    report = sparsec.explain(model, ids, options={**FORCED, "target": "reference"})
    assert [layer.name for layer in report.layers] == ["up", "head"]
    assert [refusal.names for refusal in report.not_taken] == [("embed",)]
    assert all(layer.decision != "dense" for layer in report.layers)
    assert any("reads only the rows" in refusal.reason for refusal in report.not_taken)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsec", options={**FORCED, "target": "reference", "verify": True})
    torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_a_file_of_an_embedding_does_not_load_into_a_linear(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": Language().embed})
    pack_(model, "reference", options=FORCED)
    file = sparsec.save(model, tmp_path / "model.safetensors")
    with pytest.raises(BadPackedFile, match=r"packed embedding .* has a Linear"):
        sparsec.load(file, nn.ModuleDict({"a": nn.Linear(64, 100, bias=False)}))


def test_packed_embeddings_refuse_to_move_or_train() -> None:
    model = Language()
    pack_(model, "reference", options=FORCED)
    assert {type(layer) for layer in packed_layers(model).values()} == {PackedLinear, PackedEmbedding}
    with pytest.raises(PackedLayer):
        model.half()
    with pytest.raises(PackedLayer):
        model.embed.requires_grad_()
    assert "embed" in str(model)


def test_without_a_compiler_rows_come_from_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.errors import NoCompiler, SparsecWarning
    from sparsec.runtime import packed as runtime

    model = nn.Sequential(nn.Embedding(37, 129))
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(37, 129) < 0.8, 0)
    want = model(torch.arange(37))
    pack_(model, "reference", options=FORCED)

    def fails(*_: Any) -> Any:
        raise NoCompiler(tried="g++")

    meta = model[0]._pack[0].clone()
    monkeypatch.setattr(runtime.build, "build", fails)
    with pytest.warns(SparsecWarning, match="run slowly"):
        runtime.resolve(meta)
    assert torch.equal(model(torch.arange(37)), want)
