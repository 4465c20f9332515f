"""Models packed in place: the same answers without dense weights, and everything else said in a sentence."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.errors import BadOptionValue, BadPack, BuildError, PackedLayer, SparsecWarning, UnknownOption
from sparsec.pack import PackReport, pack_, packed_layers, unpack_
from sparsec.packed import PackedLinear, checked, dense_of
from sparsec.runtime import packed as runtime
from sparsec.runtime.packed import Meta

FORCED = {"min_speedup": 0}


def sparse_(weight: torch.Tensor, zeros: float, seed: int = 0) -> torch.Tensor:
    """Set a share of a weight to zero, in place."""
    with torch.no_grad():
        return weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < zeros, 0)


def stack(zeros: float = 0.8, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.ReLU(), nn.Linear(160, 48, bias=False)).to(dtype).eval()
    for seed, layer in enumerate((model[0], model[2])):
        sparse_(layer.weight, zeros, seed)
    return model


def packed_stack(zeros: float = 0.8, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """(dense, packed)."""
    dense = stack(zeros, dtype)
    model = copy.deepcopy(dense)
    pack_(model, "reference", options=FORCED)
    assert len(packed_layers(model)) == 2
    return dense, model


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), atol=1e-5 if b.dtype == torch.float32 else 3e-2, rtol=1e-4)


INPUTS = [(1, 96), (3, 96), (40, 96), (2, 5, 96), (96,), (0, 96), (2, 0, 96)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_model_answers_as_the_dense_one_for_every_shape_of_x(dtype: torch.dtype) -> None:
    dense, model = packed_stack(dtype=dtype)
    for shape in INPUTS:
        x = torch.randn(shape).to(dtype)
        assert close(model(x), dense(x)), shape
        assert model(x).dtype == dtype
    x = torch.randn(96, 33).to(dtype).t()
    assert close(model(x), dense(x))


@torch.no_grad()
def test_a_packed_model_compiles_without_a_graph_break_and_for_any_batch() -> None:
    dense, model = packed_stack()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, options={"target": "reference"})
    for rows in (1, 2, 7, 64):
        x = torch.randn(rows, 96)
        assert close(compiled(x), dense(x))
    assert packed_layers(model)


@torch.no_grad()
def test_blocks_of_one_shape_share_graphs_though_their_packs_differ_in_size() -> None:
    torch._dynamo.reset()
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(12)).eval()
    for i, block in enumerate(blocks):
        sparse_(block[0].weight, 0.7 + 0.02 * i, i)
    dense = copy.deepcopy(blocks)
    pack_(blocks, "reference", options={**FORCED, "formats": "index"})
    graphs = 0

    def count(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    x = torch.randn(4, 64)
    for block, before in zip(blocks, dense, strict=True):
        assert close(torch.compile(block, backend=count)(x), before(x))
    assert graphs <= 3


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    zeros=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
    bf16=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_unpacking_gives_the_weights_back_bit_for_bit(n: int, k: int, zeros: float, bf16: bool, seed: int) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, n, dtype=dtype))
    sparse_(model[0].weight, zeros, seed)
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    report = pack_(model, "reference", options=FORCED)
    if report.packed:
        assert isinstance(model[0], PackedLinear)
        assert torch.equal(dense_of(model[0]), weight)
        assert report.rows[0].packed_bytes < report.rows[0].dense_bytes
    unpack_(model)
    assert type(model[0]) is nn.Linear
    bits = torch.int16 if bf16 else torch.int32
    assert torch.equal(model[0].weight.view(bits), weight.view(bits))
    assert torch.equal(model[0].bias, bias)
    assert model[0].weight.requires_grad
    assert model[0].bias.requires_grad


def test_negative_zeros_become_zeros_and_nothing_else_changes() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 64) < 0.2)
    weight = model[0].weight.detach().clone()
    report = pack_(model, "reference", options=FORCED)
    assert report.rows[0].negative_zeros > 0
    assert torch.equal(unpack_(model)[0].weight, weight)


@pytest.mark.parametrize("loop", ["dot", "outer", "unpack"])
@pytest.mark.parametrize("format", ["bitmap", "index", "nm:2:4"])
@torch.no_grad()
def test_each_loop_of_a_pack_serves_any_number_of_rows(format: str, loop: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 75))
    w = model[0].weight
    w.view(75, 50, 4)[..., 2:] = 0
    expected = copy.deepcopy(model)
    pack_(model, "reference", options={**FORCED, "formats": format})
    layer = model[0]
    layer._pack[0].data, old = with_routes(layer, ((0, loop),)), layer._pack[0]
    assert Meta.decode(old).format == f"{format}+fp32"
    for rows in (0, 1, 5, 130):
        x = torch.randn(rows, 200)
        assert close(model(x), expected(x))


def with_routes(layer: PackedLinear, routes: tuple[tuple[int, str], ...]) -> torch.Tensor:
    from dataclasses import replace

    return replace(Meta.decode(layer._pack[0]), routes=routes).encode()


@torch.no_grad()
def test_large_batches_are_multiplied_block_by_block() -> None:
    """A weight of several blocks (8 MB each), whose last one is cut off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 2500))
    sparse_(model[0].weight, 0.7)
    expected = copy.deepcopy(model)
    pack_(model, "reference", options=FORCED)
    model[0]._pack[0].data = with_routes(model[0], ((0, "dot"), (4, "unpack")))
    for rows in (3, 4, 9):
        x = torch.randn(rows, 2048)
        assert close(model(x), expected(x))


