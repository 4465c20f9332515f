"""The ways a torch.compile backend goes wrong in silence, one test each (design.md law 1).

Every test compares with the eager model on the same weights. ``FORCED`` takes the sparse kernel even where it loses,
so that each test runs one.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import textwrap
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsec
from sparsec.errors import ModeAndOptions, SparsecWarning, UnknownFormat, UnknownOption, UnknownTarget
from sparsec.records import recording
from sparsec.runtime.store import STORE

FORCED: dict[str, Any] = {"min_speedup": 0, "formats": ["bitmap"]}
K = 256


pytestmark = pytest.mark.usefixtures("fresh_graphs")


def prune_(model: nn.Module, sparsity: float = 0.7) -> nn.Module:
    """Random zeros in every matrix of ``model``, in place."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(torch.rand_like(p, dtype=torch.float32) >= sparsity)
    return model.eval()


def compiled(model: Any, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sparsec", options={**FORCED, **options})  # type: ignore[no-any-return]


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.up = nn.Linear(k, 2 * k)
        self.down = nn.Linear(2 * k, k, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_regional_compilation_of_equal_blocks_uses_each_blocks_own_weights() -> None:
    model = prune_(Stack(4))
    x = torch.randn(3, K)
    want = model(x)
    before = STORE.packed_count
    for block in model.blocks:
        block.compile(backend="sparsec", options=FORCED)
    with recording() as records:
        agree(model(x), want)
    assert len(records) == 1, "equal blocks share one graph"
    assert STORE.packed_count - before == 8
    assert len(records[0].layers) == 8, "weights seen later are reported too"


def test_a_dense_first_block_does_not_cost_the_sparse_ones_their_kernels() -> None:
    torch.manual_seed(1)
    model = Stack(3).eval()
    for block in model.blocks[1:]:
        prune_(block, 0.9)
    x = torch.randn(2, K)
    want = model(x)
    for block in model.blocks:
        block.compile(backend="sparsec", options={"formats": ["bitmap", "index"]})
    with recording() as records:
        agree(model(x), want)
    decisions = {(layer.name, layer.fact.density > 0.5): layer.decision for layer in records[0].layers}
    assert not any(d.ours for (_, dense), d in decisions.items() if dense)
    assert len(records[0].layers) == 6


def test_a_sparse_first_block_does_not_zero_a_dense_one() -> None:
    model = Stack(2).eval()
    prune_(model.blocks[0], 0.9)
    x = torch.randn(2, K)
    want = model(x)
    for block in model.blocks:
        block.compile(backend="sparsec", options=FORCED)
    agree(model(x), want)


def test_two_instances_of_one_class_keep_their_own_weights() -> None:
    first, second = prune_(Block()), prune_(Block())
    x = torch.randn(2, K)
    agree(compiled(first)(x), first(x))
    agree(compiled(second)(x), second(x))
    agree(compiled(first)(x), first(x))


def test_weights_edited_in_place_are_packed_again() -> None:
    model = prune_(Block())
    run, x = compiled(model), torch.randn(2, K)
    run(x)
    model.up.weight.mul_(3.0)
    agree(run(x), model(x))
    model.up.weight.detach().mul_(0.5)
    agree(run(x), model(x))


def test_pruning_after_the_first_call_is_found() -> None:
    model = Block().eval()
    run, x = compiled(model), torch.randn(2, K)
    run(x)
    prune_(model, 0.9)
    before = STORE.packed_count
    agree(run(x), model(x))
    assert STORE.packed_count == before + 2


def test_load_state_dict_is_noticed() -> None:
    model, other = prune_(Block()), prune_(Block())
    run, x = compiled(model), torch.randn(2, K)
    run(x)
    model.load_state_dict(other.state_dict())
    agree(run(x), other(x))


def test_a_swapped_parameter_is_noticed() -> None:
    model, other = prune_(Block()), prune_(Block())
    run, x = compiled(model), torch.randn(2, K)
    run(x)
    model.up.weight = nn.Parameter(other.up.weight.clone())
    agree(run(x), model(x))


def test_assigning_data_is_noticed_and_editing_data_needs_invalidate() -> None:
    model, other = prune_(Block()), prune_(Block())
    run, x = compiled(model), torch.randn(2, K)
    run(x)
    model.up.weight.data = other.up.weight.detach().clone()
    agree(run(x), model(x))
    model.up.weight.data.mul_(2.0)
    assert sparsec.invalidate(model) >= 2
    agree(run(x), model(x))


def test_a_weight_that_changes_at_every_call_is_served_dense() -> None:
    model = prune_(Block())
    run, x = compiled(model), torch.randn(2, K)
    run(x)
    before = STORE.packed_count
    for _ in range(40):
        model.up.weight.mul_(1.01)
        agree(run(x), model(x))
    assert STORE.packed_count - before <= 3, "packing costs more than it gives here"


def test_tied_weights_are_packed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.gelu(self.a(x)))

    model = prune_(Tied())
    before, x = STORE.packed_count, torch.randn(2, K)
    agree(compiled(model)(x), model(x))
    assert STORE.packed_count == before + 1


def test_packs_die_with_their_weights() -> None:
    model: nn.Module | None = prune_(Block())
    assert model is not None
    run: Any = compiled(model)
    run(torch.randn(2, K))
    impl = model.get_parameter("up.weight")._cdata
    packs = [weakref.ref(p) for key, held in STORE._held.items() if key[0] == impl for p in held.packs]
    assert packs
    del run, model
    torch._dynamo.reset()
    gc.collect()
    assert all(p() is None for p in packs)
    assert not any(key[0] == impl for key in STORE._held)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 31, 64, 65, 300])
