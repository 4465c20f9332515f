"""torch.compile(backend="sparsec") with a GPU target, its kernels interpreted on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsec
from sparsec.meter import meters
from sparsec.passes.quantize.contract import Grid
from sparsec.runtime import gpu

TARGET = {"target": "cuda:sm_90", "min_speedup": 0}


def pruned(dtype: torch.dtype = torch.float32, k: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, 64), nn.GELU(), nn.Linear(64, 40, bias=False)).to(dtype).eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8}, progress=False)
    return model


@pytest.fixture(autouse=True)
def _clean() -> None:
    torch._dynamo.reset()
    gpu.TABLE.entries.clear()  # of models that a failed test still holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_pruned_model_gives_its_own_answers(dtype: torch.dtype, rows: int) -> None:
    model = pruned(dtype)
    fast = torch.compile(model, backend="sparsec", options={**TARGET, "verify": True})
    x = torch.randn(rows, 96).to(dtype)
    before = sum(entry.uses for entry in gpu.TABLE.entries.values())
    with torch.inference_mode():
        y, expected = fast(x), model(x)
    torch.testing.assert_close(y.float(), expected.float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)
    assert sum(entry.uses for entry in gpu.TABLE.entries.values()) > before
    assert any(entry.routes for entry in gpu.TABLE.entries.values())


def test_more_rows_than_the_kernel_takes_run_dense() -> None:
    model = pruned()
    fast = torch.compile(model, backend="sparsec", options={**TARGET, "formats": ["index"]}, dynamic=True)
    with torch.inference_mode():
        for rows in (2, 700):
            x = torch.randn(rows, 96)
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_weight_that_changes_is_packed_anew() -> None:
    model = pruned()
    fast = torch.compile(model, backend="sparsec", options=TARGET)
    x = torch.randn(2, 96)
    with torch.no_grad():
        fast(x)
        model[0].weight.mul_(2.0)
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
        model[0].weight.data = model[0].weight.data * 0.5
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


def test_two_models_that_share_a_graph_keep_their_own_packs() -> None:
    first, second = pruned(), pruned()
    with torch.no_grad():
        second[0].weight.neg_()
    fast = [torch.compile(model, backend="sparsec", options=TARGET) for model in (first, second)]
    x = torch.randn(1, 96)
    with torch.inference_mode():
        for ours, model in zip(fast, (first, second), strict=True):
            torch.testing.assert_close(ours(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_dead_weight_leaves_nothing_in_the_table() -> None:
    model = pruned()
    fast = torch.compile(model, backend="sparsec", options=TARGET)
    with torch.inference_mode():
        fast(torch.randn(1, 96))
    held = {key[0] for key in gpu.TABLE.entries}
    mine = {p._cdata for p in model.parameters()} & held
    assert mine
    del model, fast
    torch._dynamo.reset()
    import gc

    gc.collect()
    assert not mine & {key[0] for key in gpu.TABLE.entries}


def test_a_1x1_convolution_runs_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 48, 1)).eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.9}, progress=False)
    fast = torch.compile(model, backend="sparsec", options={**TARGET, "verify": True})
    with torch.inference_mode():
        x = torch.randn(1, 32, 2, 2)
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_larger_convolution_stays_dense_with_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1, stride=2)).eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.9}, progress=False)
    report = sparsec.explain(model, torch.randn(1, 8, 6, 6), options=TARGET)
    assert not report.layers
    assert [refusal.names for refusal in report.not_taken] == [("0,1",)]
    assert "only 1x1 convolutions of stride 1 without padding" in report.not_taken[0].reason


def test_a_stored_transpose_is_verified_as_the_kernel_reads_it() -> None:
    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 40) * (torch.rand(96, 40) < 0.2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    model = Right().eval()
    fast = torch.compile(model, backend="sparsec", options={**TARGET, "verify": True})
    with torch.inference_mode():
        x = torch.randn(2, 96)
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_kernel_that_fails_makes_its_rows_dense_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen.triton import family
    from sparsec.errors import SparsecWarning

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    model = pruned()
    fast = torch.compile(model, backend="sparsec", options={**TARGET, "formats": ["index"]})
    monkeypatch.setattr(type(family("index")), "launches", out_of_memory)
    x = torch.randn(1, 96)
    with torch.inference_mode():
        with pytest.warns(SparsecWarning, match="gather on a .* failed .*no room.* run dense from now on"):
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)  # silent now


def test_no_room_for_a_pack_leaves_the_weight_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen import triton
    from sparsec.errors import SparsecWarning

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    model = pruned()
    monkeypatch.setattr(triton, "pack_verified", out_of_memory)
    fast, x = torch.compile(model, backend="sparsec", options=TARGET), torch.randn(1, 96)
    with torch.inference_mode():
        with pytest.warns(SparsecWarning, match="no room"):
            y = fast(x)
        torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bits", "group", "format"), [(4, 128, "dense+int4g128"), (2, 0, "dense+ternary")])
def test_weights_on_a_grid_run_from_their_codes(bits: int, group: int, format: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 64).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(Grid(bits, group).nearest(layer.weight))
    model = nn.Sequential(layer).eval()
    fast = torch.compile(model, backend="sparsec", options={**TARGET, "formats": ["dense"], "verify": True})
    x = torch.randn(2, 256).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=2e-2, rtol=2e-2)
    (entry,) = (e for e in gpu.TABLE.entries.values() if e.weight() is layer.weight)
    assert {str(route.packed.format) for route in entry.routes} == {format}


class Gated(nn.Module):
    """relu(gate) * up -> down; about one gate in six is open."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(96, 320), nn.Linear(96, 320), nn.Linear(320, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.gate(x) - 0.6) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_halves_of_a_gated_mlp_read_a_part_of_their_weights(dtype: torch.dtype) -> None:
    model = Gated().to(dtype).eval()
    fast = torch.compile(model, backend="sparsec", options={**TARGET, "verify": True}, dynamic=True)
    with torch.inference_mode():
        for rows in (1, 1, 3, 8, 40):
            x = torch.randn(rows, 96).to(dtype)
            torch.testing.assert_close(fast(x), model(x), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)
        for name in ("up", "down"):
            found = [m for m in meters() if m.name == name and m.calls]  # one for each graph
            assert sum(m.skipped for m in found) == sum(m.calls for m in found) == 4  # 40 rows are not asked
            assert all(0.1 < m.left < 0.9 for m in found)
        x = torch.randn(2, 3, 96).to(dtype)
        torch.testing.assert_close(fast(x), model(x), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)


