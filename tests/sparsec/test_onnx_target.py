"""``options={"target": "onnxruntime"}``: graphs run in ONNX Runtime with our kernels, and the rest with Inductor."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec.errors import MissingPackage, SparsecWarning, UnknownTarget
from sparsec.records import recording
from sparsec.runtime import onnx_parts

OPTIONS: dict[str, Any] = {"target": "onnxruntime", "min_speedup": 0.0}


class Net(nn.Module):
    def __init__(self, between: Any = torch.relu) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 128), nn.Linear(128, 48)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def prune_(model: nn.Module, share: float = 0.8) -> nn.Module:
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data[torch.rand(weight.shape) < share] = 0
    return model.eval()


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        yield
    torch._dynamo.reset()
    gc.collect()


def compiled(model: Any, **more: Any) -> Any:
    return torch.compile(model, backend="sparsec", options=OPTIONS | more)


def operators() -> list[str]:
    """What became of every layer of every session that lives."""
    sessions = [s for part in list(onnx_parts.PARTS.values()) for s in part.sessions.values()]
    return [layer.decision for session in sessions for layer in session.layers]


@pytest.mark.parametrize("shape", [(96,), (4, 96), (2, 3, 96), (0, 96)], ids=str)
def test_a_pruned_model_runs_our_kernels_in_onnx_runtime(shape: tuple[int, ...]) -> None:
    model, x = prune_(Net()), torch.randn(shape)
    run = compiled(model)
    with recording() as records:
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(2 * x), model(2 * x), rtol=1e-4, atol=1e-5)
    assert operators() == ["bitmap+fp32", "bitmap+fp32"]
    assert [layer.decision.at(1).format for r in records for layer in r.layers] == ["bitmap+fp32", "bitmap+fp32"]


def test_one_graph_serves_any_number_of_rows() -> None:
    model = prune_(Net())
    run = torch.compile(model, backend="sparsec", options=OPTIONS, dynamic=True)
    for rows in (3, 5, 17):
        x = torch.randn(rows, 7, 96)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(onnx_parts.PARTS) == 1


def test_what_onnx_has_no_operator_for_stays_with_inductor_and_is_named() -> None:
    model = prune_(Net(between=lambda x: torch.special.i0e(x).sort(-1).values))
    x = torch.randn(5, 96)
    with recording() as records:
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-5)
    reasons = [declined.reason for r in records for declined in r.declined]
    assert any("i0e" in reason and "Inductor" in reason for reason in reasons), reasons
    assert len(onnx_parts.PARTS) == 2
    assert operators() == ["bitmap+fp32", "bitmap+fp32"]


def test_another_precision_stays_with_inductor_and_is_named() -> None:
    model, x = prune_(Net()).to(torch.bfloat16), torch.randn(5, 96).to(torch.bfloat16)
    with recording() as records:
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=2e-2, atol=2e-2)
    assert not onnx_parts.PARTS
    assert any("bfloat16" in declined.reason for r in records for declined in r.declined)


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "another tensor", "data and invalidate"])
def test_new_weights_are_seen(how: str) -> None:
    model, x = prune_(Net()), torch.randn(4, 96)
    run = compiled(model)
    run(x)
    if how == "in place":
        model.first.weight.mul_(3.0)
    elif how == "load_state_dict":
        model.load_state_dict(prune_(Net(), 0.5).state_dict())
    elif how == "another tensor":
        model.first.weight = nn.Parameter(torch.randn(128, 96))
    else:
        model.first.weight.data.copy_(torch.randn(128, 96))
        sparsec.invalidate(model)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert sum(len(part.sessions) for part in onnx_parts.PARTS.values()) == 1


def test_blocks_that_share_a_graph_have_a_session_each() -> None:
    blocks = [prune_(Net(), share) for share in (0.5, 0.0, 0.9)]
    run = torch.compile(lambda block, x: block(x), backend="sparsec", options=OPTIONS)
    x = torch.randn(4, 96)
    for _ in range(2):
        for block in blocks:
            torch.testing.assert_close(run(block, x), block(x), rtol=1e-4, atol=1e-4)
    assert sum(len(part.sessions) for part in onnx_parts.PARTS.values()) == 3
    del blocks[1:], block
    gc.collect()
    assert sum(len(part.sessions) for part in onnx_parts.PARTS.values()) == 1


def test_weights_that_change_at_every_call_are_left_to_pytorch() -> None:
    model, x = prune_(Net()), torch.randn(4, 96)
    run = compiled(model)

    def change_and_compare() -> None:
        for _ in range(8):
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
            model.first.weight.mul_(1.01)

    with pytest.warns(SparsecWarning, match="change too often"):
        change_and_compare()
    assert not operators()


def test_a_session_that_cannot_be_made_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx_parts, "rewrite", broken)
    model, x = prune_(Net()), torch.randn(4, 96)
    with pytest.warns(SparsecWarning, match="no space left"):
        found = compiled(model)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_a_call_that_onnx_runtime_refuses_falls_back_with_the_reason() -> None:
    model, x = prune_(Net()), torch.randn(4, 96)
    run = compiled(model)
    run(x)
    (session,) = (s for part in onnx_parts.PARTS.values() for s in part.sessions.values())

    def refuse(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    session.run = refuse
    with pytest.warns(SparsecWarning, match="out of memory"):
        found = run(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_parts_go_when_what_was_compiled_goes() -> None:
    model, x = prune_(Net()), torch.randn(4, 96)
    compiled(model)(x)
    assert len(onnx_parts.PARTS) == 1
    torch._dynamo.reset()
    gc.collect()
    assert not onnx_parts.PARTS


class Remembers(nn.Module):
    """A cache that every call writes."""

    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 96))
        self.layer = nn.Linear(96, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.mul_(0.5).add_(x)
        return torch.relu(self.layer(self.cache))


def test_a_cache_that_calls_write_is_no_weight() -> None:
    model = prune_(Remembers())
    run, expected = compiled(model), torch.zeros(4, 96)
    for _ in range(8):
        x = torch.randn(4, 96)
        expected = 0.5 * expected + x
        torch.testing.assert_close(run(x), torch.relu(model.layer(expected)), rtol=1e-4, atol=1e-5)
    assert sum(s.uses for part in onnx_parts.PARTS.values() for s in part.sessions.values()) == 8


def test_dense_weights_are_not_copied() -> None:
    model, x = Net().eval(), torch.randn(4, 96)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-5)
    (session,) = (s for part in onnx_parts.PARTS.values() for s in part.sessions.values())
    addresses = {value.data_ptr() for value in session.held if hasattr(value, "data_ptr")}
    assert {model.first.weight.data_ptr(), model.second.weight.data_ptr()} <= addresses


def test_verify_compares_with_pytorch() -> None:
    model, x = prune_(Net()), torch.randn(4, 96)
    compiled(model, verify=True)(x)
    (part,) = onnx_parts.PARTS.values()
    part._verify([torch.ones(3)], [torch.ones(3)])
    with pytest.raises(sparsec.errors.VerifyError):
        part._verify([torch.ones(3)], [torch.zeros(3)])


def test_attention_with_bool_masks_and_ids() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 64)
            self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
            self.norm = nn.LayerNorm(64)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.norm(self.table(ids))
            q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            y = self.out(y.transpose(1, 2).flatten(2))
            return nn.functional.gelu(y), y.argmax(-1) > 3

    model = prune_(Attends())
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    for found, wanted in zip(compiled(model)(ids, mask), model(ids, mask), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert operators().count("bitmap+fp32") == 2


def test_explain_tells_what_runs_there() -> None:
    model, x = prune_(Net()), torch.randn(4, 96)
    report = sparsec.explain(model, x, options=OPTIONS)
    assert [layer.decision for layer in report.layers] == ["bitmap+fp32", "bitmap+fp32"]
    assert "onnxruntime" in str(report)


def test_without_onnx_runtime_the_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(Exception, match="onnxruntime") as found:
        compiled(prune_(Net()))(torch.randn(4, 96))
    assert MissingPackage.__name__ in repr(found.value) or isinstance(found.value, MissingPackage)


def test_there_are_no_variants() -> None:
    with pytest.raises(UnknownTarget):
        sparsec.explain(Net(), torch.randn(4, 96), options={"target": "onnxruntime:avx2"})


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_leave_the_graph_to_inductor(grad: bool) -> None:
    model, x = prune_(Net()), torch.randn(4, 96)
    with torch.set_grad_enabled(grad):
        y = compiled(model)(x)
    assert y.requires_grad == grad
    assert bool(onnx_parts.PARTS) != grad