def test_dynamic_batch_crosses_every_range_edge(tokens: int) -> None:
    model = prune_(Block())
    run = torch.compile(model, backend="sparsec", options=FORCED, dynamic=True)
    run(torch.randn(5, K))
    x = torch.randn(tokens, K)
    agree(run(x), model(x))


def test_autocast_gives_eagers_dtype() -> None:
    model = prune_(Block())
    x = torch.randn(2, K)
    run = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = model(x), run(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    agree(run(x), model(x))


def test_grad_mode_gives_the_same_gradients() -> None:
    model = prune_(Block())
    run, x = compiled(model), torch.randn(2, K)
    run(x)
    with torch.enable_grad():
        run(x).sum().backward()
        got = model.up.weight.grad
        model.up.weight.grad = None
        model(x).sum().backward()
    assert got is not None
    agree(got, model.up.weight.grad)


def test_inference_mode_tensors_have_no_version_and_still_work() -> None:
    with torch.inference_mode():
        model = prune_(Block())
        x = torch.randn(2, K)
        run = compiled(model)
        agree(run(x), model(x))
        agree(run(x), model(x))


def test_negative_zeros_are_zeros() -> None:
    model = prune_(Block())
    model.up.weight.copy_(torch.where(model.up.weight == 0, -0.0, model.up.weight))
    x = torch.randn(2, K)
    agree(compiled(model)(x), model(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_come_out_as_in_dense(value: float) -> None:
    model = prune_(nn.Sequential(nn.Linear(K, K)))
    model[0].weight[3, 5] = value
    x = torch.rand(2, K) + 0.5
    torch.testing.assert_close(compiled(model)(x), model(x), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_nan_in_x_reaches_the_rows_that_read_it() -> None:
    model = prune_(nn.Sequential(nn.Linear(K, K)))
    x = torch.randn(2, K)
    x[1, 7] = float("nan")
    got = compiled(model)(x)
    reads = model[0].weight[:, 7] != 0
    assert got[1, reads].isnan().all()
    agree(got[:1], model(x[:1]))


def test_near_2_4_with_one_bad_group_is_not_packed_as_2_4() -> None:
    model = nn.Sequential(nn.Linear(K, K)).eval()
    keep = torch.tensor([True, False, True, False]).repeat(K, K // 4)
    keep[17, 1] = True
    model[0].weight.mul_(keep)
    x = torch.randn(2, K)
    with recording() as records:
        agree(compiled(model, formats=["nm:2:4", "bitmap"])(x), model(x))
    assert not any(r.format.startswith("nm") for r in records[0].layers[0].decision.ranges)


@pytest.mark.parametrize(("n", "k"), [(257, 251), (190, 333), (1031, 65), (33, 1029)])
def test_shapes_need_not_be_multiples_of_anything(n: int, k: int) -> None:
    model = prune_(nn.Sequential(nn.Linear(k, n)))
    x = torch.randn(3, k)
    agree(compiled(model)(x), model(x))


@pytest.mark.parametrize("kind", ["bitmap", "index"])
def test_empty_rows_columns_and_whole_zero_weights(kind: str) -> None:
    model = prune_(nn.Sequential(nn.Linear(K, K)))
    model[0].weight[10:200] = 0
    model[0].weight[:, 50:100] = 0
    x = torch.randn(3, K)
    run = compiled(model, formats=[kind])
    agree(run(x), model(x))
    model[0].weight.zero_()
    agree(run(x), model(x))


def test_no_bias() -> None:
    model = prune_(nn.Sequential(nn.Linear(K, K, bias=False)))
    x = torch.randn(3, K)
    agree(compiled(model)(x), model(x))


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (2, 2, 3, K), (0, K), (1, K)])
def test_x_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    model = prune_(nn.Sequential(nn.Linear(K, K)))
    x = torch.randn(shape)
    got = compiled(model)(x)
    assert got.shape == model(x).shape
    agree(got, model(x))


def test_x_need_not_be_contiguous() -> None:
    model = prune_(nn.Sequential(nn.Linear(K, K)))
    run = compiled(model)
    for x in (torch.randn(K, 5).t(), torch.randn(4, 2 * K)[:, ::2], torch.randn(2, 3, K).transpose(0, 1)):
        agree(run(x), model(x))


def test_bf16_stays_bf16() -> None:
    model = prune_(Block()).to(torch.bfloat16)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    got = compiled(model)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), model(x).float(), rtol=3e-2, atol=3e-2)


def test_indices_are_wide_enough_for_long_rows() -> None:
    model = nn.Sequential(nn.Linear(70_000, 3, bias=False)).eval()
    model[0].weight.zero_()
    model[0].weight[:, 69_990:] = 1.0
    x = torch.randn(2, 70_000)
    agree(compiled(model, formats=["index"])(x), model(x))


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(Exception, match="did you mean 'formats'") as raised:
        torch.compile(nn.Linear(K, K), backend="sparsec", options={"fromats": "auto"})(torch.randn(1, K))
    assert _has_cause(raised.value, UnknownOption)


@pytest.mark.parametrize(
    ("option", "error"), [({"target": "gpuu"}, UnknownTarget), ({"formats": "csr"}, UnknownFormat)]
)
def test_unknown_targets_and_formats_raise(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(Exception) as raised:
        torch.compile(nn.Linear(K, K), backend="sparsec", options=option)(torch.randn(1, K))
    assert _has_cause(raised.value, error)


def test_mode_with_options_is_explained() -> None:
    from sparsec.backend import sparsec as backend

    with pytest.raises(ModeAndOptions, match="Drop mode"):
        backend(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), [], options={"tune": "off"}, mode="max-autotune")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_mode_alone_is_accepted(mode: str) -> None:
    model = prune_(Block())
    x = torch.randn(2, K)
    agree(torch.compile(model, backend="sparsec", mode=mode)(x), model(x))


def test_an_error_inside_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec import pipeline

    def broken(_: object) -> int:
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(pipeline, "STAGES", (*pipeline.STAGES[:4], broken, *pipeline.STAGES[5:]))
    model, x = prune_(Block()), torch.randn(2, K)
    with pytest.warns(SparsecWarning, match="a planted fault"), recording() as records:
        agree(compiled(model)(x), model(x))
    assert "a planted fault" in records[-1].failure


def test_a_failing_pack_runs_that_weight_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise MemoryError("planted")

    model, x = prune_(Block()), torch.randn(2, K)
    run = compiled(model)
    run(x)
    monkeypatch.setattr(STORE, "packed", broken)
    model.up.weight.mul_(2.0)
    for _ in range(20):
        run(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsecWarning)
        model.load_state_dict(prune_(Block()).state_dict())
        agree(run(x), model(x))


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return False


# ------------------------------------------------------------------------------------------- in fresh processes

_PROGRAM = """
    import sys, torch
    from torch import nn
    torch.manual_seed(int(sys.argv[1]))
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = torch.randn(2, 256)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(torch.rand_like(p) > 0.7)
        run = torch.compile(model, backend="sparsec", options={"min_speedup": 0, "formats": ["bitmap"]})
        off = float((run(x) - model(x)).abs().max())
    from torch._dynamo.utils import counters
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    print("off", off, "hits", hits, "sparsec" in sys.modules)
"""


def program(*args: str, env: dict[str, str], code: str = _PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_warm_cache_in_a_second_process_does_not_bring_the_first_ones_weights(tmp_path: Path) -> None:
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    first, second = program("1", env=env), program("2", env=env)
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[1]) < 1e-4
    assert int(second.stdout.split()[3]) == 1, "the AOTAutograd cache was used"


def test_the_entry_point_works_without_importing_sparsec(tmp_path: Path) -> None:
    code = _PROGRAM.replace('"sparsec" in sys.modules', '"ok"')
    assert "import sparsec" not in code
    done = program("1", env={}, code=code)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_model_runs_and_the_reason_is_given(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "CXX": "", "SPARSEC_CACHE_DIR": str(tmp_path / "cache")}
    done = program("1", env={**env, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")})
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stderr
    assert float(done.stdout.split()[1]) < 1e-4


def test_an_unwritable_cache_directory_is_replaced_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = program("1", env={"SPARSEC_CACHE_DIR": str(tmp_path / "file" / "cache")})
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stderr
    assert float(done.stdout.split()[1]) < 1e-4


def test_two_processes_share_a_new_cache_directory(tmp_path: Path) -> None:
    env = {**os.environ, "SPARSEC_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", textwrap.dedent(_PROGRAM)]
    pipes: dict[str, Any] = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, seed], **pipes) for seed in ("1", "2")]
    for run in runs:
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        assert float(out.split()[1]) < 1e-4


def test_verify_catches_a_wrong_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prune_(nn.Sequential(nn.Linear(K, K))), torch.randn(2, K)
    run = compiled(model, verify=True)
    counted = STORE.verified
    agree(run(x), model(x))
    assert STORE.verified > counted
    wrong = copy.deepcopy(STORE._held[next(k for k in STORE._held if k[0] == model[0].weight._cdata)].packs[0])
    monkeypatch.setattr(STORE, "packed", lambda *_: wrong)
    for _ in range(20):
        run(x)
    model[0].weight.mul_(5.0)
    with pytest.raises(Exception, match="differs from the reference"):
        run(x)