# ------------------------------------------------------------------------------------------- what stays dense, ties


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.up, self.again = nn.Linear(32, 64), nn.Linear(32, 64)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight
        self.again.weight = self.up.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x) + self.up(x) * self.again(x)


@torch.no_grad()
def test_a_head_tied_to_an_embedding_and_tied_linears_share_one_pack() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    sparse_(model.embed.weight, 0.8)
    sparse_(model.up.weight, 0.8)
    dense = copy.deepcopy(model)
    report = pack_(model, "reference", options=FORCED)
    ids = torch.arange(5)
    assert close(model(ids), dense(ids))
    assert model.head._pack[1] is model.embed._pack[1]
    assert torch.equal(model.embed(ids.view(1, 5)), dense.embed(ids.view(1, 5)))
    rows = {row.name: row for row in report.rows}
    assert rows["embed"].tied == ("head",)
    assert rows["embed"].plan is not None
    assert rows["up"].tied == ("again",)
    assert model.up._pack[1] is model.again._pack[1]
    assert model.up.bias is not model.again.bias
    unpack_(model)
    assert model.up.weight is model.again.weight
    assert model.head.weight is model.embed.weight
    assert close(model(ids), dense(ids))


def test_weights_that_do_not_pay_are_left_alone_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double(), nn.Linear(64, 64, device="meta"))
    before = [layer.weight for layer in model]
    report = pack_(model, "reference")
    assert [layer.weight for layer in model] == before or all(a.weight is b for a, b in zip(model, before, strict=True))
    assert not report.packed
    assert report.bytes == report.dense_bytes
    reasons = [row.reason for row in report.rows]
    assert "zero" in reasons[0]
    assert "float64 has no CPU kernel" in reasons[1]
    assert "no values yet" in reasons[2]
    assert "0 of 3 weights packed" in str(report)


def test_layers_that_a_parent_reads_itself_stay_dense() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)).eval()
    for layer in (model[0].linear1, model[0].linear2):
        sparse_(layer.weight, 0.9)
    report = pack_(model, "reference", options=FORCED)
    assert not report.packed
    assert "reads the weights of its layers itself" in report.rows[0].reason


def test_a_module_in_two_places_stays_one_module() -> None:
    shared = nn.Linear(64, 64)
    sparse_(shared.weight, 0.9)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = pack_(model, "reference", options=FORCED)
    assert len(report.rows) == 1
    assert isinstance(model["a"], PackedLinear)
    assert model["a"] is model["b"][0]  # type: ignore[index]


def test_forward_hooks_go_on_working() -> None:
    model = stack()
    seen: list[int] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    pack_(model, "reference", options=FORCED)
    with torch.no_grad():
        model(torch.randn(1, 96))
    assert seen == [160]


@torch.no_grad()
def test_transformers_models_pack_and_generate() -> None:
    from sparsec.tiny import tiny_model

    loaded = tiny_model("tiny:llama")
    model = loaded.model.eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            sparse_(parameter, 0.8)
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    report = pack_(model, "reference", options=FORCED)
    assert report.packed
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 9)