def test_a_layer_whose_zeros_are_gone_runs_as_without_them_and_comes_back() -> None:
    model = Gated().eval()
    fast = torch.compile(model, backend="sparsec", options=TARGET)
    x = torch.randn(1, 96)
    with torch.inference_mode():
        fast(x)
        watches = [r.watch for e in gpu.TABLE.entries.values() for r in e.routes if r.watch and r.watch.calls]
        for watch in watches:
            watch.most = 0
        for _ in range(6):
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
        assert all(w.resting and w.skipped < w.calls for w in watches)
        for watch in watches:
            watch.most, watch.resting = watch.whole, 1
        for _ in range(3):
            fast(x)
    assert not any(w.resting for w in watches)


def test_a_kernel_that_fails_on_a_part_leaves_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen.triton import family
    from sparsec.errors import SparsecWarning

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    model = Gated().eval()
    fast, x = torch.compile(model, backend="sparsec", options=TARGET), torch.randn(1, 96)
    for kind in ("gated", "chosen"):
        monkeypatch.setattr(type(family(kind)), "launches", out_of_memory)
    with torch.inference_mode():
        with pytest.warns(SparsecWarning, match="no room.* it is not tried again"):
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


def test_explain_names_the_zeros_on_a_gpu() -> None:
    report = sparsec.explain(Gated().eval(), torch.randn(1, 96), options=TARGET)
    said = {layer.name: layer.reason for layer in report.layers}
    assert "columns are skipped" in said["down"]
    assert "only rows that are read are computed" in said["up"]
