"""ONNX export: the file computes what PyTorch does, in plain ONNX Runtime and with our library."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import sparsec
import sparsec.onnx
from sparsec import cli
from sparsec.codegen.onnx import bodies
from sparsec.errors import BadModelFile, BadOptionValue, MissingPackage, VerifyError, WriteFailed
from sparsec.export_onnx import ALLOWED, checked, explain_file, export_onnx, rewrite_file
from sparsec.onnx_rewrite import TOO_MANY
from sparsec.onnx_verify import differences, first_difference


class Layers(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(96, 128, bias=bias)
        self.second = nn.Linear(128, 48, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def pruned() -> Layers:
    torch.manual_seed(0)
    model = Layers().eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8}, progress=False)
    return model


def run(path: Path, *inputs: torch.Tensor, ours: bool = True, exact: bool = False) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    plain = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session = sparsec.onnx.session(path, exact=exact) if ours else plain
    feed = {said.name: x.numpy() for said, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(4, 96), (2, 3, 96)], ids=str)
def test_the_file_computes_what_pytorch_does_at_any_batch(tmp_path: Path, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Layers(bias).eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8}, progress=False)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, (torch.randn(shape),), path, min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["bitmap+fp32", "bitmap+fp32"]
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert report.bytes < 0.4 * report.dense_bytes
    assert set(report.errors) == {"sparsec", "plain"}
    for rows in (1, 5, 40):
        x = torch.randn(rows, *shape[1:])
        for ours in (True, False):
            (y,) = run(path, x, ours=ours)
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_the_file_is_valid_and_holds_operators_with_bodies(tmp_path: Path, pruned: Layers) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(pruned, (torch.randn(4, 96),), path, min_speedup=0)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {"", "sparsec"}
    assert {f.name for f in model.functions} == {"Linear_bitmap_fp32"}
    assert not {"first.weight", "second.weight"} & {t.name for t in model.graph.initializer}


def test_a_portable_file_has_standard_operators_only(tmp_path: Path, pruned: Layers) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(pruned, (torch.randn(4, 96),), path, portable=True, min_speedup=0)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}


def test_a_dense_model_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export_onnx(Layers().eval(), (torch.randn(4, 96),), path, min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["dense", "dense"]
    assert all(layer.reason for layer in report.layers)


def test_a_layer_beyond_what_32_bits_count_stays_dense_and_says_so(
    tmp_path: Path, pruned: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MOST", 20_000)  # about 2/3 of the first layer's padded positions; the second has half
    report = export_onnx(pruned, (torch.randn(4, 96),), tmp_path / "model.onnx", min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["dense", "bitmap+fp32"]
    assert report.layers[0].reason == TOO_MANY


def test_tied_weights_are_in_the_file_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(256, 256, bias=False)
            self.b = nn.Linear(256, 256, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    model = Tied().eval()
    with torch.no_grad():
        model.a.weight.mul_(torch.rand(256, 256) < 0.2)
    path = tmp_path / "model.onnx"
    export_onnx(model, (torch.randn(4, 256),), path, min_speedup=0)
    assert path.stat().st_size < 0.35 * 4 * 256 * 256


def test_an_encoder_with_ids_and_a_mask_takes_any_batch_and_length(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    model = BertModel(config).eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8}, progress=False)
    ids = torch.randint(0, 64, (2, 10))
    path = tmp_path / "bert.onnx"
    report = export_onnx(
        model, (), path, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, min_speedup=0
    )
    assert sum(layer.decision != "dense" for layer in report.layers) == 13
    ids = torch.randint(0, 64, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask)
    found, pooled = run(path, ids, mask)
    torch.testing.assert_close(found, want.last_hidden_state, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pooled, want.pooler_output, rtol=1e-3, atol=1e-4)


def test_a_file_of_another_tool_is_rewritten(tmp_path: Path, pruned: Layers) -> None:
    source, path = tmp_path / "source.onnx", tmp_path / "out.onnx"
    export_onnx(pruned, (torch.randn(4, 96),), source, portable=True)
    report = rewrite_file(source, path, min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["bitmap+fp32", "bitmap+fp32"]
    x = torch.randn(3, 96)
    torch.testing.assert_close(run(path, x)[0], pruned(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
def test_a_file_that_is_no_model_is_one_sentence(tmp_path: Path, pruned: Layers, how: str) -> None:
    path = tmp_path / "model.onnx"
    if how != "missing":
        export_onnx(pruned, (torch.randn(4, 96),), path, min_speedup=0, verify=False)
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no model at all"}[how])
    with pytest.raises(BadModelFile):
        sparsec.onnx.session(path)


def test_an_operator_of_another_version_is_refused_by_name(tmp_path: Path, pruned: Layers) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(pruned, (torch.randn(4, 96),), path, min_speedup=0)
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.domain == "sparsec")
    next(a for a in node.attribute if a.name == "version").i = 99
    onnx.save(model, path)
    with pytest.raises(BadModelFile, match="written by another version of sparsec"):
        sparsec.onnx.session(path)


def test_a_model_that_onnx_cannot_hold_is_one_sentence_with_the_operator(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigh(x).eigenvalues

    with pytest.raises(BadModelFile, match="cannot export it"):
        export_onnx(Odd(), (torch.eye(8),), tmp_path / "model.onnx", verify=False)


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path, pruned: Layers) -> None:
    with pytest.raises(WriteFailed):
        export_onnx(pruned, (torch.randn(4, 96),), tmp_path / "no" / "such" / "folder.onnx", verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 0.1])
def test_a_difference_is_an_error(error: float) -> None:
    with pytest.raises(VerifyError, match="y of file"):
        checked({"plain": {"y": error}}, "file")


def test_without_onnx_runtime_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackage, match=r"pip install 'sparsec\[onnx\]'"):
        sparsec.onnx.session("model.onnx")


def test_an_old_runtime_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.18.0")
    with pytest.raises(MissingPackage, match=r"onnxruntime>=1\.22"):
        sparsec.onnx.session("model.onnx")


@pytest.mark.parametrize(
    ("words", "why"), [(["export"], "say what to write"), (["export", "--onnx", "x.onnx"], "name either a model")]
)
def test_the_command_says_what_is_missing(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 2
    assert why in capsys.readouterr().err


def test_the_command_writes_a_file_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.onnx"
    assert cli.run(["export", "tiny:bert@80", "--onnx", str(path), "--json"]) == 0
    assert path.stat().st_size > 0
    assert '"errors"' in capsys.readouterr().out
    np.testing.assert_equal(onnx.load(path).opset_import[0].version >= 21, True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_decoder_generates_the_tokens_of_pytorch_with_its_cache(tmp_path: Path, family: str) -> None:
    from sparsec.onnx_decoder import export_decoder, generate
    from sparsec.tiny import tiny_model

    loaded = tiny_model(f"tiny:{family}")
    sparsec.sparsify(loaded.model, {"method": "magnitude", "sparsity": 0.8, "ignore": ["lm_head"]}, progress=False)
    path = tmp_path / "decoder.onnx"
    report = export_decoder(loaded.model.float(), path, min_speedup=0)
    assert any(layer.decision != "dense" for layer in report.layers)
    ids = torch.randint(0, loaded.config.vocab_size, (3, 5))
    want = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(generate(sparsec.onnx.session(path), ids, 6), want)


def test_layers_that_follow_each_other_are_all_replaced(tmp_path: Path) -> None:
    """What a layer reads may be what a replaced one gave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.Linear(64, 32)).eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8}, progress=False)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, (torch.randn(2, 3, 64),), path, min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["bitmap+fp32"] * 3
    x = torch.randn(4, 3, 64)
    torch.testing.assert_close(run(path, x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["int8", "int8-static"])
def test_layers_that_round_their_inputs_run_integer_kernels(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    model, data = Layers().eval(), [torch.randn(8, 96) for _ in range(4)]
    recipe = [{"method": "magnitude", "sparsity": 0.8}, {"method": "rtn", "bits": 8, "activations": how}]
    sparsec.sparsify(model, recipe, data, progress=False)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, (torch.randn(2, 3, 96),), path, min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["bitmap+int8", "bitmap+int8"]
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert not ops & {"Round", "Clip", "ReduceMax", "MatMul"}
    assert ("Linear_bitmap_int8_x8_fixed" in ops) == (how == "int8-static")
    for x in (torch.randn(5, 3, 96), 5 * torch.randn(2, 3, 96)):
        for ours in (True, False):
            (y,) = run(path, x, ours=ours)
            torch.testing.assert_close(y, model(x), rtol=1e-3, atol=2e-2 * float(model(x).abs().max()))


def test_explain_reads_a_file_of_any_tool_and_one_of_ours(
    tmp_path: Path, pruned: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours = tmp_path / "source.onnx", tmp_path / "ours.onnx"
    export_onnx(pruned, (torch.randn(4, 96),), source, portable=True)
    export_onnx(pruned, (torch.randn(4, 96),), ours, min_speedup=0)
    before = source.read_bytes()
    report = explain_file(source, min_speedup=0)
    assert [(layer.decision, round(layer.zeros, 1)) for layer in report.layers] == [("bitmap+fp32", 0.8)] * 2
    assert source.read_bytes() == before
    assert cli.run(["explain", str(ours)]) == 0
    out = capsys.readouterr().out
    assert out.count("an operator of sparsec already") == 2
    assert "80.0%" in out


def test_a_wrong_pack_is_found_and_named(tmp_path: Path, pruned: Layers) -> None:
    """A value of the second layer is changed where only our kernel reads it: the mask, with the body's gaps as they
    were."""
    path = tmp_path / "model.onnx"
    export_onnx(pruned, (torch.randn(4, 96),), path, min_speedup=0)
    model = onnx.load(path)
    masks = next(t for t in model.graph.initializer if t.name == "second.masks")
    array = onnx.numpy_helper.to_array(masks).copy()
    at = next(i for i, byte in enumerate(array) if byte & 1 and not byte & 2)
    array[at] ^= 3  # the same number of values, one of them at another place
    masks.CopyFrom(onnx.numpy_helper.from_array(array, masks.name))
    onnx.save(model, path)
    x = torch.randn(4, 96)
    errors = differences(path, [x], [pruned(x)])
    assert errors["plain"][next(iter(errors["plain"]))] < 1e-5
    with pytest.raises(VerifyError, match="first in second"):
        checked(errors, str(path), lambda: first_difference(path, [x], ALLOWED))


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "ours"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_dense_layers_of_4_bits_are_small_and_standard(tmp_path: Path, portable: bool, symmetric: bool) -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    recipe = {"method": "rtn", "bits": 4, "group": 32, "symmetric": symmetric}
    sparsec.sparsify(model, recipe, progress=False)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, (torch.randn(2, 3, 96),), path, portable=portable)
    assert [layer.decision for layer in report.layers] == ["int4g32", "int4g32"]
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    assert path.stat().st_size < 0.3 * report.dense_bytes
    x = torch.randn(5, 3, 96)
    largest = float(model(x).abs().max())
    assert max(error for of in report.errors.values() for error in of.values()) < 1e-4
    torch.testing.assert_close(run(path, x)[0], model(x), rtol=0, atol=2e-2 * largest)  # x is rounded
    assert float((run(path, x, exact=True)[0] - model(x)).abs().max()) < 1e-4 * largest


@pytest.mark.parametrize("static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("portable", [True, False], ids=["portable", "ours"])
def test_dense_layers_of_int8_and_rounded_inputs_are_integer_products(
    tmp_path: Path, portable: bool, static: bool
) -> None:
    torch.manual_seed(0)
    model, data = Layers().eval(), [torch.randn(8, 96) for _ in range(4)]
    recipe = {"method": "rtn", "bits": 8, "activations": "int8-static" if static else "int8"}
    sparsec.sparsify(model, recipe, data, progress=False)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, (torch.randn(2, 3, 96),), path, portable=portable)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    own = ops.count("Linear_panel_int8_x8" + ("_fixed" if static else ""))
    assert ops.count("MatMulInteger") + own == 2
    assert [layer.decision for layer in report.layers].count("panel+int8") == own
    assert not (portable and own)
    assert "MatMul" not in ops
    assert path.stat().st_size < 0.55 * report.dense_bytes  # what names and shapes take in a file this small, included
    for x in (torch.randn(5, 3, 96), 4 * torch.randn(1, 3, 96), torch.zeros(2, 3, 96)):
        for y in (run(path, x, ours=ours)[0] for ours in (True, False)):
            torch.testing.assert_close(y, model(x), rtol=1e-3, atol=2e-2 * float(model(x).abs().max()))
    x = torch.randn(1, 3, 96)
    x[0, 0, 3], x[0, 1, 4] = float("nan"), float("inf")
    for y in (run(path, x, ours=ours)[0] for ours in (True, False)):
        assert torch.equal(y.isnan(), model(x).isnan())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(300, 96), Layers()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(ids))


@pytest.mark.parametrize(("compress", "most"), [("bitmap", 0.32), ("sparse_initializer", 0.65)])
def test_constants_with_zeros_are_small_until_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: str, most: float
) -> None:
    from sparsec import onnx_small

    monkeypatch.setattr(onnx_small, "LEAST", 1000)
    torch.manual_seed(0)
    model = Words().eval()
    for weight in (model.table.weight, model.layers.first.weight, model.layers.second.weight):
        weight.data[torch.rand(weight.shape) < 0.8] = 0
    path, ids = tmp_path / "model.onnx", torch.randint(0, 300, (2, 5))
    report = export_onnx(model, (ids,), path, portable=True, compress=compress)
    assert report.bytes < most * report.dense_bytes
    assert max(error for of in report.errors.values() for error in of.values()) < 1e-6
    onnx.checker.check_model(onnx.load(path), full_check=compress == "bitmap")
    torch.testing.assert_close(run(path, ids[:1, :3], ours=False)[0], model(ids[:1, :3]), rtol=1e-4, atol=1e-5)


