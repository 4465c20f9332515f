"""Packed models in files: mapped when loaded, refused in a sentence where they do not fit, never silent garbage."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sparsec
from sparsec import packed_file
from sparsec.errors import BadModelFile, BadPackedFile, OutputExists, SparsecError, WriteFailed
from sparsec.pack import pack_, packed_layers
from sparsec.packed import PackedLinear
from sparsec.packed_file import KEY, NAME, load_packed, report_of
from sparsec.runtime.packed import Meta

FORCED = {"min_speedup": 0}
_TMP = [HealthCheck.function_scoped_fixture]


class Net(nn.Module):
    """Two packed layers that share a weight, one without a bias, a norm with buffers, a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 64)
        self.up, self.again = nn.Linear(64, 64), nn.Linear(64, 64)
        self.down = nn.Linear(64, 64, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 32, bias=False)
        self.again.weight = self.up.weight
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.norm(self.down(self.up(x) + self.again(x))))


def net(zeros: float = 0.8) -> Net:
    model = Net().eval()
    with torch.no_grad():
        for seed, weight in enumerate((model.up.weight, model.down.weight, model.embed.weight)):
            weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < zeros, 0)
        model.norm.running_mean.normal_()
    return model


IDS = torch.arange(7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """(file, what the dense model answers)."""
    model = net()
    with torch.no_grad():
        expected = model(IDS)
    pack_(model, "reference", options=FORCED)
    return sparsec.save(model, tmp_path_factory.mktemp("saved") / "model.safetensors"), expected


@torch.no_grad()
def test_a_saved_packed_model_loads_into_a_dense_one_and_answers_the_same(saved: tuple[Path, torch.Tensor]) -> None:
    file, expected = saved
    torch.manual_seed(5)
    for model in (Net().eval(), net(0.5)):
        assert sparsec.load(file, model) is model
        assert list(packed_layers(model)) == ["embed", "up", "again", "down", "head"]
        assert torch.allclose(model(IDS), expected, atol=1e-5)
        assert model.up._pack[1] is model.again._pack[1]
        assert model.head._pack[1] is model.embed._pack[1]
        assert not model.training


@torch.no_grad()
def test_a_model_without_values_takes_everything_from_the_file(saved: tuple[Path, torch.Tensor]) -> None:
    file, expected = saved
    with torch.device("meta"):
        model = Net().eval()
    sparsec.load(file, model)
    assert torch.allclose(model(IDS), expected, atol=1e-5)
    assert all(t.device.type == "cpu" for t in model.state_dict().values())


@torch.no_grad()
def test_a_packed_model_loads_another_pack_of_its_shape(saved: tuple[Path, torch.Tensor]) -> None:
    file, expected = saved
    model = net(0.5)
    pack_(model, "reference", options=FORCED)
    sparsec.load(file, model)
    assert torch.allclose(model(IDS), expected, atol=1e-5)


def test_loading_maps_the_file_and_copies_nothing(saved: tuple[Path, torch.Tensor]) -> None:
    model = sparsec.load(saved[0], Net())
    places = [tuple(int(x, 16) for x in line.split()[0].split("-"))
              for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(saved[0]))]  # fmt: skip
    assert places
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.numel())]
    for tensor in tensors:
        assert any(lo <= tensor.data_ptr() < hi for lo, hi in places)


