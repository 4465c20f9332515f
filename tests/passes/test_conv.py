"""Convolutions as products with patches: every shape against PyTorch, what is refused, and whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.codegen import cpp
from sparsec.facts import Conv
from sparsec.formats import Format
from sparsec.options import Options
from sparsec.pipeline import Compilation, prepare, run
from sparsec.plan import Plan
from sparsec.runtime.direct import Direct, convolve
from sparsec.runtime.store import STORE

REFERENCE = {"min_speedup": 0, "verify": True, "target": "reference", "formats": ["bitmap"]}


pytestmark = pytest.mark.usefixtures("fresh_graphs")


def sparse(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * (torch.rand(shape) < density)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    loose = 2e-4 if want.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, want, rtol=loose, atol=loose * max(1.0, float(want.float().abs().max())))


def captured(model: nn.Module, *args: Any, stage: str = "capture", options: dict[str, Any] = REFERENCE) -> Compilation:
    seen: list[Compilation] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        prepare(Options.parse(options))
        seen.append(run(Compilation(gm, inputs, Options.parse(options)), stop_after=stage))
        return gm.forward

    torch.compile(model, backend=look)(*args)
    return seen[0]


def called(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, walk: Conv, act: str, said: Any) -> torch.Tensor:
    """The op itself, which decides, packs and runs as in a compiled graph."""
    policy = Options.parse(said).policy
    prepare(Options.parse(said))
    plan = Plan("layer", "conv2d", policy, act=act, conv=walk)
    y: torch.Tensor = torch.ops.sparsec.conv2d(x, w, b, plan.encode())
    return y


sizes = st.integers(1, 5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),  # B, C, N
    kernel=st.tuples(sizes, sizes),
    extra=st.tuples(st.integers(0, 14), st.integers(0, 14)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*(st.integers(0, 3) for _ in range(4))),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    last=st.booleans(),
    bias=st.booleans(),
    act=st.sampled_from(["", "relu", "gelu"]),
)
@example((2, 32, 40), (3, 3), (60, 30), (1, 1), (1, 1, 1, 1), (1, 1), 0.1, torch.float32, True, True, "relu")
def test_every_convolution_equals_pytorchs(
    shape: tuple[int, int, int],
    kernel: tuple[int, int],
    extra: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    last: bool,
    bias: bool,
    act: str,
) -> None:
    torch.manual_seed(0)
    batch, channels, n = shape
    size = [d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, extra, strict=True)]
    x = torch.randn(batch, channels, *size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    w, b = sparse((n, channels, *kernel), density, dtype), torch.randn(n).to(dtype) if bias else None
    above, below, left, right = padding
    walk = Conv(kernel, stride, padding, dilation)
    got = called(x, w, b, walk, act, REFERENCE)
    padded = F.pad(x.float(), (left, right, above, below))
    want = F.conv2d(padded, w.float(), b.float() if b is not None else None, stride, 0, dilation)
    close(got, {"": lambda y: y, "relu": F.relu, "gelu": F.gelu}[act](want).to(dtype))
    assert got.is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    assert tuple(got.shape[2:]) == walk.size(*size)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("batch", "side"), [(1, 7), (1, 33), (5, 14)])
def test_threads_share_the_pixels_of_one_image_and_of_many(threads: int, batch: int, side: int) -> None:
    x, w = torch.randn(batch, 64, side, side), sparse((48, 64, 3, 3), 0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = called(x, w, None, Conv((3, 3), padding=(1, 1, 1, 1)), "", REFERENCE)
    finally:
        torch.set_num_threads(before)
    close(got, F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("format", ["bitmap", "index", "block:16x1", "panel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pattern_and_loop_of_this_machine_walks_over_images(format: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 24, 13, 11).to(dtype), sparse((40, 24, 3, 3), 0.2, dtype)
    walk = Conv((3, 3), (2, 1), (1, 0, 2, 1))
    matrix = w.permute(0, 2, 3, 1).flatten(1)
    if format.startswith("block"):
        matrix = matrix * (torch.rand(3, 216) < 0.3).repeat_interleave(16, 0)[:40]
    named = Format.parse(f"{format}+{'fp32' if dtype == torch.float32 else 'bf16'}")
    for loop in cpp.loops_of(named):
        got = Direct(matrix, named, loop, act="relu", conv=walk)(x)
        close(got, F.relu(convolve(x.float(), matrix.float(), walk)).to(dtype))


def test_the_weight_is_the_matrix_of_patches_in_their_order_in_memory() -> None:
    w = torch.zeros(16, 8, 3, 3)
    w.view(16, 2, 4, 3, 3)[:, :, :2] = torch.randn(16, 2, 2, 3, 3)  # 2:4 along the channels
    c = captured(Wrapped(w, padding=1), torch.randn(1, 8, 6, 6), stage="profile")
    assert (c.facts[0].n, c.facts[0].k) == (16, 72)
    assert c.facts[0].nm_fact(2, 4) is not None
    assert c.facts[0].nm_fact(2, 4).exact  # type: ignore[union-attr]


class Wrapped(nn.Module):
    def __init__(self, w: torch.Tensor, b: torch.Tensor | None = None, **said: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.said = nn.Parameter(w), None if b is None else nn.Parameter(b), said

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.said)


SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2},
    "stride of two": {"stride": (2, 1)},
    "padding": {"padding": 2},
    "padding of two": {"padding": (0, 2)},
    "same": {"padding": "same"},
    "same, dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": (2, 3)},
}


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (5, 1)])
@pytest.mark.parametrize("said", SPELLINGS)
def test_every_spelling_of_stride_padding_and_dilation_is_taken(said: str, kernel: tuple[int, int]) -> None:
    model = Wrapped(sparse((20, 12, *kernel), 0.2), torch.randn(20), **SPELLINGS[said])
    x = torch.randn(2, 12, 17, 19)
    c = captured(model, x, stage="rewrite")
    assert [s.kind for s, _ in c.sites] == ["conv2d"]
    y = model(x)
    assert c.sites[0][0].x_shape == (2, y.shape[2], y.shape[3], 12 * kernel[0] * kernel[1])
    assert c.plans[0].m == y[:, 0].numel() == c.sites[0][0].conv.rows  # type: ignore[union-attr]
    close(c.gm.forward(*c.example_inputs)[0], y)


@pytest.mark.parametrize(
    ("said", "words"),
    [({"groups": 4}, "grouped"), ({"groups": 12}, "depthwise")],
)
def test_grouped_convolutions_are_refused_in_a_sentence(said: dict[str, Any], words: str) -> None:
    groups = said["groups"]
    c = captured(Wrapped(sparse((24, 12 // groups, 3, 3), 0.5), **said), torch.randn(1, 12, 8, 8))
    assert not c.sites
    assert f"{words} (groups={groups})" in c.record.declined[0].reason


def test_one_image_without_a_batch_is_refused_in_a_sentence() -> None:
    c = captured(Wrapped(sparse((4, 3, 3, 3), 0.5)), torch.randn(3, 8, 8))
    assert "not a batch of images" in c.record.declined[0].reason


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_paddings_than_zeros_are_right(mode: str) -> None:
    conv = nn.Conv2d(16, 24, 3, padding=1, padding_mode=mode)
    conv.weight.copy_(sparse(tuple(conv.weight.shape), 0.2))
    x = torch.randn(2, 16, 9, 9)
    close(torch.compile(conv, backend="sparsec", options=REFERENCE)(x), conv(x))


def test_an_image_smaller_than_the_kernel_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="larger than the padded image"):
        called(torch.randn(1, 4, 2, 2), sparse((8, 4, 3, 3), 0.5), None, Conv((3, 3)), "", REFERENCE)


def test_an_empty_batch_is_an_empty_result() -> None:
    got = called(torch.randn(0, 4, 6, 6), sparse((8, 4, 3, 3), 0.5), None, Conv((3, 3)), "", REFERENCE)
    assert got.shape == (0, 8, 4, 4)


class Block(nn.Module):
    """A ResNet's block: two 3x3, a 1x1 beside them where the stride is 2."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1)
        self.short = nn.Conv2d(inside, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(F.relu(self.norm(self.first(x)))) + self.short(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, 2, 3)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1))


