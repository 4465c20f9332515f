"""The speed bench of sparsify: the plain loops make the masks of sparsec, rounds take turns, misses are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import plain_loops, sparsify_speed
from benchmarks.sparsify_speed import Setup, blocks_of, markdown, measure_solver, ours, plain, rounds
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector
from sparsec.passes.masks.sparsegpt import SparseGPT

transformers = pytest.importorskip("transformers")


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (1, 48), generator=generator) for _ in range(12)]


def pruned(engine: Any, method: str) -> dict[str, torch.Tensor]:
    model = llama()
    engine(method, model, tokens(), 0.5)
    return {name: m.weight.detach() for name, m in blocks_of(model)[1].named_modules() if isinstance(m, nn.Linear)}


def test_the_plain_wanda_loop_makes_the_masks_of_sparsec() -> None:
    mine, theirs = pruned(ours, "wanda"), pruned(plain, "wanda")
    assert len(mine) == 14
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name
        assert float((weight == 0).float().mean()) == 0.5


def test_the_plain_sparsegpt_loop_makes_the_masks_and_values_of_sparsec() -> None:
    """But for weights at the very cut, which the fp32 inverse of the plain loop may put on the other side."""
    mine, theirs = pruned(ours, "sparsegpt"), pruned(plain, "sparsegpt")
    for name, weight in mine.items():
        same = (weight != 0) == (theirs[name] != 0)
        assert float(same.float().mean()) > 0.999, name
        rows = same.all(1)
        assert float(rows.float().mean()) > 0.9
        torch.testing.assert_close(weight[rows], theirs[name][rows], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 256), (64, 200)])
def test_both_plain_solvers_are_the_solver_of_sparsec(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(900, shape[1]), torch.randn(shape)
    xxt = x.t() @ x
    ours = SparseGPT(blocksize=plain_loops.WIDTH).update(weight, {"xxt": xxt}, Selector(MaskPattern(), 0.5))
    for solver in (plain_loops.prune_blocked, plain_loops.prune_by_column):
        theirs = solver(weight, xxt, 0.5)
        assert torch.equal(ours.keep, theirs != 0)
        assert ours.values is not None
        torch.testing.assert_close(ours.values, theirs, rtol=1e-3, atol=1e-4)


def test_rounds_take_turns_and_the_first_is_not_counted() -> None:
    called: list[str] = []
    taken = rounds({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, lambda: called.append("-"))
    assert "".join(called) == "-a-b-b-a-a-b-b-a"
    assert {name: len(samples.seconds) for name, samples in taken.items()} == {"a": 3, "b": 3}


def test_the_arithmetic_counts_each_distinct_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setup, "load", lambda self: llama())
    said = sparsify_speed.arithmetic(Setup(samples=2, seqlen=8), "sparsegpt")
    weights = 4 * 160 * 160 + 3 * 160 * 320
    assert said["block"] == 5 * weights
    assert said["statistics"] == 4 * (3 * 160**2 + 320**2) + 4 * 512 * (3 * 160 + 320)
    assert said["layer"] == max(32 * 320**2, 24 * 160 * 320 + 4 * 320**2)
    assert said["activations"] == 2 * 4 * 160 * 16
    assert said["sum"] == sum(size for name, size in said.items() if name != "sum")


def test_the_report_has_a_row_for_each_measurement_and_says_what_was_missed() -> None:
    rows = measure_solver(1, ((32, 64),))
    missed = {**rows[0], "met": False, "name": "nowhere"}
    memory = [
        {"name": "wanda", "engine": "sparsec", "beside_model": 3 << 20, "arithmetic": {"x": 1 << 20, "sum": 1 << 20}}
    ]
    report = {"setup": Setup().__dict__, "parameters": 61e6, "solver": [*rows, missed], "memory": memory}
    text = markdown(report)
    assert "| 32x64 | " in text
    assert "at least 1.5: missed | 100.0000% |" in text
    assert "| wanda | sparsec | 3 | 1 = x 1 |" in text
