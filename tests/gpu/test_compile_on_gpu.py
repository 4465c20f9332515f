"""torch.compile(backend="sparsec") end to end on the GPU: generation, CUDA graphs, streams, updates, lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.gpu.llama_checks import (
    BACKEND,
    compiled_forward,
    generation_error,
    largest,
    pruned_llama,
    relative,
    said_for_lack_of_memory,
    sparse_uses,
)

TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 6e-3}  # a few roundings a layer, in another order than eager's
ALWAYS: dict[str, Any] = {"target": "cuda", "min_speedup": 0}  # sparse whatever the cost model expects


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.cuda.synchronize()


def pruned(dtype: torch.dtype = torch.bfloat16, device: str = "cuda", k: int = 1024) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, 768), nn.SiLU(), nn.Linear(768, 512, bias=False)).to(dtype).to(device).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(largest(layer.weight, 0.2))
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_pruned_llama_generates_with_the_logits_of_eager(dtype: torch.dtype) -> None:
    model = pruned_llama(dtype, "cuda")
    prompt = torch.randint(1, 1000, (1, 8), device="cuda")
    assert generation_error(model, prompt, 16, ALWAYS) < TOLERANCE[dtype]
    assert sparse_uses(model) > 16


def test_without_options_a_pruned_llama_answers_as_eager() -> None:
    model = pruned_llama(torch.bfloat16, "cuda")
    ids = torch.randint(1, 1000, (2, 16), device="cuda")
    with torch.inference_mode():
        expected = model(ids).logits
        with compiled_forward(model):
            assert relative(model(ids).logits, expected) < TOLERANCE[torch.bfloat16]


def test_cuda_graphs_replay_the_kernels() -> None:
    model = pruned_llama(torch.bfloat16, "cuda")
    options = ALWAYS | {"inductor": {"triton.cudagraphs": True}}
    with torch.inference_mode(), compiled_forward(model, options):
        for seed in range(5):  # the first calls warm up and record, later ones replay
            torch.manual_seed(seed)
            ids = torch.randint(1, 1000, (1, 4), device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            ours = model(ids, use_cache=False).logits.clone()
            expected = type(model).forward(model, ids, use_cache=False).logits
            assert relative(ours, expected) < TOLERANCE[torch.bfloat16]
    assert sparse_uses(model) > 0


def test_mode_reduce_overhead_gives_the_same_answers() -> None:
    model = pruned(k=4096)
    fast = torch.compile(model, backend=BACKEND, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
            assert relative(fast(x).clone(), model(x)) < TOLERANCE[torch.bfloat16]


def test_calls_on_two_streams_do_not_disturb_each_other() -> None:
    model = pruned()
    fast = torch.compile(model, backend=BACKEND, options=ALWAYS)
    inputs = [torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
        fast(inputs[0])
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        found: list[list[torch.Tensor]] = [[], []]
        for _ in range(50):
            for x, stream, made in zip(inputs, streams, found, strict=True):
                with torch.cuda.stream(stream):
                    made.append(fast(x))
        torch.cuda.synchronize()
    for made, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(y, made[0]) for y in made)
        assert relative(made[0], wanted) < TOLERANCE[torch.bfloat16]


def test_a_weight_that_changes_is_packed_anew() -> None:
    model = pruned()
    fast = torch.compile(model, backend=BACKEND, options=ALWAYS)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        model[0].weight.mul_(-2.0)
        assert relative(fast(x), model(x)) < TOLERANCE[torch.bfloat16]
    assert sparse_uses(model) > 0


def test_a_model_without_memory_for_its_packs_runs_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("out of memory" in text for text in said_for_lack_of_memory("cuda", ALWAYS, monkeypatch))


def test_a_model_on_the_second_gpu_runs_there() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    model = pruned(device="cuda:1")
    x = torch.randn(2, 1024, device="cuda:1", dtype=torch.bfloat16)
    with torch.inference_mode():
        y = torch.compile(model, backend=BACKEND, options=ALWAYS)(x)
        assert y.device == x.device
        assert relative(y, model(x)) < TOLERANCE[torch.bfloat16]
    assert sparse_uses(model) > 0