def test_packing_is_not_done_again(saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen.cpp import packer

    def fails(*args: Any) -> Any:
        raise AssertionError("packed again")

    for name in ("pack_bitmap", "pack_sliced"):
        monkeypatch.setattr(packer, name, fails)
    sparsec.load(saved[0], Net())


def test_writing_to_a_loaded_model_does_not_change_the_file(saved: tuple[Path, torch.Tensor]) -> None:
    before = saved[0].read_bytes()
    model = sparsec.load(saved[0], Net())
    with torch.no_grad():
        model.embed.weight.fill_(3.0)
    assert saved[0].read_bytes() == before


def test_a_loaded_model_saves_to_the_same_bytes(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    again = sparsec.save(sparsec.load(saved[0], Net()), tmp_path / "again.safetensors")
    with safe_open(saved[0], "pt") as a, safe_open(again, "pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        names = sorted(a.keys())
        assert all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in names)


@torch.no_grad()
def test_a_folder_of_a_transformers_model_holds_its_config_and_loads(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsec.tiny import tiny_model

    model = tiny_model("tiny:llama").model.eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8}, progress=False)
    expected = model(input_ids=IDS[None]).logits
    pack_(model, "reference", options=FORCED)
    folder = sparsec.save(model, tmp_path / "out")
    assert {p.name for p in folder.iterdir()} >= {NAME, "config.json"}
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    sparsec.load(folder, fresh)
    assert torch.allclose(fresh(input_ids=IDS[None]).logits, expected, atol=1e-4)


def test_the_table_of_a_file_needs_no_model(saved: tuple[Path, torch.Tensor]) -> None:
    report = report_of(saved[0])
    assert [(row.name, row.tied) for row in report.rows] == [("again", ("up",)), ("down", ()), ("embed", ("head",))]
    assert all(0 < row.packed_bytes < row.dense_bytes == row.shape[0] * 64 * 4 for row in report.rows)
    assert 0.1 < report.rows[0].density < 0.3
    assert "index" in str(report) or "bitmap" in str(report)


# -------------------------------------------------------------------------------------------------------- refusals


def rewritten(file: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same tensors with other metadata, whose checksum is right."""
    with safe_open(file, "pt") as f:
        names = list(f.keys())
        tensors = {name: f.get_tensor(name) for name in names}
        said = json.loads(f.metadata()[KEY])
    content = {"tensors": tensors, "said": said}
    change(content)
    said["sums"] = {name: packed_file.tensor_sum(name, t) for name, t in tensors.items()}
    text = json.dumps(said, sort_keys=True)
    save_file(tensors, out, metadata={"format": "pt", KEY: text, f"{KEY}_sum": packed_file._hash(text.encode())})
    return out


def with_meta(content: dict[str, Any], **changes: Any) -> None:
    from dataclasses import replace

    content["tensors"]["down.meta"] = replace(Meta.decode(content["tensors"]["down.meta"]), **changes).encode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["said"].update(layout=1), "it has layout version 1, and sparsec .* reads version 3"),
        (lambda c: with_meta(c, version=7), "down has version 7 of the layout index.*version 1 is read here"),
        (lambda c: with_meta(c, target="cpu:neon"), "down was packed for cpu:neon, which this machine cannot run"),
        (lambda c: with_meta(c, format="octal+fp32"), "the pack of down is not one that this version knows"),
        (lambda c: with_meta(c, tensors=2), "the pack of down is not one"),
        (lambda c: with_meta(c, n=48), r"down is a packed linear \[48, 64\] there and \[64, 64\] in the model"),
        (lambda c: c["tensors"].pop("down.pack0"), "the pack of down is not one"),
        (lambda c: c["tensors"].pop("norm.weight"), "it misses norm.weight"),
        (lambda c: c["tensors"].update(more=torch.zeros(2)), "it has more"),
        (lambda c: c["tensors"].update({"norm.weight": torch.zeros(2)}), r"norm.weight is \(2,\) there and \(64,\)"),
        (lambda c: c["tensors"].update({"down.bias": torch.zeros(64)}), "down is .* with a bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_a_sentence_and_the_model_stays(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    file = rewritten(saved[0], tmp_path / "other.safetensors", change)
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadPackedFile, match=says):
        sparsec.load(file, model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not packed_layers(model)


def test_a_layout_that_depends_on_the_isa_is_refused_on_another_one(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsec.codegen.cpp import family

    monkeypatch.setattr(type(family("index")), "isa_bound", True, raising=False)
    load_packed(saved[0], Net())
    file = rewritten(saved[0], tmp_path / "x.safetensors", lambda c: c["said"].update(isas={"down": "amx"}))
    with pytest.raises(BadPackedFile, match=r"is that of .*, and this machine is portable"):
        load_packed(file, Net())


def test_another_architecture_is_refused(saved: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(BadPackedFile, match=r"again is a packed linear \[64, 64\] there, and the model has no such"):
        sparsec.load(saved[0], nn.Sequential(nn.Linear(64, 64)))
    other = Net()
    other.up = nn.Sequential(other.up)  # type: ignore[assignment]
    with pytest.raises(BadPackedFile, match="the model has a Sequential"):
        sparsec.load(saved[0], other)


def test_dense_files_and_packed_models_do_not_mix(tmp_path: Path, saved: tuple[Path, torch.Tensor]) -> None:
    dense = sparsec.save(net(), tmp_path / "dense.safetensors")
    model = sparsec.load(saved[0], Net())
    with pytest.raises(BadModelFile, match=r"it is dense and the model is packed; call sparsec.unpack_"):
        sparsec.load(dense, model)
    with pytest.raises(BadPackedFile, match="it holds no packed model"):
        load_packed(dense, Net())
    with pytest.raises(BadPackedFile, match="cannot be loaded"):
        load_packed(tmp_path / "nothing.safetensors", Net())


# ---------------------------------------------------------------------------------------------------------- damage


def answer_or_sentence(file: Path) -> torch.Tensor | None:
    """What a model loaded from a file answers; None where it was refused by a SparsecError."""
    model = Net().eval()
    try:
        sparsec.load(file, model)
    except SparsecError as error:
        return None if "\n" not in str(error) else torch.zeros(0)
    with torch.no_grad():
        return model(IDS)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_flipped_bits_are_found_or_change_nothing(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(saved[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    where = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for at in data.draw(st.lists(where, min_size=1, max_size=3)):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path / "flipped.safetensors"
    file.write_bytes(content)
    found = answer_or_sentence(file)
    assert found is None or (found.shape == saved[1].shape and torch.allclose(found, saved[1], atol=1e-5))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_TMP)
@given(data=st.data())
def test_files_that_end_early_or_go_on_are_refused(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, data: st.DataObject
) -> None:
    content = saved[0].read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    file = tmp_path / "cut.safetensors"
    file.write_bytes(content[:cut] if data.draw(st.booleans()) else content + b"x" * (cut + 1))
    assert answer_or_sentence(file) is None


@pytest.mark.parametrize("at", [0.3, 0.6, 0.99])
def test_a_flipped_bit_in_a_pack_is_named(saved: tuple[Path, torch.Tensor], tmp_path: Path, at: float) -> None:
    content = bytearray(saved[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(at * (len(content) - header))] ^= 4
    file = tmp_path / "one.safetensors"
    file.write_bytes(content)
    with pytest.raises(BadPackedFile, match=r"the file is damaged: .* does not match its checksum"):
        sparsec.load(file, Net())


FULL = """
import resource, sys, torch
from torch import nn
import sparsec
model = nn.Sequential(nn.Linear(512, 512))
model[0].weight.data.masked_fill_(torch.rand(512, 512) < 0.5, 0)
sparsec.pack_(model, "reference", options={"min_speedup": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    sparsec.save(model, sys.argv[1], overwrite=True)
except sparsec.errors.WriteFailed as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file_whole(
    saved: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(saved[0].read_bytes())
    done = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert WriteFailed.code in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert file.read_bytes() == saved[0].read_bytes()


def test_an_interrupted_save_leaves_the_old_file_whole(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsec import io

    file = tmp_path / "model.safetensors"
    file.write_bytes(saved[0].read_bytes())

    def interrupted(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    model = sparsec.load(file, Net())
    monkeypatch.setattr(io, "save_file", interrupted)
    with pytest.raises(OutputExists):
        sparsec.save(model, file)
    with pytest.raises(KeyboardInterrupt):
        sparsec.save(model, file, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert file.read_bytes() == saved[0].read_bytes()


@torch.no_grad()
def test_a_model_goes_on_answering_when_its_file_is_saved_anew(tmp_path: Path) -> None:
    model = net()
    pack_(model, "reference", options=FORCED)
    file = sparsec.save(model, tmp_path / "m.safetensors")
    loaded = sparsec.load(file, Net().eval())
    expected = loaded(IDS)
    other = net(0.5)
    pack_(other, "reference", options=FORCED)
    sparsec.save(other, file, overwrite=True)
    assert torch.equal(loaded(IDS), expected)
    assert isinstance(loaded.up, PackedLinear)