@torch.no_grad()
def test_conv1d_of_gpt2_packs_and_comes_back() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            sparse_(parameter, 0.8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    report = pack_(model, "reference", options=FORCED)
    assert any(row.name.endswith("c_attn") for row in report.packed)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)
    unpack_(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(model(input_ids=ids).logits, before)


# --------------------------------------------------------------------------------------- state, copies, refusals


@torch.no_grad()
def test_copies_and_pickles_of_a_packed_model_work() -> None:
    dense, model = packed_stack()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(3, 96)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert close(other(x), dense(x))
        assert other[0]._pack[1].data_ptr() != model[0]._pack[1].data_ptr()
        assert other[0]._pack[1] is other[0].pack0


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_a_packed_state_dict_loads_whatever_its_format_and_size(assign: bool) -> None:
    _, model = packed_stack(0.5)
    dense, other = packed_stack(0.95)
    assert other[0].format != model[0].format
    state = other.state_dict()
    model.load_state_dict(state, assign=assign)
    x = torch.randn(3, 96)
    assert close(model(x), dense(x))
    assert model[0].format == other[0].format
    assert (model[0].pack0.data_ptr() == other[0].pack0.data_ptr()) is assign
    assert sum(b.numel() * b.element_size() for b in model[0].buffers()) >= model[0].packed_bytes


@pytest.mark.parametrize("name", ["0.pack0", "0.work", "0.meta", "0.pack1"])
def test_a_damaged_state_dict_is_refused_in_a_sentence(name: str) -> None:
    _, model = packed_stack()
    state = copy.deepcopy(model.state_dict())
    state[name].view(torch.uint8)[-1 if name != "0.meta" else 3] ^= 1
    with pytest.raises(RuntimeError, match="the pack of a layer cannot be used"):
        model.load_state_dict(state)


def test_a_dense_checkpoint_does_not_load_into_a_packed_model() -> None:
    dense, model = packed_stack()
    with pytest.raises(RuntimeError, match=r"call sparsec.unpack_\(model\) before loading"):
        model.load_state_dict(dense.state_dict())


def test_moving_and_casting_are_refused_and_what_changes_nothing_is_not() -> None:
    _, model = packed_stack()
    layer = model[0]
    for change in (lambda: layer.to(torch.bfloat16), lambda: layer.half(), lambda: layer.to("meta"), layer.double):
        with pytest.raises(PackedLayer, match=r"call sparsec.unpack_\(model\) first"):
            change()
    assert model.to(torch.float32).to("cpu").float() is model
    model.share_memory()
    assert layer._pack[1] is layer.pack0
    assert layer._pack[1].is_shared()


def test_training_is_refused_in_a_sentence() -> None:
    _, model = packed_stack()
    with pytest.raises(PackedLayer, match=r"gradients cannot flow through a packed layer\. Run under torch.no_grad"):
        model(torch.randn(2, 96, requires_grad=True))
    with pytest.raises(PackedLayer, match="cannot be trained"):
        model[0].requires_grad_()
    assert not any(p.requires_grad for p in model.parameters())
    assert model(torch.randn(2, 96)).requires_grad is False  # plain inputs need no gradient, so nothing is lost


@torch.no_grad()
def test_autocast_gives_the_dtype_that_dense_gives() -> None:
    dense, model = packed_stack()
    x = torch.randn(4, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = dense(x), model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert found.dtype == compiled.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=3e-2)
    assert torch.equal(found, compiled)


def test_another_dtype_of_x_is_refused_as_in_a_linear() -> None:
    _, model = packed_stack()
    with torch.no_grad(), pytest.raises(RuntimeError, match="x is BFloat16, the packed weight Float"):
        model(torch.randn(2, 96).bfloat16())
    with torch.no_grad(), pytest.raises(RuntimeError, match="95 columns"):
        model(torch.randn(2, 95))


@torch.no_grad()
def test_code_that_reads_the_weight_gets_the_dense_values_also_when_compiled() -> None:
    dense, model = packed_stack()
    assert torch.equal(model[0].weight, dense[0].weight)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x.to(model[0].weight.dtype) @ model[0].weight.t()

    x = torch.randn(2, 96)
    assert torch.allclose(torch.compile(f, backend="eager", fullgraph=True)(x), f(x))


def test_the_ops_have_the_shapes_and_tags_that_torch_compile_asks_for() -> None:
    _, model = packed_stack()
    layer = model[0]
    for x in (torch.randn(3, 96), torch.randn(2, 4, 96)):
        args = (x, layer.bias, list(layer._pack), 160)
        torch.library.opcheck(
            torch.ops.sparsec.linear_packed.default, args, test_utils=("test_schema", "test_faketensor")
        )
    args = (list(layer._pack), 160, 96, torch.float32)
    torch.library.opcheck(torch.ops.sparsec.unpack_packed.default, args, test_utils=("test_schema", "test_faketensor"))


@torch.no_grad()
def test_a_packed_model_exports() -> None:
    dense, model = packed_stack()
    x = torch.randn(3, 96)
    program = torch.export.export(model, (x,))
    assert close(program.module()(x), dense(x))


@torch.no_grad()
def test_without_a_compiler_the_answer_is_right_and_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = packed_stack()
    fresh = with_routes(model[0], ((0, "dot"), (77, "outer")))  # a meta that this process has not met

    def fails(*args: Any) -> Any:
        raise BuildError(detail="no compiler here")

    monkeypatch.setattr(runtime.build, "build", fails)
    model[0]._pack[0].data = fresh
    x = torch.randn(3, 96)
    with pytest.warns(SparsecWarning, match="no compiler here"):
        assert close(model(x), dense(x))
    assert torch.equal(model[0].weight, dense[0].weight)


@torch.no_grad()
def test_verify_compares_packed_calls_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.runtime.store import STORE

    _, model = packed_stack()
    monkeypatch.setenv("SPARSEC_VERIFY", "1")
    model[0]._pack[0].data = with_routes(model[0], ((0, "dot"), (78, "outer")))
    before = STORE.verified
    model(torch.randn(3, 96))
    assert STORE.verified == before + 1


def test_a_wrong_set_of_tensors_is_no_pack() -> None:
    _, model = packed_stack()
    pack = list(model[0]._pack)
    for wrong in (pack[:-1], pack[1:], [*pack, pack[-1]], [], [pack[0], *pack[1:-1], pack[-1][:-1]]):
        with pytest.raises(BadPack, match="Pack the dense model again"):
            checked(wrong)
    with pytest.raises(RuntimeError, match="the pack has"):
        torch.ops.sparsec.linear_packed(torch.randn(1, 96), None, [*pack, pack[-1]], 160)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(BadOptionValue, match="put it into a module"):
        pack_(nn.Linear(4, 4))
    with pytest.raises(UnknownOption):
        pack_(stack(), options={"minspeedup": 0})
    with pytest.raises(BadOptionValue, match="packs for CPUs"):
        pack_(stack(), "cuda:sm_90")


def test_packing_twice_changes_nothing_more() -> None:
    _, model = packed_stack()
    before = dict(model.named_buffers())
    assert pack_(model, "reference", options=FORCED).rows == ()
    assert all(b is before[name] for name, b in model.named_buffers())


def test_the_report_says_what_having_no_dense_weight_costs() -> None:
    model = stack(0.5)
    report = sparsec.pack_(model, "reference", options=FORCED)
    assert isinstance(report, PackReport)
    row = report.rows[0]
    assert row.format.startswith("bitmap")
    assert row.shape == (160, 96)
    assert row.dense_bytes == 160 * 96 * 4
    assert row.packed_bytes == model[0].packed_bytes
    said = str(report)
    assert "dense faster from" in said
    assert "2 of 2 weights packed" in said
    assert report.to_dict()["layers"][0]["dense_from"] == row.dense_from


@torch.no_grad()
def test_explain_names_packed_layers_and_does_not_call_them_missing() -> None:
    _, model = packed_stack()
    said = str(sparsec.explain(model, torch.randn(2, 96), options={"target": "reference"}))
    assert "every linear layer is packed already" in said
    assert "already packed as index+fp32" in said or "already packed as bitmap+fp32" in said
    assert "no linear layer was found" not in said


def test_the_command_packs_saves_and_explains_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsec.cli import run
    from sparsec.models import load_model

    out = str(tmp_path / "out")
    command = ["pack", "tiny:llama@80", "-o", out, "--target", "reference", "--min-speedup", "0"]
    assert run(command) == 0
    assert "weights packed" in capsys.readouterr().out
    assert run(["explain", out]) == 0
    table = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj" in table
    assert "dense faster from" in table
    assert run(["explain", f"{out}/packed.safetensors", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 15
    assert run(command) == 2
    assert "already holds a packed model" in capsys.readouterr().err
    assert run([*command, "--overwrite", "--formats", "nonsense"]) == 2
    loaded = load_model(out)
    ids = loaded.inputs(1, 6)
    with torch.no_grad():
        assert torch.allclose(loaded.model(**ids).logits, load_model("tiny:llama@80").model(**ids).logits, atol=1e-4)
