"""Post-passes: variance correction, LLM-Barber and EBFT on a small transformer layer with grouped, masked attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsec.errors import BadRecipe, NonFinite
from sparsec.passes.masks import METHODS, method_class
from sparsec.passes.masks.block import Batch, LayerState
from sparsec.passes.masks.contract import prune
from sparsec.passes.masks.magnitude import Magnitude
from sparsec.passes.masks.outliers import Outliers, with_outliers
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.post.barber import Barber, swapped
from sparsec.passes.masks.post.ebft import Ebft
from sparsec.passes.masks.post.variance import Variance, corrected
from sparsec.passes.masks.select import Selector

unhurried = settings(deadline=None)
WIDTH = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, None]:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act(self.up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), attention_mask=attention_mask)[0]
        return (hidden + self.mlp(self.post_layernorm(hidden)),)


@dataclass
class SmallBlock:
    """A ``Block`` whose data lie in a list."""

    module: nn.Module
    data: list[Batch]
    seed: int = 0
    name: str = "model.layers.0"
    layers: list[LayerState] = field(default_factory=list)
    dense: list[torch.Tensor] = field(default_factory=list)

    def batches(self) -> Iterator[Batch]:
        return iter(self.data)

    def targets(self) -> Iterator[torch.Tensor]:
        return iter(self.dense)

    def run(self, batch: Batch) -> torch.Tensor:
        out = self.module(batch.hidden, *batch.args, **(batch.kwargs or {}))
        made: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return made

    def error(self) -> float:
        """The mean squared error of the block's outputs."""
        with torch.no_grad():
            errors = [
                (self.run(b).float() - t.float()).square().mean() for b, t in zip(self.data, self.dense, strict=True)
            ]
        return float(torch.stack(errors).mean())


def view_of(module: nn.Module) -> torch.Tensor:
    weight = module.get_parameter("weight").detach()
    return weight[:, :, 0, 0] if isinstance(module, nn.Conv2d) else weight


def masked(
    module: nn.Module,
    data: list[Batch],
    pattern: str = "unstructured",
    sparsity: float = 0.6,
    *,
    scope: str = "layer",
    outliers: str | None = None,
    only: str = "",
    seed: int = 0,
) -> SmallBlock:
    """The block after a step of magnitude pruning."""
    block = SmallBlock(module, data, seed)
    with torch.no_grad():
        block.dense = [block.run(batch) for batch in data]
    layers = []
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)) and only in name:
            weight = view_of(child)
            dense = weight.float().clone()
            choose = with_outliers(Selector(MaskPattern.parse(pattern), sparsity, scope), Outliers.parse(outliers))
            keep = prune(Magnitude(), dense, {}, choose).keep
            weight.masked_fill_(~keep, 0.0)
            layers.append(LayerState(f"model.layers.0.{name}", weight, dense, {}, choose, Magnitude(), sparsity, keep))
    block.layers = layers
    return block


def decoder(
    pattern: str = "unstructured",
    sparsity: float = 0.6,
    *,
    batches: int = 8,
    batch: int = 3,
    dtype: torch.dtype = torch.float32,
    **said: Any,
) -> SmallBlock:
    torch.manual_seed(0)
    mask = torch.full((7, 7), -1e9).triu(1)[None, None].to(dtype)
    mixing = torch.randn(WIDTH, WIDTH) / WIDTH**0.5  # inputs with unequal directions
    hidden = [(torch.randn(batch, 7, WIDTH) @ mixing).to(dtype) for _ in range(batches)]
    data = [Batch(x, kwargs={"attention_mask": mask}) for x in hidden]
    return masked(DecoderLayer().to(dtype).eval(), data, pattern, sparsity, **said)


def counts(block: SmallBlock) -> list[list[int]]:
    return [layer.keep.sum(1).tolist() for layer in block.layers if layer.keep is not None]


def assert_zero_where_pruned(block: SmallBlock) -> None:
    for layer in block.layers:
        assert layer.keep is not None
        pruned = layer.weight[~layer.keep]
        assert not pruned.count_nonzero()
        assert not torch.signbit(pruned).any()