def residual(zeros: float = 0.8) -> Residual:
    model = Residual().eval()
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": zeros, "ignore": []}, progress=False)
    return model


@pytest.mark.parametrize("last", [False, True])
def test_a_small_resnet_runs_sparse_from_end_to_end(last: bool) -> None:
    model, x = residual(), torch.randn(2, 3, 48, 40)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = STORE.verified
    fast = torch.compile(model, backend="sparsec", options=REFERENCE, fullgraph=True)
    close(fast(x), model(x))
    assert STORE.verified == before + 7


def test_every_convolution_of_a_small_resnet_is_explained() -> None:
    report = sparsec.explain(residual(), torch.randn(2, 3, 48, 40), options=REFERENCE)
    found = {layer.name: layer for layer in report.layers}
    assert set(found) == {
        "stem", "blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "blocks.1.short", "head",
    }  # fmt: skip
    assert found["stem"].shape == (16, 3 * 49)
    assert found["stem"].rows == 2 * 24 * 20
    assert found["blocks.1.short"].rows == 2 * 6 * 5
    assert {layer.decision for layer in report.layers} == {"bitmap+fp32"}
    assert not report.not_taken
    assert "blocks.0.second" in str(report)


def test_convolutions_are_timed_as_convolutions() -> None:
    report = sparsec.explain(residual(), torch.randn(1, 3, 32, 32), options=REFERENCE, measure=True)
    assert all(layer.measured is not None for layer in report.layers)
    assert report.whole is not None