def test_an_unknown_way_to_compress_is_one_sentence(tmp_path: Path, pruned: Layers) -> None:
    with pytest.raises(BadOptionValue, match="bitmap, sparse_initializer"):
        export_onnx(pruned, (torch.randn(2, 96),), tmp_path / "model.onnx", compress="zip")


@pytest.mark.parametrize("asked", [True, False])
def test_large_files_keep_their_weights_beside_them(
    tmp_path: Path, pruned: Layers, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """What is above 2 GiB, and who asks: a limit of a few bytes takes the same way."""
    if not asked:
        monkeypatch.setattr(importlib.import_module("sparsec.export_onnx"), "_EXTERNAL", 1000)
    path = tmp_path / "model.onnx"
    for _ in range(2):  # over an earlier one, too
        report = export_onnx(pruned, (torch.randn(2, 96),), path, min_speedup=0, external=asked)
    beside = tmp_path / "model.onnx.data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.bytes == path.stat().st_size + beside.stat().st_size
    assert beside.stat().st_size > path.stat().st_size / 4
    beside.write_bytes(beside.read_bytes()[:100])
    with pytest.raises(BadModelFile):
        sparsec.onnx.session(path)


def test_a_portable_file_runs_in_another_runtime(tmp_path: Path, pruned: Layers) -> None:
    openvino = pytest.importorskip("openvino")
    path, x = tmp_path / "model.onnx", torch.randn(4, 96)
    export_onnx(pruned, (x,), path, portable=True, compress="bitmap")
    found = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    torch.testing.assert_close(torch.from_numpy(found), pruned(x), rtol=1e-4, atol=1e-5)