@pytest.mark.parametrize("name", ["variance", "barber", "ebft"])
def test_the_three_are_registered_as_post_passes(name: str) -> None:
    assert name in METHODS
    cls = method_class(name)
    assert cls.role == "post"
    assert len(str(cls.__doc__).splitlines()[0]) <= 75
    assert repr(cls()) == repr(eval(repr(cls()), {cls.__name__: cls}))


# ------------------------------------------------------------------------------------------------------------ variance


def slow_variance(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_rows_get_the_variance_of_the_dense_rows(pattern: str) -> None:
    block = decoder(pattern)
    before = [layer.weight.clone() for layer in block.layers]
    Variance().refine(block)
    assert_zero_where_pruned(block)
    for layer, was in zip(block.layers, before, strict=True):
        assert torch.equal(layer.weight != 0, was != 0)
        for new, dense, old in zip(layer.weight.tolist(), layer.dense.tolist(), was.tolist(), strict=True):
            assert slow_variance(new) == pytest.approx(slow_variance(dense), rel=1e-5)
            factor = math.sqrt(slow_variance(dense) / slow_variance(old))
            assert new == pytest.approx([factor * v for v in old], rel=1e-5)


def test_a_layer_gets_the_variance_of_the_dense_layer_with_one_factor() -> None:
    block = decoder(sparsity=0.7)
    before = [layer.weight.clone() for layer in block.layers]
    Variance(per="layer").refine(block)
    for layer, was in zip(block.layers, before, strict=True):
        new = layer.weight.flatten().tolist()
        assert slow_variance(new) == pytest.approx(slow_variance(layer.dense.flatten().tolist()), rel=1e-5)
        ratios = layer.weight[was != 0] / was[was != 0]
        assert ratios.min().item() == pytest.approx(ratios.max().item(), rel=1e-5)
        assert ratios.min() > 1


def test_rows_without_variance_stay_as_they_are() -> None:
    dense = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    made = corrected(weight, dense)
    assert torch.equal(made[:3], weight[:3].double())
    assert made[3].var(correction=0).item() == pytest.approx(dense[3].var(correction=0).item())
    assert torch.equal(corrected(torch.ones(3, 1), torch.full((3, 1), 2.0)), torch.ones(3, 1).double())
    assert torch.equal(corrected(torch.zeros(3, 4), torch.ones(3, 4), "layer"), torch.zeros(3, 4).double())


def test_variance_holds_in_bfloat16_up_to_its_rounding() -> None:
    block = decoder("2:4", dtype=torch.bfloat16)
    Variance().refine(block)
    for layer in block.layers:
        was, now = (w.double().var(1, correction=0) for w in (layer.dense, layer.weight))
        assert (now / was).sub(1).abs().max() < 0.01


# -------------------------------------------------------------------------------------------------------------- barber


def slow_swaps(keep: list[bool], score: list[float], ratio: float, m: int) -> list[bool]:
    """One row, by the text of the docstring."""
    pairs = []
    for start in range(0, len(keep), m):
        group = range(start, min(start + m, len(keep)))
        grow = sorted((i for i in group if not keep[i]), key=lambda i: -score[i])
        drop = sorted((i for i in group if keep[i]), key=lambda i: score[i])
        pairs += [(i, j) for i, j in zip(grow, drop, strict=False) if score[i] > score[j]]
    pairs.sort(key=lambda pair: -score[pair[0]])
    made = list(keep)
    for i, j in pairs[: math.ceil(Fraction(str(ratio)) * len(pairs))]:
        made[i], made[j] = True, False
    return made


@unhurried
@given(
    st.integers(1, 6),
    st.integers(1, 41),
    st.sampled_from(["unstructured", "2:4", "1:4", "3:8", "8:16"]),
    st.sampled_from([0.01, 0.07, 0.1, 0.5, 1.0]),
    st.integers(0, 2**20),
)
def test_rows_swap_as_they_would_one_by_one(n: int, k: int, pattern: str, ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(n, k, generator=generator)
    said = MaskPattern.parse(pattern)
    keep = Selector(said, 0.6)(torch.rand(n, k, generator=generator))
    made = swapped(keep, score, ratio, said)
    m = said.group if said.params else k
    assert made.tolist() == [slow_swaps(*row, ratio, m) for row in zip(keep.tolist(), score.tolist(), strict=True)]


@unhurried
@given(st.sampled_from(["unstructured", "2:4", "3:32", "4:2:8"]), st.booleans(), st.integers(0, 2**20))
def test_swaps_keep_every_quota_and_never_lower_the_score(pattern: str, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 3 if ties else 10_000, (9, 70), generator=generator).float()
    said = MaskPattern.parse(pattern)
    keep = Selector(said, 0.5)(torch.rand(9, 70, generator=generator))
    made = swapped(keep, score, 0.3, said)
    m = said.group if said.params else 70
    for was, now in zip(torch.split(keep, m, 1), torch.split(made, m, 1), strict=True):
        assert torch.equal(was.sum(1), now.sum(1))
    assert bool(((score * made).sum(1) >= (score * keep).sum(1)).all())
    if said.kind == "vnm":
        used = torch.stack([rows.any(0) for rows in torch.split(made, said.params[0])])
        assert all(int(group.sum(1).max()) <= 4 for group in torch.split(used, m, 1))


def test_a_share_of_swaps_that_is_whole_is_not_rounded_up() -> None:
    keep, score = torch.arange(50) < 25, (torch.arange(50) >= 25).float()  # 25 swaps pay, and 25 * 0.6 is 15
    for ratio, pairs in ((0.6, 15), (0.07, 2), (0.2, 5)):
        made = swapped(keep[None], score[None], ratio, MaskPattern())
        assert int((made[0] & ~keep).sum()) == pairs


def test_one_worthwhile_swap_in_a_row_is_made_however_small_the_ratio() -> None:
    keep = torch.tensor([[True, True, False, False], [True, True, False, False], [False] * 4, [True] * 4])
    score = torch.tensor([[1.0, 5.0, 3.0, 0.0], [4.0, 5.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    made = swapped(keep, score, 0.01, MaskPattern())
    assert made.tolist() == [[False, True, True, False], [True, True, False, False], [False] * 4, [True] * 4]


def slow_barber(block: SmallBlock, ratio: float) -> list[torch.Tensor]:
    """New weights, part by part and sample by sample, with gradients of the parameters themselves."""
    sparse = copy.deepcopy(block.module)
    states = {layer.name.removeprefix("model.layers.0."): layer for layer in block.layers}
    dense = copy.deepcopy(sparse)
    for name, layer in states.items():
        dense.get_submodule(name).get_parameter("weight").data.copy_(layer.dense)
    new = []
    for part in ("self_attn", "mlp"):
        seen: list[tuple[Any, Any, Any]] = []
        hook = sparse.get_submodule(part).register_forward_hook(
            lambda _, args, kwargs, out, seen=seen: seen.append((args, kwargs, out)), with_kwargs=True
        )
        with torch.no_grad():
            for batch in block.data:
                for one in torch.split(batch.hidden, 1):
                    sparse(one, **(batch.kwargs or {}))
        hook.remove()
        mine = {name: layer for name, layer in states.items() if name.startswith(part)}
        squares = {name: torch.zeros_like(layer.dense) for name, layer in mine.items()}
        for args, kwargs, out in seen:
            dense.zero_grad()
            given_back = dense.get_submodule(part)(*args, **kwargs)
            if part == "self_attn":
                given_back, out = given_back[0], out[0]
            torch.autograd.backward(nn.functional.mse_loss(given_back, out))
            for name in mine:
                grad = dense.get_submodule(name).get_parameter("weight").grad
                assert grad is not None
                squares[name] += grad**2 / len(seen)
        for name, layer in mine.items():
            assert layer.keep is not None
            score = layer.dense.abs() * squares[name].sqrt()
            m = layer.pattern.group if layer.pattern.params else score.shape[1]
            rows = zip(layer.keep.tolist(), score.tolist(), strict=True)
            keep = torch.tensor([slow_swaps(*row, ratio, m) for row in rows])
            new.append(layer.dense * keep)
            sparse.get_submodule(name).get_parameter("weight").data.copy_(new[-1])
    return new


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_barber_does_what_a_slow_transcription_does(pattern: str) -> None:
    block = decoder(pattern, batches=3)
    expected = slow_barber(block, 0.1)
    Barber(ratio=0.1, undo_worse=False).refine(block)
    for layer, new in zip(block.layers, expected, strict=True):
        assert torch.equal(layer.weight, new), layer.name


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:2:8"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_barber_leaves_sparsity_as_it_was_to_the_element(pattern: str, scope: str) -> None:
    block = decoder(pattern, scope=scope)
    before, masks = counts(block), [layer.keep for layer in block.layers]
    Barber(ratio=0.1, undo_worse=False).refine(block)
    assert counts(block) == before
    assert_zero_where_pruned(block)
    assert any(not torch.equal(layer.keep, was) for layer, was in zip(block.layers, masks, strict=True))  # type: ignore[arg-type]
    for layer in block.layers:
        assert layer.keep is not None
        assert torch.equal(layer.weight, layer.dense * layer.keep)
        if layer.pattern.kind == "nm":
            assert set(layer.keep.view(-1, 4).sum(1).tolist()) == {2}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("unit", ["part", "block"])
def test_barber_lowers_the_error_of_a_magnitude_start(pattern: str, unit: Any) -> None:
    block = decoder(pattern)
    before = block.error()
    Barber(ratio=0.1, unit=unit).refine(block)
    assert block.error() < before


def test_barber_keeps_n_of_m_beside_outliers() -> None:
    block = decoder("2:4", outliers="2:16")
    masks = [layer.keep for layer in block.layers]
    Barber(ratio=1.0, undo_worse=False).refine(block)
    for layer, was in zip(block.layers, masks, strict=True):
        assert layer.keep is not None
        assert was is not None
        assert layer.pattern == MaskPattern.parse("2:4")
        assert torch.equal(layer.keep.view(-1, 4).sum(1), was.view(-1, 4).sum(1))


def test_a_part_whose_error_grew_is_put_back() -> None:
    block = decoder("2:4")
    for layer in block.layers:  # weights far better than any choice of dense ones
        layer.weight.copy_(layer.dense)
        assert layer.keep is not None
        layer.keep = torch.ones_like(layer.keep)
    attention = block.layers[0]
    attention.keep = torch.zeros_like(attention.dense, dtype=torch.bool)
    attention.keep[:, ::2] = True
    torch.manual_seed(3)
    x = torch.cat([b.hidden for b in block.data]).flatten(0, 1)
    x = nn.functional.layer_norm(x, (WIDTH,))
    attention.weight.zero_()
    attention.weight[:, ::2] = torch.linalg.lstsq(x[:, ::2], x @ attention.dense.t()).solution.t()
    kept, before, keep = attention.weight.clone(), block.error(), attention.keep
    Barber(ratio=0.01).refine(block)
    assert block.error() == before
    assert torch.equal(attention.weight, kept)
    assert attention.keep is keep
    Barber(ratio=0.01, undo_worse=False).refine(block)
    assert block.error() > before


def test_reconstructed_weights_are_retained_when_asked() -> None:
    block = decoder("2:4")
    for layer in block.layers:
        layer.weight.mul_(1.25)
    Barber(ratio=0.1, retain_reconstruction=True, undo_worse=False).refine(block)
    grown = 0
    for layer in block.layers:
        assert layer.keep is not None
        ratio = layer.weight[layer.keep] / layer.dense[layer.keep]
        new = (ratio - 1).abs() < 1e-6
        assert bool((new | ((ratio - 1.25).abs() < 1e-6)).all())
        grown += int(new.sum())
    assert grown


def test_barber_swaps_no_weight_where_nothing_was_lost() -> None:
    block = decoder(sparsity=0.0)
    Barber().refine(block)
    assert all(torch.equal(layer.weight, layer.dense) for layer in block.layers)


def test_barber_refuses_blocks_and_data_that_are_not_finite() -> None:
    with pytest.raises(BadRecipe, match="barber swaps single weights"):
        Barber().refine(decoder("block:4x4"))
    block = decoder()
    block.data[0].hidden[0, 0, 0] = math.nan
    before = [layer.weight.clone() for layer in block.layers]
    with pytest.raises(NonFinite, match="barber"):
        Barber().refine(block)
    assert all(torch.equal(layer.weight, was) for layer, was in zip(block.layers, before, strict=True))


def test_barber_leaves_no_hooks_gradients_or_types_behind() -> None:
    block = decoder(dtype=torch.bfloat16)
    Barber(ratio=0.1).refine(block)
    for module in block.module.modules():
        assert not module._forward_hooks
    for parameter in block.module.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert parameter.dtype == torch.bfloat16
    assert_zero_where_pruned(block)


def experts() -> SmallBlock:
    """Two experts in a list; the second one sees no token. A convolution stands before them."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(8, 8, 1, stride=2, padding=1)
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.mix(x).flatten(2).transpose(1, 2)
            out: torch.Tensor = self.experts[0](tokens.reshape(-1, 8)).view_as(tokens)
            return out

    torch.manual_seed(1)
    return masked(
        Routed(),
        [Batch(torch.randn(2, 8, 6, 6) * torch.arange(1.0, 9.0)[:, None, None]) for _ in range(5)],
        sparsity=0.5,
    )


@pytest.mark.parametrize("unit", ["part", "block"])
def test_barber_takes_convolutions_and_experts_without_tokens(unit: Any) -> None:
    block = experts()
    before, error, idle = counts(block), block.error(), block.layers[2].keep
    Barber(ratio=0.2, unit=unit).refine(block)
    assert counts(block) == before
    assert block.error() < error
    assert block.layers[2].keep is not None
    assert idle is not None
    assert torch.equal(block.layers[2].keep, idle)


def test_a_convolution_swaps_as_the_linear_layer_it_is() -> None:
    torch.manual_seed(4)
    convolution, linear = nn.Conv2d(12, 9, 1, stride=2, padding=1), nn.Linear(12, 9)
    view_of(linear).copy_(view_of(convolution))
    linear.load_state_dict({"weight": linear.weight, "bias": convolution.bias})
    images = [torch.randn(3, 12, 8, 8) * torch.rand(12, 1, 1) for _ in range(3)]
    padded = [nn.functional.pad(x, (1, 1, 1, 1))[:, :, ::2, ::2].flatten(2).transpose(1, 2) for x in images]
    blocks = [
        masked(nn.Sequential(convolution), [Batch(x) for x in images], sparsity=0.5),
        masked(nn.Sequential(linear), [Batch(x) for x in padded], sparsity=0.5),
    ]
    before = blocks[0].layers[0].keep
    for block in blocks:
        Barber(ratio=0.3, undo_worse=False).refine(block)
    one, other = (block.layers[0].keep for block in blocks)
    assert one is not None
    assert other is not None
    assert before is not None
    assert torch.equal(one, other)
    assert not torch.equal(one, before)


# ---------------------------------------------------------------------------------------------------------------- ebft


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_training_lowers_the_error_and_leaves_masks_alone(pattern: str) -> None:
    block = decoder(pattern)
    masks, before = [layer.keep for layer in block.layers], block.error()
    biases = {n: p.clone() for n, p in block.module.named_parameters() if not n.endswith("proj.weight")}
    Ebft(epochs=3, lr=3e-3).refine(block)
    assert block.error() < before
    assert_zero_where_pruned(block)
    for layer, was in zip(block.layers, masks, strict=True):
        assert layer.keep is was
        assert was is not None
        assert torch.equal(layer.weight != 0, was)
    for name, was_bias in biases.items():
        assert torch.equal(block.module.get_parameter(name), was_bias)


def test_training_follows_adam_as_written_down() -> None:
    torch.manual_seed(2)
    block = masked(nn.Sequential(nn.Linear(6, 5, bias=False)), [Batch(torch.randn(1, 9, 6))], sparsity=0.5)
    (layer,) = block.layers
    assert layer.keep is not None
    w, scale = layer.weight.double().clone(), block.error()
    x, target = block.data[0].hidden[0].double(), block.dense[0][0].double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 6):
        grad = 2 * (x @ w.t() - target).t() @ x / target.numel() / scale * layer.keep
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        w = w - 0.001 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    Ebft(epochs=5, lr=0.001).refine(block)
    torch.testing.assert_close(layer.weight.double(), w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(dtype: torch.dtype) -> None:
    made = []
    for seed in (5, 5, 6):
        block = decoder("2:4", batches=12, batch=1, dtype=dtype, seed=seed)
        Ebft(epochs=2, lr=1e-3).refine(block)
        made.append(torch.cat([layer.weight.flatten() for layer in block.layers]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_steps_too_small_for_bfloat16_add_up() -> None:
    block = decoder("2:4", dtype=torch.bfloat16, batches=16)
    before = block.error()
    Ebft(epochs=8, lr=5e-5).refine(block)
    assert block.error() < before
    assert all(layer.weight.dtype == torch.bfloat16 for layer in block.layers)
    assert_zero_where_pruned(block)


def test_training_feels_gradients_too_small_for_float16() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        module[0].weight *= 8192  # type: ignore[operator]
    mixed = torch.eye(32) + 0.3 * torch.randn(32, 32)
    data = [Batch((torch.randn(8, 512, 32) @ mixed).half()) for _ in range(4)]
    block = masked(module.half(), data, sparsity=0.5)
    before = block.error()
    Ebft(epochs=5, lr=20.0).refine(block)
    assert block.error() < 0.95 * before


def test_what_does_not_help_the_batches_held_out_is_taken_back() -> None:
    block = decoder("2:4")
    before = [layer.weight.clone() for layer in block.layers]
    Ebft(epochs=4, lr=10.0).refine(block)  # far too long steps
    assert all(torch.equal(layer.weight, was) for layer, was in zip(block.layers, before, strict=True))


def test_one_batch_of_four_is_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    block = decoder("2:4", batches=8)
    trained = []
    run = SmallBlock.run

    def see(self: SmallBlock, batch: Batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            trained.append(next(i for i, b in enumerate(self.data) if b is batch))
        return run(self, batch)

    monkeypatch.setattr(SmallBlock, "run", see)
    Ebft(epochs=1).refine(block)
    assert sorted(trained) == [0, 1, 2, 4, 5, 6]


def test_more_epochs_stop_where_the_batches_held_out_no_longer_improve() -> None:
    errors = []
    for epochs in (1, 3, 60, 90):
        block = decoder("2:4", batches=4, batch=1, sparsity=0.5)
        Ebft(epochs=epochs, lr=5e-3).refine(block)
        held_out = SmallBlock(block.module, block.data[3:], dense=block.dense[3:])
        errors.append(held_out.error())
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] == errors[3]  # it had stopped before


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_few_batches_train_and_judge_at_once(batches: int) -> None:
    block = decoder("2:4", batches=batches)
    before = block.error()
    Ebft(epochs=2, lr=3e-3).refine(block)
    assert block.error() < before


def test_training_changes_only_the_layers_of_the_block_that_have_masks() -> None:
    block = decoder("2:4", only="mlp")
    attention = copy.deepcopy(block.module.get_submodule("self_attn").state_dict())
    block.module.requires_grad_(False)
    Ebft(epochs=1, lr=3e-3).refine(block)
    for name, was in attention.items():
        assert torch.equal(block.module.get_submodule("self_attn").state_dict()[name], was)
    assert not any(p.requires_grad or p.grad is not None for p in block.module.parameters())


def test_training_takes_convolutions_and_experts_without_tokens() -> None:
    block = experts()
    before, idle = block.error(), block.layers[2].weight.clone()
    Ebft(epochs=2, lr=3e-3).refine(block)
    assert block.error() < before
    assert torch.equal(block.layers[2].weight, idle)
    assert_zero_where_pruned(block)


def test_without_data_or_error_nothing_is_trained() -> None:
    empty = decoder("2:4", batches=0)
    perfect = decoder(sparsity=0.0)
    for block in (empty, perfect):
        before = [layer.weight.clone() for layer in block.layers]
        Ebft().refine(block)
        assert all(torch.equal(layer.weight, was) for layer, was in zip(block.layers, before, strict=True))


def test_passes_follow_one_another() -> None:
    block = decoder("2:4")
    before, errors = counts(block), [block.error()]
    for post in (Barber(ratio=0.1), Ebft(epochs=3, lr=3e-3)):
        post.refine(block)
        errors.append(block.error())
    Variance().refine(block)
    assert errors == sorted(errors, reverse=True)
    assert counts(block) == before
    assert_zero_where_pruned(block)