def test_one_graph_serves_any_batch_and_any_size_of_image() -> None:
    model = nn.Sequential(nn.Conv2d(8, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 16, 1)).eval()
    for layer in (model[0], model[2]):
        layer.weight.copy_(sparse(tuple(layer.weight.shape), 0.2))
    graphs: list[object] = []
    with sparsec.records.recording() as seen:
        fast = torch.compile(model, backend="sparsec", options=REFERENCE, dynamic=True, fullgraph=True)
        for shape in ((2, 9, 12), (3, 9, 12), (5, 20, 31), (2, 64, 33)):
            x = torch.randn(shape[0], 8, *shape[1:])
            close(fast(x), model(x))
        graphs = list(seen)
    assert len(graphs) == 1
    assert {layer.decision.at(1000).format for layer in seen[0].layers} == {"bitmap+fp32"}


def test_a_changed_weight_is_seen_at_the_next_call() -> None:
    model, x = nn.Conv2d(8, 16, 3), torch.randn(1, 8, 8, 8)
    model.weight.copy_(sparse(tuple(model.weight.shape), 0.2))
    fast = torch.compile(model, backend="sparsec", options=REFERENCE)
    close(fast(x), model(x))
    model.weight.mul_(torch.rand_like(model.weight) < 0.5)
    close(fast(x), model(x))


def test_dense_convolutions_run_as_before() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 16, 3, padding="same"), nn.GELU()).eval(), torch.randn(2, 8, 8, 8)
    fast = torch.compile(model, backend="sparsec", options={"target": "reference"})
    close(fast(x), model(x))
    wide = nn.Conv2d(8, 16, (2, 4), padding="same")
    close(torch.compile(wide, backend="sparsec", options={"target": "reference"})(x), wide(x))


def test_between_convolutions_no_memory_format_is_converted() -> None:
    model, x = residual(), torch.randn(1, 3, 32, 32)
    c = captured(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last),
                 stage="rewrite")  # fmt: skip
    assert not [n for n in c.gm.graph.nodes if n.op == "call_method" and n.target == "contiguous"]


@given(
    numbers=st.tuples(*(st.integers(1, 4) for _ in range(10))),
    image=st.sampled_from([(), (2, 30, 40)]),
    m=st.integers(1, 5000),
)
@settings(deadline=None, derandomize=True)
def test_a_walk_comes_back_from_its_numbers_and_finds_images_of_about_m_rows(
    numbers: tuple[int, ...], image: tuple[int, ...], m: int
) -> None:
    walk = Conv.of([*numbers, *image])
    assert Conv.of([*walk.numbers, *walk.image]) == walk
    plan = Plan("a", "conv2d", Options.parse({}).policy, conv=walk)
    assert Plan.decode(plan.encode()) == plan
    found = walk.about(m)
    assert (found.kernel, found.stride, found.padding) == (walk.kernel, walk.stride, walk.padding)
    assert found.rows >= 1
    if not image and min(found.image[1:]) > 1:
        assert m / 2 <= found.rows <= m
